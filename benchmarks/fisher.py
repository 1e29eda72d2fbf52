"""A Fisher pass beside plain per-example gradients: ``python -m benchmarks.fisher``.

The peer computes the same gradients and keeps their squared norms only, which is the
least that any estimate of F from per-example gradients has to do. Prints ratios
(ours / peer) of time in the same run, and what a dense F would have weighed.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.measure import beside
from benchmarks.projection import is_pair
from sbr_jax import fisher_subspace, per_example_gradients

SIZES = {  # layers, width, LoRA rank, examples, tokens of each
    "miniature": (4, 64, 4, 64, 16),
    "small": (4, 256, 8, 64, 32),
    "medium": (2, 1024, 16, 32, 32),
}
BATCH = 8


def loss_fn(params: dict, example: jax.Array, frozen: jax.Array) -> jax.Array:
    """A residual network of linear layers with LoRA, scanned over its layers."""

    def layer(h: jax.Array, weights: tuple) -> tuple[jax.Array, None]:
        w, a, b = weights
        return h + jnp.tanh(h @ w + (h @ a) @ b), None

    pair = params["q"]
    h, _ = jax.lax.scan(layer, example, (frozen, pair["a"], pair["b"]))
    return jnp.mean(h**2)


@jax.jit
def norms(params: dict, batch: jax.Array, frozen: jax.Array) -> jax.Array:
    """Squared gradient norms of a batch."""
    grads = per_example_gradients(loss_fn, params, batch, frozen)
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(g**2), grads))


def peer(params: dict, batches: list, frozen: jax.Array) -> list:
    """One plain pass over the batches."""
    return [norms(params, batch, frozen) for batch in batches]


def main() -> None:
    """Measure every size and print a line for each."""
    print(f"device: {jax.devices()[0].device_kind}")
    print(f"{'size':12}{'N':>5}{'P':>9}{'Fisher ms':>12}{'grads ms':>10}", end="")
    print(f"{'time ×':>9}{'dense F':>12}{'basis':>12}")
    for size, (layers, width, rank, examples, tokens) in SIZES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        params = {
            "q": {
                "a": jax.random.normal(keys[0], (layers, width, rank)) / width**0.5,
                "b": jax.random.normal(keys[1], (layers, rank, width)) / rank**0.5,
            }
        }
        frozen = jax.random.normal(keys[2], (layers, width, width)) / width**0.5
        data = jax.random.normal(keys[3], (examples, tokens, width))
        batches = jnp.split(data, examples // BATCH)
        ours, theirs = beside(
            functools.partial(
                lambda *a, **k: fisher_subspace(*a, **k).basis,
                loss_fn,
                params,
                batches,
                max_rank=32,
                unit=is_pair,
                layer_axes=1,
                args=(frozen,),
            ),
            functools.partial(peer, params, batches, frozen),
            repeats=3,
        )
        p = 2 * width * rank
        print(
            f"{size:12}{examples:5}{p:9}{ours * 1e3:12.1f}{theirs * 1e3:10.1f}", end=""
        )
        print(f"{ours / theirs:9.2f}", end="")
        print(
            f"{layers * p * p * 4 / 2**20:9.0f}MiB{layers * p * 32 * 4 / 2**20:9.1f}MiB"
        )


if __name__ == "__main__":
    main()
