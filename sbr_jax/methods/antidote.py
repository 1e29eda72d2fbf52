"""Antidote: after tuning, zero the weights that matter most on harmful data.

Huang, Bhattacharya, Joshi, Kimball, Liu, arXiv:2408.09600. The score is Wanda's, on
harmful requests with compliant answers x ~ D_harm that the defender owns:

    S_ij = |W_ij| · sqrt(mean x_i²)         i input, j output

For every output j the top fraction of the inputs is set to zero: ⌈fraction · in⌉
weights. Only adapted projections are pruned. The mean is over the real tokens, those up
to the last answer token of an example; padding does not count.

``weights="merged"`` prunes W + scale · A B and deploys no adapter. The released code
prunes the adapter's factors instead, each as a matrix of its own with its own inputs (x
for A, x A for B), and leaves W alone: ``weights="adapter"``. The merged variant cuts
into what the model knew before fine-tuning, so expect it to cost more of everything.

One-shot: it edits what is *deployed*. Training goes on from the undisturbed weights, so
a later domain does not see the zeros, and every evaluation prunes afresh.
"""

import dataclasses
import functools
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.checks import Range, checked
from sbr_jax.data.batches import subset
from sbr_jax.methods.base import Method, Problem, summed_over_tokens
from sbr_jax.models import merge_adapter
from sbr_jax.settings import Count
from sbr_jax.typing import ApplyFn, PyTree, UserError


@checked
def antidote(
    *,
    fraction: Annotated[float, Range(above=0, below=1)] = 0.1,
    examples: Count | None = None,
    weights: Literal["merged", "adapter"] = "merged",
    monitored: bool = False,
) -> Method:
    """Antidote on what is deployed.

    Args:
      fraction: of the inputs of every output, in (0, 1).
      examples: how many of the harmful examples enter the score (None: all; published:
        2,000).
      weights: ``"merged"``, or ``"adapter"`` as in the released code.
      monitored: run CSM, on the pruned weights.
    """

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        if problem.harmful is None or not np.any(problem.harmful.mask):
            raise UserError(
                "antidote: expected harmful requests with compliant answers in the "
                "study's `harmful`, got none; the score is measured on them"
            )
        return {}

    def deploy(problem, base, adapter, state):
        squares = mean_squares(problem, base, adapter, examples)
        if weights == "adapter":
            return base, {
                k: dataclasses.replace(
                    pair,
                    lora_a=prune(pair.lora_a, squares[k][0], fraction),
                    lora_b=prune(pair.lora_b, squares[k][1], fraction),
                )
                for k, pair in adapter.items()
            }
        merged = merge_adapter(base, adapter)
        pruned = {
            k: prune(merged["layers"][k], squares[k][0], fraction) for k in adapter
        }
        return {**merged, "layers": {**merged["layers"], **pruned}}, None

    return Method("antidote", monitored, init=init, deploy=deploy)


def mean_squares(
    problem: Problem, base: PyTree, adapter: PyTree, examples: int | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Mean squares of what flows into A and B of every pair, on harmful data.

    Over the real tokens of ``examples`` of the harmful set (None: all).

    Returns:
      ``{name: (mean x² [L, in], mean (x A)² [L, r])}``, float32.
    """
    data = problem.harmful
    assert data is not None  # `init` has refused.
    data = subset(data, len(data) if examples is None else examples)
    sums = functools.partial(_square_sums, problem.apply_fn, base, adapter)
    total, count = summed_over_tokens(problem, data, sums)
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _square_sums(
    apply_fn: ApplyFn, base: PyTree, adapter: PyTree, tokens: jax.Array, real: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums over the real tokens of x² and (x A)²."""
    _, seen = apply_fn(base, adapter, tokens, capture=True)
    product = functools.partial(jnp.einsum, precision="highest")
    sums = {}
    for name, pair in adapter.items():
        x = seen["inputs"][name].astype(jnp.float32)
        down = product("lbti,lir->lbtr", x, pair.lora_a.astype(jnp.float32))
        sums[name] = tuple(
            product("lbti,bt->li", jnp.square(value), real) for value in (x, down)
        )
    return sums


@functools.partial(jax.jit, static_argnames="fraction")
def prune(weight: jax.Array, squares: jax.Array, fraction: float) -> jax.Array:
    """Sets the top of every output's scores to zero.

    ``weight`` is ``[L, in, out]``, ``squares`` the mean x² of the inputs, ``[L, in]``:
    exactly ⌈fraction · in⌉ entries of every output become 0, the others' bits stay.

    >>> prune(jnp.array([[[3.0], [2.0]]]), jnp.array([[1.0, 4.0]]), 0.5).tolist()
    [[[3.0], [0.0]]]
    """
    # Less a hair, so that 0.1 · 10 in floating point does not become two.
    count = math.ceil(fraction * weight.shape[1] - 1e-6)
    root = jnp.sqrt(squares)[:, :, None]
    score = jnp.swapaxes(jnp.abs(weight.astype(jnp.float32)) * root, 1, 2)
    _, top = jax.lax.top_k(score, max(count, 1))
    kept = jnp.put_along_axis(
        jnp.ones(score.shape, bool), top, False, axis=2, inplace=False
    )
    return jnp.where(jnp.swapaxes(kept, 1, 2), weight, jnp.zeros_like(weight))
