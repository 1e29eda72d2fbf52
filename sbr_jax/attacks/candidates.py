"""The pieces of a GCG step: the slope of a suffix, candidates from it, their losses.

With L the loss of :mod:`sbr_jax.attacks.gcg` and G its gradient with respect to the
one-hot suffix, each piece is a pure function that ``gcg`` calls once a step.

Legend: N prompts, S suffix, B candidates, T tokens, V vocabulary, D width.

References: Zou et al., arXiv:2307.15043.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax.losses import token_cross_entropy
from sbr_jax.typing import ApplyFn, PyTree


def suffix_gradient(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree,
    row: Mapping[str, jax.Array],
    suffix: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """L and its gradient with respect to the one-hot suffix.

    ``G_iv = Σ_d (∂L / ∂h_id) E_vd``: by the chain rule the gradient of the S
    embeddings is enough, and no one-hot array of V columns is made.

    Args:
      apply_fn: the model, with the option ``embeddings``.
      base: its weights.
      adapter: ``{name: LoraPair}`` or None.
      row: one prompt of a layout: ``tokens [T]``, ``mask [T]`` and ``start``.
      suffix: integers ``[S]``.

    Returns:
      L, and G as float32 ``[S, V]``.
    """
    tokens = _with_suffix(row["tokens"], suffix, row["start"])
    embed = base["embed"]
    embedded = embed[tokens[0]]

    def loss_fn(hidden):
        x = jax.lax.dynamic_update_slice_in_dim(embedded, hidden, row["start"], 0)
        logits = apply_fn(base, adapter, tokens, embeddings=x[None])
        return token_cross_entropy(logits, tokens, row["mask"][None])[0]

    loss, pull = jax.value_and_grad(loss_fn)(embed[suffix])
    slope = jnp.einsum("sd,vd->sv", pull, embed, preferred_element_type=jnp.float32)
    return loss, slope


def draw_candidates(
    key: jax.Array,
    slope: jax.Array,
    suffix: jax.Array,
    allowed: jax.Array,
    *,
    candidates: int,
    top_k: int,
    sampling: str = "even",
) -> jax.Array:
    """Suffixes that differ from the present one in exactly one place.

    Args:
      key: a PRNG key.
      slope: G, ``[S, V]``.
      suffix: integers ``[S]``.
      allowed: bool ``[V]``, more than ``top_k`` of them true.
      candidates: B.
      top_k: k.
      sampling: ``"even"`` or ``"random"``, as in :func:`gcg`.

    Returns:
      int32 ``[B, S]``.
    """
    length = suffix.shape[0]
    rank_key, place_key = jax.random.split(key)
    free = allowed[None] & (jnp.arange(slope.shape[1])[None] != suffix[:, None])
    _, best = jax.lax.top_k(jnp.where(free, -slope, -jnp.inf), top_k)
    index = jnp.arange(candidates, dtype=jnp.int32)
    if sampling == "even":
        place = index * length // candidates
        if candidates < length:  # the places between would never be changed
            place = (place + jax.random.randint(place_key, (), 0, length)) % length
    else:
        place = jax.random.randint(place_key, (candidates,), 0, length)
    token = best[place, jax.random.randint(rank_key, (candidates,), 0, top_k)]
    return jnp.tile(suffix[None], (candidates, 1)).at[index, place].set(token)


def _with_suffix(
    tokens: jax.Array, suffix: jax.Array, start: jax.Array | int
) -> jax.Array:
    """A batch of one, ``[1, T]``."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, suffix, start, 0)[None]


@functools.partial(jax.jit, static_argnums=range(5))
def propose(
    apply_fn: ApplyFn,
    sampling: str,
    candidates: int,
    top_k: int,
    at_once: int,
    base: PyTree,
    adapter: PyTree,
    rows: Mapping[str, jax.Array],
    keys: jax.Array,
    allowed: jax.Array,
    suffixes: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """L of the present suffixes, and candidates to move to.

    Args:
      apply_fn: the model, with the option ``embeddings``.
      sampling: ``"even"`` or ``"random"``.
      candidates: B.
      top_k: k.
      at_once: how many prompts run at once.
      base: its weights.
      adapter: ``{name: LoraPair}`` or None.
      rows: a layout of N prompts.
      keys: one for each prompt ``[N]``.
      allowed: bool ``[V]``.
      suffixes: int32 ``[N, S]``.
      step: folded into every key.

    Returns:
      float32 ``[N]``, and int32 ``[N, B, S]``.
    """

    def one(prompt):
        row, key, suffix = prompt
        loss, slope = suffix_gradient(apply_fn, base, adapter, row, suffix)
        found = draw_candidates(
            jax.random.fold_in(key, step),
            slope,
            suffix,
            allowed,
            candidates=candidates,
            top_k=top_k,
            sampling=sampling,
        )
        return loss, found

    return jax.lax.map(one, (rows, keys, suffixes), batch_size=at_once)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_candidates(
    run: Callable[..., Any],
    chunk: int,
    span: int,
    base: PyTree,
    adapter: PyTree,
    rows: Mapping[str, Any],
    suffixes: jax.Array,
) -> jax.Array:
    """L of every candidate.

    Args:
      run: the model, or its ``extend_fn`` where the beginnings are known.
      chunk: how many sequences run at once.
      span: tokens of the longest target and the one before it; over V there is a
        softmax for these alone, not for every token.
      base: its weights.
      adapter: ``{name: LoraPair}`` or None.
      rows: a layout of N prompts; with ``"past"``, the keys and values of the
        beginnings, of their endings.
      suffixes: int32 ``[N, B, S]``.

    Returns:
      float32 ``[N, B]``.
    """
    candidates = suffixes.shape[1]

    def loss(row, suffix):
        cached = "past" in row
        tokens = _with_suffix(row["tokens"], suffix, 0 if cached else row["start"])
        if cached:
            logits, _ = run(base, adapter, tokens, row["past"], row["start"][None])
        else:
            logits = run(base, adapter, tokens)
        known = logits[0], tokens[0], row["mask"]
        place = jnp.maximum(jnp.argmax(row["mask"] > 0) - 1, 0)
        # Near the end the window starts earlier, for all three alike.
        window = (jax.lax.dynamic_slice_in_dim(x, place, span) for x in known)
        return token_cross_entropy(*(x[None] for x in window))[0]

    def one(prompt):
        row, own = prompt
        return jax.lax.map(functools.partial(loss, row), own, batch_size=chunk)

    at_once = max(chunk // candidates, 1)
    return jax.lax.map(one, (rows, suffixes), batch_size=at_once)


@functools.partial(jax.jit, static_argnums=0)
def prefill(run: Callable[..., Any], base: PyTree, adapter: PyTree, tokens: jax.Array):
    """Keys and values of the beginnings.

    Args:
      run: the model's ``extend_fn``.
      base: its weights.
      adapter: ``{name: LoraPair}`` or None.
      tokens: int32 ``[N, P]``, run one at a time.

    Returns:
      ``[N, L, 1, P, K, H]`` each.
    """
    return jax.lax.map(lambda row: run(base, adapter, row[None])[1], tokens)


__all__ = [
    "draw_candidates",
    "prefill",
    "propose",
    "score_candidates",
    "suffix_gradient",
]
