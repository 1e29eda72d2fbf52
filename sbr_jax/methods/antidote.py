"""Antidote: after tuning, zero the weights that matter most on harmful data.

Huang, Bhattacharya, Joshi, Kimball, Liu, arXiv:2408.09600. The score is Wanda's,
measured on harmful requests with compliant answers x ~ D_harm that the defender owns:

    S_ij = |W_ij| · sqrt(mean x_i²)         i input, j output

For every output j, the ⌈fraction · in⌉ weights with the highest score become zero. Only
adapted projections are pruned. The mean is over real tokens, those up to an example's
last answer token; padding does not count.

``weights="merged"`` prunes W + scale · A B and deploys no adapter.
``weights="adapter"``, as in the released code, leaves W alone and prunes the adapter's
factors, each as its own matrix with its own inputs (x for A, x A for B). The merged
variant also removes what the model knew before fine-tuning, so expect every score to
fall more.

The edit changes only the *deployed* weights. Training continues from the unedited ones,
so a later domain does not see the zeros, and every evaluation prunes afresh.
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
    """Antidote on the deployed weights.

    Args:
      fraction: share of each output's inputs to prune, in (0, 1).
      examples: number of harmful examples for the score (None: all; published:
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
    """Mean squares of the inputs of A and B of every pair, on harmful data.

    The mean is over the real tokens of ``examples`` harmful examples (None: all).

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
    """Set the weights with each output's highest scores to zero.

    ``weight`` is ``[L, in, out]``, and ``squares`` is the mean x² of the inputs,
    ``[L, in]``. Exactly ⌈fraction · in⌉ entries of every output become 0; the others
    keep their bits.

    >>> prune(jnp.array([[[3.0], [2.0]]]), jnp.array([[1.0, 4.0]]), 0.5).tolist()
    [[[3.0], [0.0]]]
    """
    # Subtract a little, so that rounding in 0.1 · 10 does not give two.
    count = math.ceil(fraction * weight.shape[1] - 1e-6)
    root = jnp.sqrt(squares)[:, :, None]
    score = jnp.swapaxes(jnp.abs(weight.astype(jnp.float32)) * root, 1, 2)
    _, top = jax.lax.top_k(score, max(count, 1))
    kept = jnp.put_along_axis(
        jnp.ones(score.shape, bool), top, False, axis=2, inplace=False
    )
    return jnp.where(jnp.swapaxes(kept, 1, 2), weight, jnp.zeros_like(weight))
