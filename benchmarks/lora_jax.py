"""Our side of ``lora_step``: a process that trains plain LoRA and times it."""

import functools
import itertools
import json
import os
import sys
from typing import Any

from benchmarks import shapes, worker


class Ours:
    """The program of ``sbr-jax run --methods plain`` on random weights.

    Args:
      job: from :func:`benchmarks.lora_step.job_of`.
    """

    def __init__(self, job: dict[str, Any]):
        """Draws the weights on the device."""
        import jax
        import jax.numpy as jnp

        from sbr_jax import models
        from sbr_jax.settings import Hardware, Training
        from sbr_jax.training.config import Config
        from sbr_jax.training.program import init_adapter, make_program
        from sbr_jax.training.study import Study

        self._job, self._jax = job, jax
        self._batches, self._longest = shapes.read(job["data"])
        config = shapes.Shape(**job["shape"]).ours()
        self._dtype = jnp.dtype(job["dtype"])
        params = _random_params(config, self._dtype)
        how = models.Hardware(remat=False, unroll=job["unroll"])
        self._model = models.make_model(config, params, hardware=how)
        settings = Config(
            Training(
                batch_size=len(self._batches[0]["tokens"]),
                lora_rank=job["rank"],
                lora_alpha=2.0 * job["rank"],
                lora_targets="|".join(shapes.TARGETS),
            ),
            Hardware(remat="no"),
        )
        study = Study(self._model, {}, None, lambda *_: {})
        self._program = make_program("plain", study, settings)
        self._adapter = init_adapter(study, settings, 0)
        self._train = self._program.start(self._adapter, {})
        self._key = jax.random.key(0)
        self._layout = self._choose()

    def _choose(self) -> Any:
        """Like ``layout.choose``, but for these batches: it would draw its own."""
        from sbr_jax.data import layout

        if self._job["layout"] == "packed":
            return layout.packed_layout(self._batches, self._longest)[0]
        places = max(int((b["mask"] > 0).sum(1).max()) for b in self._batches)
        return layout.Layout(self._longest, False, places)

    def _step(self, batch: dict[str, Any]) -> Any:
        from sbr_jax.data import layout

        # Like the trainer: lay out on the host while the device is busy.
        drawn = {name: batch[name] for name in ("tokens", "mask")}
        (laid,) = layout.arrange([drawn], self._layout)
        self._train, metrics = self._program.step(
            self._model.params, self._train, {}, laid, self._key
        )
        return metrics["loss"]

    def about(self) -> dict[str, Any]:
        """Versions and the device."""
        from benchmarks.measure import PACKAGES, versions

        device = self._jax.devices()[0]
        return {"versions": versions(PACKAGES), "device": device.device_kind}

    def prepare(self) -> dict[str, Any]:
        """Compiles a program for every shape that occurs, by a step on each batch."""
        spent, _ = worker.clock(self.run)
        again, _ = worker.clock(self.run)
        program: Any = self._program.step
        return {
            "compile": spent["wall"] - again["wall"],
            "programs": program._cache_size(),
        }

    def run(self) -> dict[str, Any]:
        """Takes a step on every batch."""

        def steps():
            losses = [self._step(batch) for batch in self._batches]
            return self._jax.block_until_ready(losses)

        spent, losses = worker.clock(steps)
        return {**spent, "losses": [float(x) for x in losses]}

    def rate(self, size: int) -> dict[str, Any]:
        """Operations a second of a square product."""
        jax = self._jax
        x = jax.random.normal(jax.random.key(1), (size, size), self._dtype)
        product = jax.jit(lambda a, b: a @ b)
        repeats = 5 if jax.default_backend() == "cpu" else 50
        jax.block_until_ready(product(x, x))

        def run():
            found = [product(x, x) for _ in range(repeats)]
            return jax.block_until_ready(found[-1])

        best = min(worker.clock(run)[0]["wall"] for _ in range(3))
        return {"rate": 2 * size**3 * repeats / best}

    def memory(self) -> dict[str, Any]:
        """Peak bytes: of the device, or of this process if that is the host."""
        stats = self._jax.local_devices()[0].memory_stats() or {}
        return {"peak": stats.get("peak_bytes_in_use") or worker.peak_bytes()}

    def export(self, folder: str) -> dict[str, Any]:
        """Writes weights and an adapter with nonzero B, in the peers' format."""
        import dataclasses

        from sbr_jax import models

        jax = self._jax
        noise = {
            name: 0.02 * jax.random.normal(jax.random.key(i), pair.lora_b.shape)
            for i, (name, pair) in enumerate(self._adapter.items())
        }
        self._adapter = {
            name: dataclasses.replace(pair, lora_b=noise[name])
            for name, pair in self._adapter.items()
        }
        models.save(f"{folder}/base", self._model)
        models.save_peft(f"{folder}/adapter", self._model, self._adapter)
        return {}

    def check(self) -> dict[str, Any]:
        """Loss and gradient norm on each batch, without taking a step."""
        import optax

        from sbr_jax.data import layout
        from sbr_jax.methods.base import task_loss

        jax = self._jax

        @jax.jit
        def find(base, adapter, batch):
            loss = functools.partial(task_loss, self._program.problem, base)
            return jax.value_and_grad(lambda a: loss(a, batch, self._key))(adapter)

        losses, norms = [], []
        for batch in self._batches:
            drawn = {name: batch[name] for name in ("tokens", "mask")}
            (laid,) = layout.arrange([drawn], self._layout)
            laid.pop("row", None)
            with jax.default_matmul_precision("highest"):
                loss, grads = find(self._model.params, self._adapter, laid)
            losses.append(float(loss))
            norms.append(float(optax.tree.norm(grads)))
        return {"losses": losses, "norms": norms}


def _random_params(config: Any, dtype: Any) -> Any:
    """Weights like ``init_params``, drawn one layer's matrix at a time.

    Otherwise a whole stack's random bits, not the step, would be the peak of memory.
    """
    import jax
    import jax.numpy as jnp

    from sbr_jax import models

    like = jax.eval_shape(lambda k: models.init_params(k, config), jax.random.key(0))
    number = itertools.count()

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key, shape):
        def draw(k):
            return jax.random.normal(k, shape[1:], dtype) * jnp.asarray(0.02, dtype)

        return jax.lax.map(draw, jax.random.split(key, shape[0]))

    def fill(path, leaf):
        key = jax.random.fold_in(jax.random.key(0), next(number))
        if path[-1].key.endswith("norm"):
            return jnp.ones(leaf.shape, dtype)
        if len(leaf.shape) == 2:
            return normal(key, (1, *leaf.shape))[0]
        return normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, like)


def functions(job: dict[str, Any]) -> dict[str, Any]:
    """The functions that the parent can ask for."""
    ours = Ours(job)
    names = ("about", "prepare", "run", "rate", "memory", "export", "check")
    return {name: getattr(ours, name) for name in names}


def main() -> None:
    job = json.loads(sys.argv[1])
    worker.pin(job["threads"])
    if job["device"] == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    worker.serve(functions(job))


if __name__ == "__main__":
    main()
