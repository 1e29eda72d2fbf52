"""Times a projected AdamW step beside a plain one: ``python -m benchmarks.projection``.

The step is the optimizer's alone; training adds a forward and a backward pass to both,
so these ratios are upper bounds for what a user sees. The projection is compared with
the time to read its basis, at the rate of a sum over as many bytes. ``Π g = U (Uᵀ g)``
reads U twice, so the ratio is 2 if U fits no cache, and 1 is out of reach.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure
from sbr_jax import gradient_projection, random_subspace, update_projection
from sbr_jax.subspace import Subspace, from_factors, project_onto

SIZES = {  # layers, width, LoRA rank, K
    "miniature": (4, 128, 8, 16),
    "1B-like": (4, 2048, 16, 32),
    "7B-like": (4, 4096, 16, 32),
}


def is_pair(node: object) -> bool:
    """Whether a node is one LoRA pair, as a plain dict."""
    return isinstance(node, dict) and "a" in node


def problem(layers: int, width: int, rank: int, columns: int) -> tuple[dict, Subspace]:
    """Parameters of one projection of ``layers`` layers, and a full-rank subspace."""
    key = jax.random.key(0)
    shapes = {"a": (layers, width, rank), "b": (layers, rank, width)}
    params = {"q": {k: jax.random.normal(key, s) for k, s in shapes.items()}}
    few = {"q": {k: jax.random.normal(key, (columns, *s)) for k, s in shapes.items()}}
    like = from_factors(few, max_rank=columns, energy=1.0, unit=is_pair, layer_axes=1)
    return params, random_subspace(key, like)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@jax.jit
def total(x: jax.Array) -> jax.Array:
    """Reads every element once."""
    return jnp.sum(x)


def main(given: list[str] | None = None) -> None:
    """Measures both recipes and the projection alone at every size."""
    args = measure.options(__doc__, given)
    report = measure.Pairs("projection", args)
    for size in ["miniature"] if args.smoke else SIZES:
        params, subspace = problem(*SIZES[size])
        adamw = optax.adamw(1e-3, weight_decay=0.01)
        plain = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        recipes: dict[str, Any] = {
            "gradient_projection": gradient_projection(subspace, adamw),
            "update_projection": update_projection(subspace, 1e-3),
        }
        grads = jax.tree.map(jnp.cos, params)
        calls = 1 if args.smoke else 10

        def timed(call: Any, *given: Any, calls: int = calls) -> Any:
            return measure.timed(functools.partial(call, *given), calls=calls)

        state = plain.init(params)
        runs = {"AdamW": timed(jax.jit(plain.update), grads, state, params)}
        memory = {"AdamW": measure.planned_bytes(plain.update, grads, state, params)}
        for name, tx in recipes.items():
            own = tx.init(params)
            runs[name] = timed(jax.jit(tx.update), grads, own, params)
            memory[name] = measure.planned_bytes(tx.update, grads, own, params)
        runs["project_onto"] = timed(jax.jit(project_onto), grads, subspace)
        # As many bytes as the basis, in one array: a reader can take no less time.
        like = jnp.zeros((bytes_of(subspace) // 4,), jnp.float32)
        runs["reading the basis"] = timed(total, like)
        pairs = [(name, "AdamW") for name in recipes]
        pairs.append(("project_onto", "reading the basis"))
        basis = bytes_of(subspace)
        middle = report.measure(
            size, runs, pairs, memory=memory, more={"basis_bytes": basis}
        )
        rates = [
            f"{basis / middle[name] / 1e9:.1f} GB/s"
            for name in ("reading the basis", "project_onto")
        ]
        times = basis / bytes_of(state)
        print(f"  basis {basis / 2**20:.1f} MiB, {times:.1f} of AdamW's state;", end="")
        print(f" read at {rates[0]}, by project_onto at {rates[1]}")
    report.close()


if __name__ == "__main__":
    main()
