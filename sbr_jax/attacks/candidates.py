"""The pieces of a GCG step: a suffix's slope, candidates from it, their losses.

L is the loss of :mod:`sbr_jax.attacks.gcg`. G is its gradient with respect to the
one-hot suffix, computed from that of the embeddings, ``G_iv = Σ_d (∂L / ∂h_id) E_vd``.
Each piece is a pure function that ``gcg`` calls once per step.

Legend: N prompts, S suffix, B candidates, T tokens, V vocabulary, D width, ``span`` the
number of tokens in the longest target plus the one before it. The head runs on these
places only.

References: Zou et al., arXiv:2307.15043.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.models import answers, vocabulary
from sbr_jax.typing import ApplyFn, PyTree


def _pulls(apply_fn, span, base, adapter, rows, suffixes):
    """L ``[N]`` of prompts with their suffixes, and ∂L / ∂h ``[N, S, D]`` of each."""
    embed = base["embed"]
    put = jax.vmap(_put)
    tokens = put(rows["tokens"], suffixes, rows["start"])
    embedded = embed[tokens]

    def loss_fn(hidden):
        x = put(embedded, hidden, rows["start"])
        batch = {"tokens": tokens}
        states = answers.hidden(apply_fn, base, adapter, batch, embeddings=x)
        window = jax.vmap(functools.partial(_window, span))
        losses = _losses(apply_fn, base, *window(states, tokens, rows["mask"]))
        # A prompt's loss depends on its own suffix alone, so one sum serves all.
        return jnp.sum(losses), losses

    (_, losses), pull = jax.value_and_grad(loss_fn, has_aux=True)(embed[suffixes])
    return losses, pull


def _slope(base: PyTree, pull: jax.Array) -> jax.Array:
    return jnp.einsum(
        "sd,vd->sv", pull, base["embed"], preferred_element_type=jnp.float32
    )


def _window(
    span: int, states: jax.Array, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``span`` places around one sequence's target.

    Near the end of the sequence, the window of all three arrays starts earlier.
    """
    place = jnp.maximum(jnp.argmax(mask > 0) - 1, 0)
    take = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=place, slice_size=span
    )
    return take(states), take(tokens), take(mask)


