"""Log-likelihoods of continuations, reading each context only once.

For a context c and a continuation y of tokens y_1 … y_n, ``Σ_i log p(y_i | c, y_<i)``.

A context without its last token goes through the model without logits and leaves its
keys and values. Its last token and a continuation without its last token then run
against these. So all options of one token share one row, and so do longer options that
differ only in their last token. A beginning common to many contexts (a few-shot
preamble) is read once for all of them. The head is applied only to the places that
predict a continuation's tokens.

Symbols: B contexts, S tokens of the common beginning, P of a context's remainder, R
rows of endings, T tokens of an ending, K last tokens that share a row, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh
from sbr_jax.distributed import arrays
from sbr_jax.models import Model, answers, make_extend_fn, vocabulary
from sbr_jax.models.buckets import bucket
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.models.likelihood import read_targets
from sbr_jax.progress import task
from sbr_jax.typing import PyTree, UserError

SHARED_AFTER = 64
"""Contexts that agree in this many tokens are checked for a common beginning."""


class Request(NamedTuple):
    """Token ids of a context and of its continuations."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Scores(NamedTuple):
    """Each continuation's summed log-likelihood, and whether it is the greedy one."""

    log_likelihoods: np.ndarray
    greedy: np.ndarray


class _Row(NamedTuple):
    """An ending: tokens after a context that are followed by one of several tokens."""

    context: int
    body: tuple[int, ...]
    last: dict[int, list[tuple[int, int]]]
    """From a last token to the (request, continuation) pairs that it ends."""


@functools.partial(jax.jit, static_argnames=("extend_fn",))
def _read(
    extend_fn: Any, base: PyTree, adapter: PyTree, tokens: jax.Array, shared: Any
) -> Any:
    """Keys and values ``[L, B, S + P, ...]`` of contexts ``[B, P]`` after ``shared``.

    The head is not applied.
    """
    past = None
    if shared is not None:
        rows = tokens.shape[0]
        past = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:])), shared
        )
    _, fresh = extend_fn.hidden(base, adapter, tokens, past)
    if past is None:
        return fresh
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), past, fresh)


@functools.partial(jax.jit, static_argnames=("extend_fn",))
def _end(
    extend_fn: Any,
    base: PyTree,
    adapter: PyTree,
    cache: Any,
    owner: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    ends: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, ...]:
    """Runs endings ``[R, T]`` against their contexts' cache; logits only where needed.

    An ending belongs to context ``owner [R]``, of which ``length [R]`` tokens are
    cached. ``places`` and ``targets [N]`` belong to the tokens of the bodies,
    ``ends [R]`` are the places of their last tokens, and ``last [R, K]`` are the tokens
    that may follow there.

    Returns:
      For the bodies' tokens their log-likelihoods, whether they are the most likely,
      and whether logits could be compared ``[N]``; for the last tokens their
      log-likelihoods ``[R, K]``, the most likely token ``[R]``, and whether logits
      could be compared ``[R]``.
    """
    past = jax.tree.map(lambda x: x[:, owner], cache)
    states, _ = extend_fn.hidden(base, adapter, tokens, past, length)
    read = functools.partial(vocabulary.read, extend_fn.head, base)
    body = read(answers.at_places(states, places), read_targets, targets)
    return *body, *read(answers.at_places(states, ends), _read_ends, last)


