"""Our side of ``generation`` and ``gcg``, in a process of its own."""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import shapes, worker


def generation(job: dict[str, Any], model: Any) -> Callable[[], Any]:
    """Greedy answers of all prompts."""
    from sbr_jax import models

    def run() -> list[list[int]]:
        return models.generate(
            model, model.params, None, job["prompts"], max_new_tokens=job["new"]
        )

    return run


def gcg(job: dict[str, Any], model: Any) -> Callable[[], Any]:
    """Steps of GCG on one prompt, with its beginning cached if the job says so."""
    import jax

    from sbr_jax import attacks, models

    extend = models.make_extend_fn(model.config, model.hardware)

    def run() -> list[float]:
        found = attacks.gcg(
            model.apply_fn,
            model.params,
            None,
            [(job["before"], [])],
            [job["target"]],
            key=jax.random.key(0),
            allowed=np.ones(model.config.vocab_size, bool),
            initial_token=job["first"],
            suffix_length=job["suffix"],
            steps=job["steps"],
            candidates=job["candidates"],
            top_k=job["top_k"],
            chunk=job["chunk"],
            extend_fn=extend if job["cached"] else None,
        )
        return found.losses[0, 1:].tolist()

    return run


WHAT = {"generation": generation, "gcg": gcg}


def functions(job: dict[str, Any]) -> dict[str, Any]:
    """The functions that the parent can ask for."""
    import jax
    import jax.numpy as jnp

    from sbr_jax import models

    config = shapes.Shape(**job["shape"]).ours()
    params = models.init_params(jax.random.key(0), config, jnp.dtype(job["dtype"]))
    # A random model of the usual scale is unsure of everything: rounding would decide.
    params["embed"] = params["embed"] * jnp.asarray(10, params["embed"].dtype)
    model = models.make_model(config, params)
    call = WHAT[job["what"]](job, model)
    last: dict[str, Any] = {}

    def run() -> dict[str, Any]:
        spent, last["value"] = worker.clock(call)
        return spent

    def value() -> dict[str, Any]:
        return {"value": last["value"]}

    def memory() -> dict[str, Any]:
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"peak": stats.get("peak_bytes_in_use") or worker.peak_bytes()}

    def export(folder: str) -> dict[str, Any]:
        models.save(folder, model)
        return {}

    return {"run": run, "value": value, "memory": memory, "export": export}


def main() -> None:
    job = json.loads(sys.argv[1])
    worker.pin(job["threads"])
    worker.serve(functions(job))


if __name__ == "__main__":
    main()