def _losses(
    run: Any, base: PyTree, states: jax.Array, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Mean cross-entropy ``[...]`` of the targets in windows of ``[..., span, D]``.

    The head runs on all windows together, a chunk of places at a time.
    """
    states, targets, weights = states[..., :-1, :], tokens[..., 1:], mask[..., 1:]
    scores = vocabulary.log_likelihood(
        answers.head_of(run),
        base,
        states.reshape(-1, states.shape[-1]),
        targets.reshape(-1),
    ).reshape(targets.shape)
    total = jnp.sum(jnp.where(weights > 0, scores * weights, 0.0), axis=-1)
    return 0.0 - total / jnp.maximum(jnp.sum(weights, axis=-1), 1.0)


def draw_candidates(
    key: jax.Array,
    slope: jax.Array,
    suffix: jax.Array,
    allowed: jax.Array,
    *,
    candidates: int,
    top_k: int,
) -> jax.Array:
    """Suffixes that differ from the current one in exactly one place.

    As in the original, candidate b changes place ``⌊b S / B⌋``. If B < S, all places
    are shifted by one random number; otherwise some would never change.

    Args:
      key: a PRNG key.
      slope: G, ``[S, V]``.
      suffix: integers ``[S]``.
      allowed: bool ``[V]``, more than ``top_k`` of them true.
      candidates: B.
      top_k: k.

    Returns:
      int32 ``[B, S]``.
    """
    length = suffix.shape[0]
    rank_key, place_key = jax.random.split(key)
    free = allowed[None] & (jnp.arange(slope.shape[1])[None] != suffix[:, None])
    _, best = jax.lax.top_k(jnp.where(free, -slope, -jnp.inf), top_k)
    index = jnp.arange(candidates, dtype=jnp.int32)
    place = index * length // candidates
    if candidates < length:
        place = (place + jax.random.randint(place_key, (), 0, length)) % length
    token = best[place, jax.random.randint(rank_key, (candidates,), 0, top_k)]
    return jnp.tile(suffix[None], (candidates, 1)).at[index, place].set(token)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)


@functools.partial(jax.jit, static_argnums=range(5))
def propose(
    apply_fn: ApplyFn,
    candidates: int,
    top_k: int,
    at_once: int,
    span: int,
    base: PyTree,
    adapter: PyTree,
    rows: Mapping[str, jax.Array],
    keys: jax.Array,
    allowed: jax.Array,
    suffixes: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """L of the current suffixes, and candidates to move to.

    Args:
      apply_fn: the model, with the option ``embeddings``.
      candidates: B.
      top_k: k.
      at_once: how many prompts run at once.
      span: see the legend above.
      base: the model's weights.
      adapter: ``{name: LoraPair}`` or None.
      rows: a layout of N prompts.
      keys: one for each prompt ``[N]``.
      allowed: bool ``[V]``.
      suffixes: int32 ``[N, S]``.
      step: folded into every key.

    Returns:
      float32 ``[N]``, and int32 ``[N, B, S]``.
    """

    def draw(key, pull, suffix):
        return draw_candidates(
            jax.random.fold_in(key, step),
            _slope(base, pull),
            suffix,
            allowed,
            candidates=candidates,
            top_k=top_k,
        )

    def some(rows, keys, suffixes):
        losses, pulls = _pulls(apply_fn, span, base, adapter, rows, suffixes)
        return losses, jax.vmap(draw)(keys, pulls, suffixes)

    return _in_blocks(some, at_once, rows, keys, suffixes)


def _in_blocks(function: Callable[..., PyTree], size: int, *arrays: PyTree) -> PyTree:
    """Apply ``function`` to blocks of ``size`` rows; first rows fill up the last block.

    Unlike ``lax.map`` with a batch size, the function sees a whole block. So if it
    works in chunks, a chunk can span all rows of the block.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    blocks = math.ceil(count / size)
    size = math.ceil(count / blocks)
    if blocks == 1:
        return function(*arrays)
    index = np.arange(blocks * size).reshape(blocks, size) % count
    found = jax.lax.map(
        lambda rows: function(*jax.tree.map(lambda x: x[rows], arrays)), index
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


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
      run: the model, or its ``extend_fn`` if keys and values of the beginnings are
        known.
      chunk: how many sequences run at once.
      span: see the legend above.
      base: the model's weights.
      adapter: ``{name: LoraPair}`` or None.
      rows: a layout of N prompts; or a layout of their endings, with ``"past"``, the
        keys and values of the beginnings.
      suffixes: int32 ``[N, B, S]``.

    Returns:
      float32 ``[N, B]``.
    """
    cached = "past" in rows

    def windows(row, suffix):
        tokens = _put(row["tokens"], suffix, 0 if cached else row["start"])
        if cached:
            beginning = row["past"], row["start"][None]
            states, _ = run.hidden(base, adapter, tokens[None], *beginning)
        else:
            states = answers.hidden(run, base, adapter, {"tokens": tokens[None]})
        return _window(span, states[0], tokens, row["mask"])

    def of_prompts(rows, suffixes):
        """Losses ``[B, N]`` of suffixes ``[B, N, S]`` for some prompts."""
        found = jax.vmap(jax.vmap(windows), (None, 0))(rows, suffixes)
        return _losses(run, base, *found)

    def some(rows, suffixes):
        own = jnp.swapaxes(suffixes, 0, 1)
        few = max(chunk // own.shape[1], 1)
        losses = _in_blocks(functools.partial(of_prompts, rows), few, own)
        return jnp.swapaxes(losses, 0, 1)

    at_once = max(chunk // suffixes.shape[1], 1)
    return _in_blocks(some, at_once, rows, suffixes)


@functools.partial(jax.jit, static_argnums=0)
def prefill(run: Callable[..., Any], base: PyTree, adapter: PyTree, tokens: jax.Array):
    """Keys and values ``[N, L, 1, P, K, H]`` of the beginnings, one run at a time.

    ``run`` is the model's ``extend_fn``, ``tokens`` are int32 ``[N, P]``.
    """
    return jax.lax.map(lambda row: run.hidden(base, adapter, row[None])[1], tokens)