def _read_ends(
    logits: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads the scores of the last tokens ``[R, K]`` from logits ``[R, V]``."""
    normal = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = jnp.take_along_axis(logits, last, axis=-1) - normal
    return scores, jnp.argmax(logits, axis=-1).astype(jnp.int32), comparable(logits)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of how much runs at once; they change no result.

    Attributes:
      tokens: keys and values held at once, in tokens.
      rows: the most sequences in one run.
    """

    tokens: int = 16_384
    rows: int = 64

    def fit(self, length: int) -> int:
        """The largest power of two of rows with ``length`` tokens each."""
        rows = max(1, min(self.rows, self.tokens // max(length, 1)))
        return 1 << (rows.bit_length() - 1)


def score(
    model: Model,
    base: PyTree,
    adapter: PyTree | None,
    requests: Sequence[Request],
    *,
    budget: Budget = Budget(),
) -> list[Scores]:
    """Log-likelihoods of every request's continuations.

    **Guarantee**: equal to running every continuation after its context alone, up to
    float rounding; independent of the other requests and of the budget.

    Args:
      model: the record.
      base: weights to use.
      adapter: ``{name: LoraPair}`` or None.
      requests: contexts of at least one token (BOS) with continuations of at least one.
      budget: how much to run at once.

    Returns:
      One ``Scores`` for each request, in order; nats.

    Raises:
      UserError: naming a request that is empty or exceeds the model's context, or whose
        log-likelihoods are not finite.
    """
    _check(model, requests)
    # A harness sends a context once for each option; merge equal ones.
    contexts: dict[tuple[int, ...], int] = {}
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for r, request in enumerate(requests):
        key = tuple(request.context)
        context = contexts.setdefault(key, len(contexts))
        for c, continuation in enumerate(request.continuations):
            *body, last = (int(t) for t in continuation)
            place = (context, tuple(body))
            row = rows.setdefault(place, _Row(*place, {}))
            row.last.setdefault(last, []).append((r, c))
    out = [
        Scores(
            np.zeros(len(q.continuations), np.float32),
            np.zeros(len(q.continuations), bool),
        )
        for q in requests
    ]
    by_context: dict[int, list[_Row]] = {}
    for row in rows.values():
        by_context.setdefault(row.context, []).append(row)
    texts = list(contexts)
    # Without a backward pass the rolled loop is as fast and compiles sooner.
    rolled = dataclasses.replace(model.hardware, unroll=model.hardware.unroll or 1)
    extend_fn = make_extend_fn(model.config, rolled)
    with task("scores", len(texts)) as done, _mesh.using(_mesh.holding(base)):
        read = 0
        for group in _groups(texts):
            _score_group(
                (extend_fn, base, adapter),
                [(texts[i], by_context[i]) for i in group],
                budget,
                out,
            )
            read += len(group)
            done(read)
    # Scores that could not be compared are NaN by now.
    told = [bool(np.isfinite(s.log_likelihoods).all()) for s in out]
    require_comparable("score", told)
    return out


def _check(model: Model, requests: Sequence[Request]) -> None:
    limit = model.config.context
    for i, (context, continuations) in enumerate(requests):
        if not len(context) or not continuations or not all(map(len, continuations)):
            raise UserError(
                f"score: expected a context and continuations of at least one token in "
                f"request {i}, got {len(context)} and {[len(c) for c in continuations]}"
            )
        longest = len(context) + max(map(len, continuations)) - 1
        if longest > limit:
            raise UserError(
                f"score: request {i} has {longest} tokens, more than the model's "
                f"context of {limit}; shorten it"
            )


def _groups(contexts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Groups indices of contexts by their first tokens; small groups are merged."""
    by_start: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        start = context[:SHARED_AFTER] if len(context) > SHARED_AFTER else ()
        by_start.setdefault(start, []).append(i)
    alone = [i for group in by_start.values() if len(group) < 4 for i in group]
    groups = [group for group in by_start.values() if len(group) >= 4]
    return [*groups, *([alone] if alone else [])]


def _common(contexts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens, without the last, that all share, rounded down to a bucket."""
    if len(contexts) < 2:
        return 0
    low, high = min(contexts), max(contexts)
    most = min(len(low), len(high), *(len(c) for c in contexts)) - 1
    same = 0
    while same < most and low[same] == high[same]:
        same += 1
    if same < SHARED_AFTER:
        return 0
    power = 1 << (same.bit_length() - 1)
    return power * 3 // 2 if power * 3 // 2 <= same else power


def _score_group(
    run: tuple,
    group: Sequence[tuple[tuple[int, ...], list[_Row]]],
    budget: Budget,
    out: list[Scores],
) -> None:
    """Scores contexts that may share a beginning."""
    common = _common([context for context, _ in group])
    shared = None
    if common:
        start = np.asarray(group[0][0][:common], np.int32)[None]
        shared = _read(*run, start, None)
    group = sorted(group, key=lambda item: len(item[0]))
    todo = list(group)
    while todo:
        # Sorted by length, so the last context of a chunk sets the shape. Look ahead,
        # but not so far that one long context pads many short ones.
        ahead = todo[: budget.rows]
        widths = [bucket(len(context) - 1 - common, 16) for context, _ in ahead]
        rows = budget.fit(common + widths[0])
        near = sum(w <= 2 * widths[0] for w in widths[:rows])
        rows = min(near, budget.fit(common + widths[near - 1]))
        width = widths[rows - 1]
        chunk, todo = todo[:rows], todo[rows:]
        tokens = np.zeros((_few(len(chunk), 1), width), np.int32)
        for i, (context, _) in enumerate(chunk):
            rest = context[common:-1]
            tokens[i, : len(rest)] = rest
        cache = _read(*run, tokens, shared)
        endings = [
            (i, context, row) for i, (context, mine) in enumerate(chunk) for row in mine
        ]
        endings.sort(key=lambda item: len(item[2].body))
        for part in _parts(endings, budget, common + width):
            _score_endings(run, cache, part, out)


def _parts(endings: list, budget: Budget, slots: int) -> Iterable[list]:
    """Splits endings into runs of bounded size and similar length."""
    while endings:
        rows = budget.fit(slots + _few(len(endings[0][2].body) + 1, 16))
        rows = budget.fit(slots + _few(len(endings[:rows][-1][2].body) + 1, 16))
        yield endings[:rows]
        endings = endings[rows:]


def _few(size: int, smallest: int) -> int:
    """Rounds a size to 1 or a power of two, since each shape is compiled anew."""
    return 1 if size == 1 else max(smallest, 1 << (size - 1).bit_length())


def _score_endings(run: tuple, cache: Any, part: list, out: list[Scores]) -> None:
    """Runs one batch of endings and writes their scores where they belong."""
    size = _few(len(part), 1)
    longest = max(len(row.body) for _, _, row in part) + 1
    width = _few(longest, 16)
    most = max(len(row.last) for _, _, row in part)
    tokens = np.zeros((size, width), np.int32)
    last = np.zeros((size, _few(most, 4)), np.int32)
    owner, length, ends = np.zeros((3, size), np.int32)
    mine, places, targets = [], [], []
    for i, (place, context, row) in enumerate(part):
        count = len(row.body)
        tokens[i, : count + 1] = (context[-1], *row.body)
        last[i, : len(row.last)] = list(row.last)
        owner[i], length[i], ends[i] = place, len(context) - 1, i * width + count
        mine += [i] * count
        places += range(i * width, i * width + count)
        targets += row.body
    # If no body has tokens, the head is applied to the ends only.
    filling = (0, (_few(len(mine), 16) if mine else 0) - len(mine))
    places, targets = (
        np.pad(np.array(x, np.int32), filling) for x in (places, targets)
    )
    scores, right, sure, last_scores, best, told = arrays.fetch(
        _end(*run, cache, owner, length, tokens, places, targets, ends, last)
    )
    used = slice(0, len(mine))
    body = np.bincount(mine, scores[used], size)
    told = told & (np.bincount(mine, ~sure[used], size) == 0)
    greedy = np.bincount(mine, ~right[used], size) == 0
    for i, (_, _, row) in enumerate(part):
        for k, (token, where) in enumerate(row.last.items()):
            for r, c in where:
                value = body[i] + last_scores[i, k] if told[i] else np.nan
                out[r].log_likelihoods[c] = value
                out[r].greedy[c] = greedy[i] and best[i] == token
