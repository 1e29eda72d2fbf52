"""O-LoRA: a new adapter for each domain, with inputs orthogonal to earlier adapters.

Wang et al., arXiv:2310.14152. The pairs of earlier domains are frozen, and the pair of
domain t is learned under

    L + λ₁ Σ_{layers} Σ_{k,j} |A_{<t}ᵀ A_t|_{kj} + λ₂ Σ ‖new factor of one layer‖₂

and the model is y = x W + scale · (Σ_{s≤t} x A_s B_s).

Symbols: A ``[in, r]``, B ``[r, out]``, r rank, S slots, L layers, t domain, λ₁
``orthogonality``, λ₂ ``l2``.

Two things follow the released code and not the paper: the penalty is a sum of absolute
values (not squares), and it is on the factor that reads the input, called A here and in
PEFT (the paper's text means the other factor, see issue 39 there).

All domains run one program. The frozen pairs lie side by side along the rank axis in S
slots, and empty slots are zero, so the forward pass always has rank (S + 1) r. An empty
slot changes neither the function nor the penalty. With dropout, old and new pairs share
one mask, as a single adapter does.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sbr_jax.checks import checked
from sbr_jax.methods._compose import with_gradients
from sbr_jax.methods.base import Method, Problem
from sbr_jax.models import answers, is_lora_pair
from sbr_jax.settings import Count, NonNegative
from sbr_jax.typing import PyTree, UserError


@checked
def o_lora(
    *,
    orthogonality: NonNegative = 0.5,
    l2: NonNegative = 0.0,
    max_domains: Count = 8,
    monitored: bool = False,
) -> Method:
    """O-LoRA with the released defaults.

    After each domain, its pair joins the frozen ones and the adapter starts afresh (A
    random, B = 0). The deployed weights are the frozen pairs plus the adapter, so this
    does not change the deployed function.

    Args:
      orthogonality: λ₁ ≥ 0; the paper advises 0 to 5. The weighted sum grows with
        layers, projections and r², while the loss does not.
      l2: λ₂ ≥ 0; published 0 to 0.5.
      max_domains: S. More slots cost compute at every step.
      monitored: run CSM; a repair moves the pair of the domain just learned.

    Returns:
      The method. It reports ``overlap``, the sum that λ₁ weighs, which is 0 in the
      first domain. Its ``end_domain`` raises a `UserError` if no slot is free.
    """

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        frozen = _map_pairs(lambda pair: _empty(pair, max_domains), adapter)
        return {"frozen": frozen, "learned": jnp.int32(0)}

    def regularised(hook):
        """The hook on the whole model, with the two penalties' gradients added."""

        def gradient(problem, base, adapter, state, *rest):
            frozen = state["frozen"]

            def penalty(new):
                shared = overlap(frozen, new)
                total = orthogonality * shared
                # Skipped at λ₂ = 0, because 0 · ‖x‖ still costs a norm per factor.
                return (total + l2 * sum_of_norms(new) if l2 else total), shared

            whole = dataclasses.replace(problem, apply_fn=_beside(problem, frozen))
            grads, extra, metrics = hook(whole, base, adapter, state, *rest)
            pull, shared = jax.grad(penalty, has_aux=True)(adapter)
            grads = jax.tree.map(jnp.add, grads, pull)
            return grads, extra, {**metrics, "overlap": shared}

        return gradient

    def end_domain(problem, base, adapter, state, key):
        index = int(state["learned"])
        if index >= max_domains:
            raise UserError(
                f"max_domains: expected at least {index + 1}, as many as there are "
                f"domains, got {max_domains}"
            )
        moved = _map_pairs(
            lambda slots, pair: _fill(slots, pair, index), state["frozen"], adapter
        )
        # The index is folded in, so that equal keys give a different A per domain.
        fresh = restarted(jax.random.fold_in(key, index), adapter)
        return fresh, {**state, "frozen": moved, "learned": jnp.int32(index + 1)}

    def deploy(problem, base, adapter, state):
        return base, concatenated(state["frozen"], adapter)

    method = Method(
        "o-lora", monitored, init=init, end_domain=end_domain, deploy=deploy
    )
    return with_gradients(method, regularised)


