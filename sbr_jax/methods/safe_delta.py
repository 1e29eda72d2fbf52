"""Safe Delta: keep the changes that safety can bear, and compensate for them.

Lu, Liu, Wu, Chen, Zhang, Ong, Wang, Tang, arXiv:2505.12038. For each output of an
adapted projection, with the inputs x of the aligned model on safe examples:

    H = 2 mean x xᵀ + damping,     H⁻¹ = Uᵀ U,     d_m = U_mm
    cost of keeping δ_mj:  δ_mj² / d_m²            m input, j output
    kept: the cheapest directions (small 1 / d_m²) first, while Σ cost ≤ budget
    W_j ← W_j + (W'_mj − W_mj) / d_m · U_m,>m      for every kept one, in order of m

So each weight is either the fine-tuned one or the aligned one. The aligned ones then
move so that the answers on safe examples change least: the Optimal Brain Surgeon's
compensation (Hassibi and Stork), in the order of SparseGPT, on which the released code
is based.

As in the code, damping is 0.01 of the mean diagonal, the most expensive 15 % of the
entries are never kept, and the budget is ``s/2 · mean(1/d²) · out/4096`` for every
2,048 inputs. The code handles 4 inputs at once before it compensates; here each input
is compensated separately.

The edit changes only the *deployed* weights. Training continues from the unedited ones.

Symbols: W aligned weight, W' fine-tuned, δ = W' − W, s ``strength``, L layers.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sbr_jax.checks import checked
from sbr_jax.data.batches import subset
from sbr_jax.methods.base import Method, Problem, summed_over_tokens
from sbr_jax.models import as_dense, merge_adapter
from sbr_jax.settings import Count, NonNegative
from sbr_jax.typing import ApplyFn, PyTree

DAMPING, SPARED, BLOCK, WIDTH = 0.01, 0.15, 2048, 4096
"""The released code's share of the mean diagonal, share of entries never kept, number
of inputs per budget, and the width for which the budget was chosen."""


@checked
def safe_delta(
    *, strength: NonNegative = 0.1, examples: Count = 128, monitored: bool = False
) -> Method:
    """Safe Delta on the deployed weights.

    **Guarantee**: with ``strength`` 0 the aligned model is deployed.

    Args:
      strength: s ≥ 0, scale of the budget; a larger s keeps more of what was learnt.
      examples: calibration examples that H is computed on.
      monitored: run CSM, on the deployed weights.
    """

    def deploy(problem, base, adapter, state):
        found = hessians(problem, base, list(adapter), examples)
        tuned, layers = merge_adapter(base, adapter)["layers"], dict(base["layers"])
        for name in adapter:
            parts = (as_dense(layers[name]), tuned[name], found[name])
            layers[name] = _safe_layers(parts, strength)
        return {**base, "layers": layers}, None

    return Method("safe-delta", monitored, deploy=deploy)


def hessians(
    problem: Problem, base: PyTree, names: list[str], examples: int
) -> dict[str, jax.Array]:
    """``2 mean x xᵀ`` of the inputs of some projections, ``{name: [L, in, in]}``.

    Float32, of the aligned model, on at most ``examples`` calibration examples. Tokens
    up to an example's last answer token count.
    """
    data = subset(problem.calibration, examples)
    sums = functools.partial(_outer_sums, problem.apply_fn, tuple(names), base)
    total, count = summed_over_tokens(problem, data, sums)
    return jax.tree.map(lambda x: x * (2.0 / count), total)


@functools.partial(jax.jit, static_argnames=("apply_fn", "names"))
def _outer_sums(
    apply_fn: ApplyFn,
    names: tuple[str, ...],
    base: PyTree,
    tokens: jax.Array,
    real: jax.Array,
) -> dict[str, jax.Array]:
    _, seen = apply_fn(base, None, tokens, capture=True)
    inputs = {name: seen["inputs"][name].astype(jnp.float32) for name in names}
    outer = functools.partial(jnp.einsum, "lbti,lbtj,bt->lij", precision="highest")
    return {name: outer(x, x, real) for name, x in inputs.items()}


# Jitted as a whole, because the loop would be compiled at every call.
@functools.partial(jax.jit, static_argnames="strength")
def _safe_layers(parts: tuple[jax.Array, ...], strength: float) -> jax.Array:
    """:func:`safe_weights` for all layers, one after another."""
    return jax.lax.map(lambda x: safe_weights(*x, strength), parts)


@functools.partial(jax.jit, static_argnames="strength")
def safe_weights(
    aligned: jax.Array, tuned: jax.Array, hessian: jax.Array, strength: float
) -> jax.Array:
    """One projection's weights ``[in, out]``: kept changes plus their compensation.

    ``hessian [in, in]`` comes without damping; ``strength`` is s.

    >>> w, other = jnp.zeros((2, 1)), jnp.ones((2, 1))
    >>> safe_weights(w, other, jnp.eye(2), 0.0).tolist()
    [[0.0], [0.0]]
    """
    w, target = aligned.astype(jnp.float32), tuned.astype(jnp.float32)
    count, outputs = w.shape
    diagonal = jnp.diag(hessian)
    dead = jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0))
    damped = hessian + dead
    damped = damped + DAMPING * jnp.mean(jnp.diag(damped)) * jnp.eye(count)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(damped)).T
    weight = 1.0 / jnp.diag(upper) ** 2
    budget = (
        0.5 * strength * math.ceil(count / BLOCK) * outputs / WIDTH * jnp.mean(weight)
    )
    order = jnp.argsort(weight)
    costs = ((target - w) ** 2 * weight[:, None])[order].reshape(-1)
    most = costs.size - int(SPARED * costs.size)
    cheap = (jnp.cumsum(costs) <= budget) & (jnp.arange(costs.size) < most)
    kept = jnp.zeros(w.shape, bool).at[order].set(cheap.reshape(w.shape))

    def compensate(m, now):
        value = jnp.where(kept[m], target[m], now[m])
        later = jnp.where(jnp.arange(count) > m, upper[m], 0.0)
        error = (now[m] - value) / upper[m, m]
        return (now - later[:, None] * error[None]).at[m].set(value)

    return jax.lax.fori_loop(0, count, compensate, w).astype(aligned.dtype)
