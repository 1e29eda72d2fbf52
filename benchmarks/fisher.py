"""Per-example gradients and a Fisher pass: ``python -m benchmarks.fisher``.

The model is a residual network of linear layers with LoRA, which PyTorch computes too.
A Fisher pass is compared with the least that any estimate from per-example gradients
must do (their squared norms), and with as many plain gradient steps, batched alike.
Per-example gradients are compared with a loop of ``jax.grad`` and with
``torch.func.vmap(grad)``. In these small networks the eigenvectors cost as much as the
gradients; in a language model, measured last, they hardly matter.

Memory is what the compiled programs plan, compared with the size of a dense F.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure, study, worker
from benchmarks.projection import is_pair
from sbr_jax import fisher_subspace, per_example_gradients

SIZES = {  # layers, width, LoRA rank, examples, tokens of each
    "miniature": (4, 64, 4, 64, 16),
    "small": (4, 256, 8, 64, 32),
    "medium": (2, 1024, 16, 32, 32),
}
BATCH, KEPT = 8, 32
MODEL = dataclasses.replace(study.SMALL, rank=8, calibration=128)
"""A language model, and its calibration set of full rows of 128 tokens."""


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
    """Squared gradient norms of a batch, summed."""
    grads = per_example_gradients(loss_fn, params, batch, frozen)
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(g**2), grads))


@jax.jit
def each(params: dict, batch: jax.Array, frozen: jax.Array) -> Any:
    """The gradients of a batch, one for each example."""
    return per_example_gradients(loss_fn, params, batch, frozen)


one = jax.jit(jax.grad(loss_fn))


@jax.jit
def mean(params: dict, batch: jax.Array, frozen: jax.Array) -> Any:
    """The mean gradient of a batch, as in a plain step."""

    def total(p: dict) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0, None))(p, batch, frozen))

    return jax.grad(total)(params)


def measure_size(
    report: measure.Pairs, args: argparse.Namespace, name: str, peer: str | None
) -> None:
    """Measures one size and prints its rows."""
    layers, width, rank, examples, tokens = SIZES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    a = jax.random.normal(keys[0], (layers, width, rank)) / width**0.5
    b = jax.random.normal(keys[1], (layers, rank, width)) / rank**0.5
    params = {"q": {"a": a, "b": b}}
    frozen = jax.random.normal(keys[2], (layers, width, width)) / width**0.5
    data = jax.random.normal(keys[3], (examples, tokens, width))
    batches = jnp.split(data, examples // BATCH)

    def fisher() -> Any:
        return fisher_subspace(
            loss_fn,
            params,
            batches,
            max_rank=KEPT,
            unit=is_pair,
            layer_axes=1,
            args=(frozen,),
        ).basis

    def over(function: Any, items: Any) -> Any:
        return lambda: [function(params, item, frozen) for item in items]

    runs = {
        "Fisher subspace": measure.timed(fisher),
        "squared norms": measure.timed(over(norms, batches)),
        "plain gradients": measure.timed(over(mean, batches)),
        "per-example gradients": measure.timed(over(each, batches)),
        "loop of jax.grad": measure.timed(over(one, list(data))),
    }
    pairs = [
        ("Fisher subspace", "squared norms"),
        ("Fisher subspace", "plain gradients"),
        ("per-example gradients", "loop of jax.grad"),
    ]
    memory = {
        "per-example gradients": measure.planned_bytes(each, params, batches[0], frozen)
    }
    memory["loop of jax.grad"] = measure.planned_bytes(one, params, data[0], frozen)
    size = 2 * width * rank
    more = {"dense_bytes": 4 * layers * size**2, "kept_bytes": 4 * layers * size * KEPT}
    if peer is None:
        report.measure(name, runs, pairs, memory=memory, more=more)
        return
    job = {"what": "gradients", "sizes": SIZES[name], "batch": BATCH}
    with worker.Worker(peer, "torch_child", {**job, "threads": measure.cores()}) as on:
        runs["torch.func vmap(grad)"] = lambda: on.ask("run")["wall"]
        pairs.append(("per-example gradients", "torch.func vmap(grad)"))
        report.measure(name, runs, pairs, memory=memory, more=more)


def measure_model(report: measure.Pairs, size: study.Size) -> None:
    """Compares a Fisher pass of a language model with plain gradients."""
    passes = study.Calibration(size, min(KEPT, size.calibration))
    runs = {
        "Fisher subspace": measure.timed(passes.fisher),
        "plain gradients": measure.timed(passes.gradients),
    }
    report.measure("language model", runs, [("Fisher subspace", "plain gradients")])


def main(given: list[str] | None = None) -> None:
    """Measures every size."""
    args = measure.options(__doc__, given)
    peer = worker.peer_python(args.peers, "torch")
    report = measure.Pairs("fisher", args)
    for name in ["miniature"] if args.smoke else SIZES:
        measure_size(report, args, name, peer)
        layers, width, rank = SIZES[name][:3]
        size = 2 * width * rank
        dense, kept = layers * size**2 / 2**18, layers * size * KEPT / 2**18
        print(f"  dense F {dense:.0f} MiB, basis of {KEPT} columns {kept:.1f} MiB")
    measure_model(report, study.SMOKE if args.smoke else MODEL)
    report.close()


if __name__ == "__main__":
    main()
