r"""The refusal direction: where it points, whether it decides, how far it drifts.

    r_l = mean over harmful prompts of x_l − mean over harmless prompts of x_l
    score = log p_R − log(1 − p_R),   p_R = Σ_{t ∈ R} p(t | prompt)
    drift = cos(r_before, r_after)

x_l is the residual stream before block l at the last token of a prompt, where the first
token of the answer is decided. R are the first tokens of refusals. One of the r_l is
chosen. Candidates must hardly change the answers to harmless prompts when ablated, and
must induce refusals when added. Among these, the one is chosen whose ablation from the
weights lowers the score of harmful prompts most.

One choice differs: the published filter adds r_l at the input of block l. Here it is
added to the output of that block's attention, half a block later, because the model has
an option for that.

Legend: L layers, N prompts, T tokens, D width, V vocabulary.

References: Arditi et al., arXiv:2406.11717.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.distributed import arrays
from sbr_jax.models import answers
from sbr_jax.models.buckets import bucket
from sbr_jax.typing import ApplyFn, PyTree, UserError

Prompts = Any
"""Token ids of prompts, or a token dataset, in which a prompt is everything before the
first answer token."""

BATCH = 64
"""Most prompts in one run."""
PRUNED = 0.2
"""Share of layers, at the end, that give no candidates."""
_TINY = 1e-6
"""A mean difference below this share of the stream's own size is rounding."""
_LOG_EPS = float(np.log(1e-8))


@dataclasses.dataclass(frozen=True, eq=False)
class RefusalDirection:
    """The candidate that was chosen.

    Attributes:
      vector: float32 ``[D]``, of length 1.
      layer: l, the block before which it was measured.
      start: mean refusal score of harmful prompts on the unchanged model.
      score: the same score with the direction ablated.
      kl: mean KL(unchanged ‖ ablated) of the first answer token to harmless prompts.
      induced: mean refusal score of harmless prompts with the direction added.
      accepted: whether it passed both filters. If no candidate did, the one with the
        lowest score is chosen, as an attacker would.
    """

    vector: np.ndarray
    layer: int
    start: float
    score: float
    kl: float
    induced: float
    accepted: bool


def last_token_states(
    apply_fn: ApplyFn, base: PyTree, adapter: PyTree, prompts: Prompts
) -> np.ndarray:
    """The residual stream at the last token of N prompts, float64 ``[L + 1, N, D]``.

    The stream is taken before each block and after the last.
    """
    parts = [
        arrays.fetch(_states(apply_fn, base, adapter, tokens, last))[:, :count]
        for tokens, last, count in _batches(prompts)
    ]
    return np.concatenate(parts, axis=1).astype(np.float64)


def difference_of_means(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree,
    harmful: Prompts,
    harmless: Prompts,
) -> np.ndarray:
    """The candidates r_l ``[L + 1, D]``: harmful minus harmless mean of the stream.

    Means are taken in float64. If all prompts end in the same token, r_0 is 0.

    Raises:
      UserError: for a set without prompts or an empty prompt.
    """
    wicked, plain = (
        last_token_states(apply_fn, base, adapter, prompts).mean(1)
        for prompts in (harmful, harmless)
    )
    return wicked - plain


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Cosine between directions ``[..., D]`` before and after, float64 ``[...]``.

    NaN if one of the two is 0.

    >>> float(drift(np.array([1.0, 0.0]), np.array([3.0, 3.0])).round(3))
    0.707
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    dot = np.sum(before * after, axis=-1)
    return np.where(size > 0, dot / np.where(size > 0, size, 1.0), np.nan)