def concatenated(frozen: PyTree, new: PyTree) -> PyTree:
    """One adapter of rank r₁ + r₂ that equals the sum of two.

    ``(x [A₁ A₂]) [B₁; B₂] = x A₁ B₁ + x A₂ B₂``, for pairs of the same names and
    scales.

    >>> import jax.numpy as jnp
    >>> from sbr_jax.models import LoraPair
    >>> pair = LoraPair(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 2)), 2.0)
    >>> concatenated({"q": pair}, {"q": pair})["q"].lora_a.shape
    (1, 4, 4)
    """

    def join(old, pair):
        return dataclasses.replace(
            pair,
            lora_b=jnp.concatenate([old.lora_b, pair.lora_b], axis=-2),
            lora_a=jnp.concatenate([old.lora_a, pair.lora_a], axis=-1),
        )

    return _map_pairs(join, frozen, new)


def overlap(frozen: PyTree, new: PyTree) -> jax.Array:
    """Σ over layers and projections of Σ_{k,j} |A_oldᵀ A_new|_{kj}.

    It is 0 if every old A ``[L, in, r_old]`` is zero or orthogonal to the new one.
    """

    def pair_overlap(old, pair):
        products = jnp.einsum(
            "lik,lij->lkj",
            old.lora_a.astype(jnp.float32),
            pair.lora_a.astype(jnp.float32),
            precision="highest",
        )
        return jnp.sum(jnp.abs(products))

    return jnp.asarray(optax.tree.sum(_map_pairs(pair_overlap, frozen, new)))


def sum_of_norms(adapter: PyTree) -> jax.Array:
    """Σ ‖·‖₂ over the factors ``[L, ...]`` of every layer (norms, not squares).

    **Guarantee**: the gradient of a zero factor (a fresh B) is zero, not NaN.

    >>> import jax, jax.numpy as jnp
    >>> float(sum_of_norms([jnp.full((2, 4, 1), 2.0), jnp.zeros((2, 1, 4))]))
    8.0
    >>> jax.grad(sum_of_norms)(jnp.zeros((1, 2, 1))).ravel().tolist()
    [0.0, 0.0]
    """

    def norms(x):
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2))
        safe = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        return jnp.sum(jnp.where(squares > 0, safe, 0.0))

    return jnp.asarray(optax.tree.sum(jax.tree.map(norms, adapter)))


def restarted(key: jax.Array, adapter: PyTree) -> PyTree:
    """A fresh adapter of the same shape: A uniform in ±1/√in, B zero."""
    pairs, treedef = jax.tree.flatten(adapter, is_leaf=is_lora_pair)
    fresh = []
    for index, pair in enumerate(pairs):
        shape, dtype = pair.lora_a.shape, pair.lora_a.dtype
        bound = shape[-2] ** -0.5
        lora_a = jax.random.uniform(
            jax.random.fold_in(key, index), shape, dtype, minval=-bound, maxval=bound
        )
        lora_b = jnp.zeros_like(pair.lora_b)
        fresh.append(dataclasses.replace(pair, lora_b=lora_b, lora_a=lora_a))
    return treedef.unflatten(fresh)


def _beside(problem: Problem, frozen: PyTree) -> Any:
    """The model of ``problem`` with the frozen pairs beside any adapter."""
    return answers.Changed(
        problem.apply_fn, adapter=lambda own: concatenated(frozen, own)
    )


def _map_pairs(fn: Any, *adapters: PyTree) -> PyTree:
    return jax.tree.map(fn, *adapters, is_leaf=is_lora_pair)


def _empty(pair: Any, slots: int) -> Any:
    """Zeros for ``slots`` pairs like this one."""
    layers, rank, out = pair.lora_b.shape
    fan_in, dtypes = pair.lora_a.shape[1], (pair.lora_b.dtype, pair.lora_a.dtype)
    return dataclasses.replace(
        pair,
        lora_b=jnp.zeros((layers, slots * rank, out), dtypes[0]),
        lora_a=jnp.zeros((layers, fan_in, slots * rank), dtypes[1]),
    )


def _fill(slots: Any, pair: Any, index: int) -> Any:
    """The slots with a pair in one of them."""
    rank = pair.lora_a.shape[-1]
    place = slice(index * rank, (index + 1) * rank)
    return dataclasses.replace(
        slots,
        lora_b=slots.lora_b.at[:, place].set(pair.lora_b),
        lora_a=slots.lora_a.at[:, :, place].set(pair.lora_a),
    )
