"""A projected AdamW step beside a plain one: ``python -m benchmarks.projection``.

Prints ratios (ours / peer) of time and planned memory in the same run. The step is
the optimizer alone; in training a forward and a backward pass come on top of both,
so these ratios are upper bounds for what a user sees.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import beside, planned_bytes
from sbr_jax import gradient_projection, random_subspace, update_projection
from sbr_jax.subspace import Subspace, from_factors

SIZES = {  # layers, width, LoRA rank, K
    "miniature": (4, 128, 8, 16),
    "1B-like": (4, 2048, 16, 32),
    "7B-like": (4, 4096, 16, 32),
}


def is_pair(node: object) -> bool:
    """One LoRA pair, as a plain dict."""
    return isinstance(node, dict) and "a" in node


def problem(layers: int, width: int, rank: int, columns: int) -> tuple[dict, Subspace]:
    """Parameters of one projection of ``layers`` layers, and a full-rank subspace."""
    key = jax.random.key(0)
    shapes = {"a": (layers, width, rank), "b": (layers, rank, width)}
    params = {"q": {k: jax.random.normal(key, s) for k, s in shapes.items()}}
    few = {"q": {k: jax.random.normal(key, (columns, *s)) for k, s in shapes.items()}}
    like = from_factors(few, max_rank=columns, energy=1.0, unit=is_pair, layer_axes=1)
    return params, random_subspace(key, like)


def main() -> None:
    """Measure both recipes at every size and print a line for each."""
    print(f"device: {jax.devices()[0].device_kind}")
    print(f"{'size':12}{'recipe':22}{'step ms':>9}{'AdamW ms':>10}", end="")
    print(f"{'time ×':>9}{'memory ×':>10}{'basis / AdamW state':>21}")
    for size, numbers in SIZES.items():
        params, subspace = problem(*numbers)
        adamw = optax.adamw(1e-3, weight_decay=0.01)
        plain = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        recipes = {
            "gradient_projection": gradient_projection(subspace, adamw),
            "update_projection": update_projection(subspace, 1e-3),
        }
        grads = jax.tree.map(jnp.cos, params)
        peer_state = plain.init(params)
        peer = jax.jit(plain.update)
        for name, tx in recipes.items():
            state = tx.init(params)
            step = jax.jit(tx.update)
            ours, theirs = beside(
                functools.partial(step, grads, state, params),
                functools.partial(peer, grads, peer_state, params),
            )
            memory = planned_bytes(tx.update, grads, state, params) / planned_bytes(
                plain.update, grads, peer_state, params
            )
            basis = sum(x.nbytes for x in jax.tree.leaves(subspace)) / sum(
                x.nbytes for x in jax.tree.leaves(peer_state)
            )
            print(f"{size:12}{name:22}{ours * 1e3:9.2f}{theirs * 1e3:10.2f}", end="")
            print(f"{ours / theirs:9.2f}{memory:10.2f}{basis:21.1f}")


if __name__ == "__main__":
    main()