@jax.jit
def refusal_score(logits: jax.Array, refusal_tokens: jax.Array) -> jax.Array:
    """Log-odds of starting with a refusal: ``log p_R − log(1 − p_R)``, float32 ``[N]``.

    ``logits`` are ``[N, V]``, for the first answer token; ``refusal_tokens`` are
    ``[R]``, all different. The score is finite, because neither probability counts as
    less than 1e-8.

    >>> import jax.numpy as jnp
    >>> round(float(refusal_score(jnp.zeros((1, 4)), jnp.array([1]))[0]), 3)
    -1.099
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    refusing = jnp.zeros(scores.shape[-1:], bool).at[refusal_tokens].set(True)[None]

    def log_mass(where: jax.Array) -> jax.Array:
        # 1 − p_R would round to 0 in float32, and its logarithm to −∞.
        mass = jax.nn.logsumexp(jnp.where(where, scores, -jnp.inf), axis=-1)
        return jnp.maximum(mass, _LOG_EPS)

    return log_mass(refusing) - log_mass(~refusing)


def refusal_direction(
    apply_fn: ApplyFn,
    base: PyTree,
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: Sequence[int],
    ablate: Callable[[PyTree, jax.Array], PyTree],
    *,
    validation: tuple[Prompts, Prompts] | None = None,
    max_kl: float = 0.1,
    min_induced: float = 0.0,
) -> RefusalDirection:
    """Choose among the mean differences of all layers by the effect of their ablation.

    Args:
      apply_fn: the model.
      base: its weights, adapters merged.
      harmful: prompts.
      harmless: prompts.
      refusal_tokens: first tokens of refusals.
      ablate: ``(base, direction [D]) -> base``, a pure function such as
        :func:`sbr_jax.attacks.ablate_direction`.
      validation: harmful and harmless prompts on which candidates are compared; None
        for those above.
      max_kl: drop a candidate whose ablation moves harmless answers further than this.
      min_induced: drop a candidate that, when added, leaves harmless prompts below this
        refusal score.

    Returns:
      The candidate with the lowest refusal score under ablation.

    Raises:
      UserError: if no layer tells the two sets apart, or a set is empty.
    """
    means = difference_of_means(apply_fn, base, None, harmful, harmless)
    stream = last_token_states(apply_fn, base, None, harmful)
    sizes = np.linalg.norm(stream, axis=-1).mean(1)
    depth = len(means) - 1
    # As published, a layer counts as late from the whole number of kept layers on.
    layers = [
        layer
        for layer in range(int(depth * (1.0 - PRUNED)))
        if np.linalg.norm(means[layer]) > _TINY * sizes[layer]
    ]
    if not layers:
        raise UserError(
            f"expected a layer among the first {1 - PRUNED:.0%} of {depth} that tells "
            "harmful from harmless prompts, got none; check that the two sets of "
            "prompts differ"
        )
    wicked, plain = validation or (harmful, harmless)
    tokens = jnp.asarray(refusal_tokens, jnp.int32)

    def score(logits: jax.Array) -> float:
        return float(np.asarray(refusal_score(logits, tokens), np.float64).mean())

    run = functools.partial(_logits, apply_fn, ablate, base)
    start, honest = score(run(wicked)), run(plain)
    found = []
    for layer in layers:
        vector = means[layer] / np.linalg.norm(means[layer])
        shift = np.zeros((depth, 1, 1, means.shape[1]))
        shift[layer, 0, 0] = means[layer]
        kl = float(_kl(honest, run(plain, direction=vector)))
        induced = score(run(plain, shift=shift))
        found.append(
            RefusalDirection(
                vector=vector.astype(np.float32),
                layer=layer,
                start=start,
                score=score(run(wicked, direction=vector)),
                kl=kl,
                induced=induced,
                accepted=kl <= max_kl and induced >= min_induced,
            )
        )
    return min(found, key=lambda c: (not c.accepted, c.score))


def _prompt_lists(prompts: Prompts) -> list[list[int]]:
    if hasattr(prompts, "mask"):
        tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask) > 0
        stops = np.where(mask.any(1), mask.argmax(1), tokens.shape[1])
        prompts = [row[:stop] for row, stop in zip(tokens, stops, strict=True)]
    found = [[int(t) for t in prompt] for prompt in prompts]
    if not found or not all(found):
        raise UserError(
            f"expected prompts of at least one token each, got {len(found)} prompts, "
            f"{sum(not p for p in found)} of them empty"
        )
    return found


def _batches(prompts: Prompts) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Right-padded tokens, the place of each last token, and how many rows are real."""
    rows = _prompt_lists(prompts)
    length = bucket(max(map(len, rows)))
    size = min(BATCH, bucket(len(rows), 1))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        tokens = np.zeros((size, length), np.int32)
        last = np.zeros(size, np.int32)
        for i, row in enumerate(part):
            tokens[i, : len(row)], last[i] = row, len(row) - 1
        yield tokens, last, len(part)


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def _states(apply_fn, base, adapter, tokens, last):
    _, seen = answers.hidden(apply_fn, base, adapter, {"tokens": tokens}, capture=True)
    rows = jnp.arange(tokens.shape[0])
    return seen["residual"][:, rows, last].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("apply_fn", "ablate"))
def _last_logits(apply_fn, ablate, base, direction, shift, tokens, last):
    if direction is not None:
        base = ablate(base, direction)
    if shift is not None:
        shift = shift.astype(base["embed"].dtype)
    batch = {"tokens": tokens}
    hidden = answers.hidden(apply_fn, base, None, batch, attention_shift=shift)
    return answers.head_of(apply_fn)(base, hidden[jnp.arange(tokens.shape[0]), last])


def _logits(
    apply_fn, ablate, base, prompts, *, direction=None, shift=None
) -> jax.Array:
    """Logits ``[N, V]`` of the first answer token, under one of two interventions."""
    if direction is not None:
        direction = jnp.asarray(direction, jnp.float32)
    if shift is not None:
        shift = jnp.asarray(shift, jnp.float32)
    run = functools.partial(_last_logits, apply_fn, ablate, base, direction, shift)
    parts = [arrays.fetch(run(*given))[:count] for *given, count in _batches(prompts)]
    return jnp.asarray(np.concatenate(parts))


@jax.jit
def _kl(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """Mean over prompts of KL(reference ‖ logits), in nats."""
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (reference, logits))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
