"""GCG: greedy coordinate gradient, a search for a suffix that elicits an answer.

For one prompt x, suffix s of S tokens and target y,

    L(s) = −(1 / |y|) Σ_t log p(y_t | x, s, y_{<t})
    G_iv = ∂L / ∂e_iv = Σ_d (∂L / ∂h_id) E_vd        e_i one-hot, h_i = E_{s_i}

One step does the following:

1. At each place i, take the k allowed tokens v ≠ s_i with the largest −G_iv.
2. Form B candidates, each with one place of s changed to one of its k tokens, drawn
   uniformly.
3. Move to the candidate with the least L, evaluated exactly.

The original divides each G_i by its norm before it sums over prompts. Here each prompt
has its own suffix, so this would change no ranking and is left out.

Choices that no public source of the reduced budget fixes: k is the original's 256, and
each prompt is attacked alone. Legend: N prompts, S suffix, B candidates, V vocabulary.

References: Zou et al., arXiv:2307.15043.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import checks
from sbr_jax.attacks.candidates import prefill, propose, score_candidates
from sbr_jax.attacks.suffix import (
    Layout,
    RoundTrip,
    check_start,
    check_tokens,
    lay_out,
    survivors,
)
from sbr_jax.distributed import arrays
from sbr_jax.typing import ApplyFn, PyTree, UserError

REDUCED: Mapping[str, int] = {"suffix_length": 20, "steps": 20, "candidates": 256}
"""The small budget of arXiv:2604.17691, used there on ``REDUCED_PROMPTS`` prompts."""
REDUCED_PROMPTS = 100
FULL: Mapping[str, int] = {"suffix_length": 20, "steps": 500, "candidates": 512}
"""The original's budget: ``gcg(..., **FULL)``."""
_BACKWARD = 8  # forward passes that need about the memory of one backward pass


class GcgResult(NamedTuple):
    """Result of an attack; NumPy arrays."""

    suffixes: np.ndarray
    """int32 ``[N, S]``, where the search ended."""
    losses: np.ndarray
    """float32 ``[N, steps + 1]``, L of the suffix before and after each step."""
    best_suffixes: np.ndarray
    """int32 ``[N, S]``, the best suffix that the search moved to."""
    best_losses: np.ndarray
    """float32 ``[N, steps + 1]``, least L up to each step."""


def gcg(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    targets: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    allowed: Any,
    initial_token: int,
    suffix_length: int = 20,
    steps: int = 20,
    candidates: int = 256,
    top_k: int = 256,
    chunk: int = 256,
    round_trip: RoundTrip | None = None,
    extend_fn: Callable[..., Any] | None = None,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> GcgResult:
    """Search a suffix for each prompt.

    **Guarantee**: a prompt's attack depends only on its own key and tokens, not on the
    other prompts, ``chunk`` or ``extend_fn`` (up to float rounding, which can decide
    between candidates of equal loss). Every suffix holds allowed tokens only and
    passes ``round_trip`` if that is given.

    Args:
      apply_fn: the model, with the option ``embeddings``.
      base: its weights, which hold the embedding E as ``base["embed"] [V, D]``.
      adapter: ``{name: LoraPair}`` or None.
      prompts: N pairs of tokens ``(before, after)`` around the suffix, e.g. from
        :func:`sbr_jax.attacks.suffix.gcg_prompts`.
      targets: tokens of the N wanted answers.
      key: a PRNG key, or one for each prompt ``[N]`` (to divide prompts over runs).
      allowed: bool ``[V]``, the tokens (two or more) that a suffix may hold, e.g. from
        :func:`sbr_jax.attacks.suffix.ascii_tokens`.
      initial_token: the first suffix repeats this token S times.
      suffix_length: S.
      steps: number of steps.
      candidates: B, for each prompt at each step.
      top_k: k, capped at the number of allowed tokens minus one.
      chunk: how many sequences run at once.
      round_trip: called on the host with whole prompts as lists of tokens, without
        targets. It returns for each prompt whether its text is encoded to the same
        tokens. The search never moves to a candidate that fails; if all candidates
        fail, it stays. None keeps all candidates, for word-level tokenizers.
      extend_fn: from ``models.make_extend_fn``, to run the tokens before the suffix
        once per attack; None runs whole sequences.
      on_step: called on the host after each step with the number of steps done and
        the least losses so far ``[N]``, for a progress bar.

    Returns:
      The suffixes and their losses.

    Raises:
      UserError: naming the argument that is out of range, or the prompt whose initial
        suffix fails ``round_trip``.
    """
    suffix_length = checks.whole("suffix_length", suffix_length)
    steps = checks.whole("steps", steps)
    candidates = checks.whole("candidates", candidates)
    top_k = checks.whole("top_k", top_k)
    chunk = checks.whole("chunk", chunk)
    allowed = check_tokens(allowed, initial_token, base["embed"].shape[0])
    layout = lay_out(prompts, targets, suffix_length)
    count = len(layout.tokens)
    keys = key
    if key.ndim == 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    elif key.shape != (count,):
        raise UserError(f"key: expected one, or {count} of them, got {key.shape}")
    current = np.full((count, suffix_length), initial_token, np.int32)
    if round_trip is not None:
        check_start(layout, round_trip, current)

    rows, span = layout._asdict(), 1 + max(map(len, targets))
    move_from = functools.partial(
        propose,
        apply_fn,
        candidates,
        min(top_k, int(allowed.sum()) - 1),
        max(chunk // _BACKWARD, 1),
        span,
        base,
        adapter,
        rows,
        keys,
        allowed,
    )
    run, endings = apply_fn, rows
    if extend_fn is not None:
        # Slots from start on hold padding, which the attention never sees.
        beginnings = layout.tokens[:, : int(layout.start.max())]
        past = prefill(extend_fn, base, adapter, beginnings)
        run, endings = extend_fn, {**layout.endings()._asdict(), "past": past}
    score = functools.partial(
        score_candidates, run, chunk, span, base, adapter, endings
    )
    return _search(layout, current, steps, move_from, score, round_trip, on_step)


def _search(
    layout: Layout,
    current: np.ndarray,
    steps: int,
    move_from: Callable[..., Any],
    score: Callable[..., Any],
    round_trip: RoundTrip | None,
    on_step: Callable[[int, np.ndarray], None] | None,
) -> GcgResult:
    """Move ``steps`` times from suffixes ``[N, S]`` to their best candidates."""
    each = np.arange(len(current))
    loss, found = arrays.fetch(move_from(current, jnp.int32(0)))
    best, best_loss = current, loss
    losses, best_losses = [loss], [best_loss]
    for step in range(steps):
        if step:
            _, found = arrays.fetch(move_from(current, jnp.int32(step)))
        kept = np.ones(found.shape[:2], bool)
        if round_trip is not None:
            kept = survivors(layout, round_trip, found)
            found = np.where(kept[..., None], found, current[:, None])
        scores = np.where(kept, arrays.fetch(score(found)), np.inf)
        chosen = np.argmin(scores, axis=1)
        # As in the original, move even if L rises; the best suffix is remembered.
        move = np.any(kept, axis=1)
        current = np.where(move[:, None], found[each, chosen], current)
        loss = np.where(move, scores[each, chosen], loss)
        better = loss < best_loss
        best = np.where(better[:, None], current, best)
        best_loss = np.where(better, loss, best_loss)
        losses.append(loss)
        best_losses.append(best_loss)
        if on_step is not None:
            on_step(step + 1, best_loss)
    return GcgResult(current, np.stack(losses, 1), best, np.stack(best_losses, 1))
