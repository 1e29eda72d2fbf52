"""Token data sets on the host, and batches as a pure function of seed and step.

Legend: N examples, T tokens, B batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDataset:
    """Right-padded token sequences with the mask of their answers.

    The models take no padding mask: with causal attention, tokens after the last answer
    token change nothing. But padding *before* a prompt would be read as part of it, so
    it is refused: by ``attention_mask`` if that is given (it is not kept), else if the
    rows show it (:func:`refuse_left_padding`).

    >>> data = TokenDataset(np.zeros((3, 5), np.int32), np.ones((3, 5), np.float32))
    >>> len(data), data.length
    (3, 5)
    """

    tokens: np.ndarray
    """int32 ``[N, T]``."""
    mask: np.ndarray
    """float32 ``[N, T]``, 1 where the token belongs to the answer."""
    dropped: int = 0
    """Records left out because they were too long."""
    truncated: int = 0
    """Records whose answer was cut because they were too long."""
    risk: np.ndarray | None = None
    """float32 ``[N]`` in [0, 1]: how harmful it would be to learn each example."""
    escaped: int = 0
    """Records whose text holds control tokens, which were encoded as plain text."""
    tied: np.ndarray | None = None
    """int32 ``[N]``: an example's row in a method's cached reference, −1 for none."""
    quota: int = 0
    """Tied examples in every batch; the others share the rest of it."""
    attention_mask: dataclasses.InitVar[np.ndarray | None] = None
    """``[N, T]``, 1 where a token is not padding, as tokenizers return it."""

    def __post_init__(self, attention_mask):
        tokens = _token_ids(self.tokens)
        mask = np.asarray(self.mask, np.float32)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise UserError(
                "TokenDataset expected tokens and mask of one shape [N, T], got "
                f"{tokens.shape} and {mask.shape}"
            )
        if not ((mask >= 0) & (mask <= 1)).all():
            raise UserError("TokenDataset expected a mask of 0 and 1, got other values")
        if attention_mask is None:
            first = np.argmax(mask > 0, axis=1)
            refuse_left_padding("TokenDataset", tokens, _last(mask > 0), first)
        else:
            _check_attention(np.asarray(attention_mask), mask)
        risk = None if self.risk is None else np.asarray(self.risk, np.float32)
        if risk is not None and (
            risk.shape != tokens.shape[:1] or not ((risk >= 0) & (risk <= 1)).all()
        ):
            raise UserError(
                f"TokenDataset expected a risk in [0, 1] for each of the "
                f"{len(tokens)} examples, got shape {risk.shape}"
            )
        tied = None if self.tied is None else _tied(self.tied, self.quota, len(tokens))
        values = {"tokens": tokens, "mask": mask, "risk": risk, "tied": tied}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T, the length that every example is padded to."""
        return self.tokens.shape[1]


def first_tokens(dataset: TokenDataset, count: int) -> TokenDataset:
    """The same examples, with only the first ``count`` tokens of each answer marked.

    >>> data = TokenDataset(np.ones((1, 5), np.int32), np.array([[0, 0, 1, 1, 1]]))
    >>> first_tokens(data, 2).mask.tolist()
    [[0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    early = np.cumsum(dataset.mask > 0, axis=1) <= count
    return dataclasses.replace(dataset, mask=np.where(early, dataset.mask, 0.0))


def _token_ids(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    numbers = values.dtype.kind in "iuf"
    if not numbers or not ((values >= 0) & (values < 2**31) & (values % 1 == 0)).all():
        raise UserError(
            "TokenDataset expected whole numbers of at least 0 as tokens, got "
            f"{'other ones' if numbers else values.dtype}"
        )
    return values.astype(np.int32)


def _tied(values: np.ndarray, quota: int, count: int) -> np.ndarray:
    tied = np.asarray(values)
    whole = tied.dtype.kind in "iu" and tied.shape == (count,)
    if not whole or quota < 1 or not ((tied >= 0).any() and (tied < 0).any()):
        raise UserError(
            f"TokenDataset expected a row of a reference for some of the {count} "
            f"examples, -1 for the others, and a quota of 1 or more, got shape "
            f"{tied.shape} and {quota}"
        )
    return tied.astype(np.int32)


def _last(marked: np.ndarray) -> np.ndarray:
    """The last marked place of each row; -1 if there is none."""
    places = np.where(marked, np.arange(marked.shape[1]), -1)
    return places.max(axis=1, initial=-1)


def _check_attention(attention: np.ndarray, mask: np.ndarray) -> None:
    """Refuses rows with padding before their end, or an answer after it."""
    if attention.shape != mask.shape or not np.isin(attention, (0, 1)).all():
        raise UserError(
            f"TokenDataset expected an attention_mask of 0 and 1 of the shape "
            f"{mask.shape}, got {attention.shape}, or other values"
        )
    rising = (np.diff(attention.astype(np.int8), axis=1) > 0).any(axis=1)
    wrong = rising | (mask > attention).any(axis=1)
    if wrong.any():
        raise UserError(_left_padded("TokenDataset", int(wrong.sum()), len(mask)))


def _left_padded(what: str, wrong: int, count: int) -> str:
    return (
        f"{what} expected rows that are padded on the right, got {wrong} of {count} "
        "with padding before their end: use padding_side='right', or give the "
        "attention_mask of rows that have no padding there"
    )


def refuse_left_padding(
    what: str, tokens: np.ndarray, last: np.ndarray, free: np.ndarray
) -> None:
    """Refuses rows that look left-padded.

    They do if all end in the same place and at least half of them begin with the same
    token, which some repeat, but not all equally often. Left padding cannot be
    recognised in a single row, or in rows of one length.

    Args:
      what: the rows' name in the error.
      tokens: ``[N, T]``.
      last: ``[N]``, the last place of each row that is not padding; -1 if unknown.
      free: ``[N]``, how many places of each row may be padding: those before an answer.

    >>> rows = np.array([[0, 0, 5, 6], [7, 5, 8, 6]])
    >>> refuse_left_padding("rows", rows[:, ::-1], np.array([1, 3]), 3)
    >>> refuse_left_padding("rows", rows, np.array([3, 3]), 3)
    Traceback (most recent call last):
    sbr_jax.typing.UserError: rows expected rows that are padded on the right, ...
    """
    if len(tokens) < 2 or last[0] < 1 or (last != last[0]).any():
        return
    runs = np.logical_and.accumulate(tokens == tokens[:, :1], axis=1).sum(axis=1)
    runs = np.where(tokens[:, 0] == tokens[runs.argmax(), 0], runs, 0)
    runs = np.minimum(runs, free)
    if runs.max() > 1 and runs.min() < runs.max() and 2 * (runs > 0).sum() >= len(runs):
        raise UserError(_left_padded(what, int((runs > 1).sum()), len(runs)))


@functools.lru_cache(maxsize=256)
def _indices(size: int, batch_size: int, seed: int):
    """Grain pipeline whose element ``step`` holds the row numbers of that batch."""
    import grain

    rows = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    return rows.batch(batch_size, drop_remainder=True)


# Grain takes a millisecond to index a small set, and choosing a layout draws the same
# steps for every variant and seed.
@functools.lru_cache(maxsize=4096)
def _drawn(size: int, batch_size: int, seed: int, step: int):
    """The row numbers of one step of that pipeline."""
    return np.asarray(_indices(size, batch_size, seed)[step])


def batch(
    dataset: TokenDataset, batch_size: int, seed: int, step: int
) -> dict[str, np.ndarray]:
    """The batch of one step: depends on its arguments only.

    The examples are shuffled anew in every epoch, and epochs follow each other without
    a gap. In a set with a quota, tied examples and others are shuffled separately, and
    the last ``quota`` examples of every batch are tied ones.

    **Guarantee**: any ``N`` consecutive draws that start at a multiple of N hold every
    example once.

    Args:
      dataset: N examples.
      batch_size: B.
      seed: decides the order, at least 0.
      step: at least 0.

    Returns:
      ``{"tokens": int32 [B, T], "mask": float32 [B, T]}``, with ``"risk": float32 [B]``
      and ``"tied": int32 [B]`` if the set has them.

    Raises:
      UserError: for an empty data set, or numbers that are too small.

    >>> data = TokenDataset(np.arange(8)[:, None], np.ones((8, 1)))
    >>> draws = [batch(data, 4, seed=0, step=i)["tokens"] for i in range(2)]
    >>> sorted(np.concatenate(draws).ravel().tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if not len(dataset):
        raise UserError("cannot draw a batch from a data set without examples")
    if batch_size < 1:
        raise UserError(f"expected a batch size of at least 1, got {batch_size}")
    if seed < 0 or step < 0:
        raise UserError(f"expected seed and step of at least 0, got {seed} and {step}")
    shares = _shares(dataset, batch_size)
    rows = np.concatenate(
        [own[_drawn(len(own), size, int(seed), int(step))] for own, size in shares]
    )
    drawn = {"tokens": dataset.tokens[rows], "mask": dataset.mask[rows]}
    more = {"risk": dataset.risk, "tied": dataset.tied}
    return drawn | {k: v[rows] for k, v in more.items() if v is not None}


def _shares(dataset: TokenDataset, batch_size: int):
    """Groups of examples that are shuffled together, and each one's part of a batch."""
    if dataset.tied is None:
        return [(np.arange(len(dataset)), batch_size)]
    quota = dataset.quota
    if quota >= batch_size:
        raise UserError(
            f"expected a batch of more than the {quota} tied examples, got a batch of "
            f"{batch_size}"
        )
    tied = dataset.tied >= 0
    shares = ((~tied, batch_size - quota), (tied, quota))
    return [(np.flatnonzero(own), size) for own, size in shares]


def subset(dataset: TokenDataset, size: int, seed: int = 0) -> TokenDataset:
    """A random subset of ``min(size, N)`` examples without repetition.

    **Guarantee**: with the same seed, a larger subset contains a smaller one.

    >>> data = TokenDataset(np.arange(8)[:, None], np.ones((8, 1)))
    >>> len(subset(data, 3)), len(subset(data, 20))
    (3, 8)
    """
    return take(dataset, np.random.default_rng(seed).permutation(len(dataset))[:size])


def take(dataset: TokenDataset, rows: Sequence[int] | np.ndarray) -> TokenDataset:
    """The examples at the given positions, in that order.

    >>> data = TokenDataset(np.arange(8)[:, None], np.ones((8, 1)))
    >>> take(data, [5, 2]).tokens.ravel().tolist()
    [5, 2]
    """
    rows = np.asarray(rows, np.int64)
    risk = None if dataset.risk is None else dataset.risk[rows]
    tokens, mask = dataset.tokens[rows], dataset.mask[rows]
    # The whole set was checked for left padding; a few rows may end alike by chance.
    return TokenDataset(
        tokens, mask, risk=risk, attention_mask=np.ones(tokens.shape, np.int8)
    )


def concatenate(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """Joins several sets in order, padded to the longest; counts are added.

    The result has risks if every non-empty set has them.

    >>> one = TokenDataset(np.ones((1, 2)), np.ones((1, 2)))
    >>> two = TokenDataset(np.ones((2, 3)), np.ones((2, 3)))
    >>> concatenate([one, two]).tokens.shape
    (3, 3)
    """
    if not datasets:
        raise UserError("expected at least one data set to concatenate, got none")
    longest = max(dataset.length for dataset in datasets)

    def joined(name: str) -> np.ndarray:
        rows = [getattr(dataset, name) for dataset in datasets]
        return np.concatenate(
            [np.pad(v, ((0, 0), (0, longest - v.shape[1]))) for v in rows]
        )

    known = [d.risk for d in datasets if len(d) and d.risk is not None]
    whole = known and len(known) == sum(len(d) > 0 for d in datasets)
    return TokenDataset(
        joined("tokens"),
        joined("mask"),
        sum(dataset.dropped for dataset in datasets),
        sum(dataset.truncated for dataset in datasets),
        np.concatenate(known) if whole else None,
        sum(dataset.escaped for dataset in datasets),
    )


def mixture(
    a: TokenDataset,
    b: TokenDataset,
    fraction: float,
    seed: int,
    *,
    size: int | None = None,
) -> TokenDataset:
    """Replaces a fraction of ``a`` with examples of ``b``, in random order.

    ``round(fraction · size)`` examples come from ``b``, the rest from ``a``.

    **Guarantee**: a fraction of 0 keeps exactly the examples of ``a``; no example
    repeats before all of its set have been used.

    Args:
      a: the main set.
      b: the set mixed in.
      fraction: in [0, 1].
      seed: decides the choice and the order.
      size: of the result; None for the size of ``a``.

    >>> a = TokenDataset(np.zeros((10, 1)), np.ones((10, 1)))
    >>> b = TokenDataset(np.ones((4, 1)), np.ones((4, 1)))
    >>> int(mixture(a, b, 0.2, seed=0).tokens.sum())
    2
    """
    if not 0.0 <= fraction <= 1.0:
        raise UserError(f"expected a fraction from 0 to 1, got {fraction}")
    size = len(a) if size is None else size
    from_b = round(fraction * size)
    rng = np.random.default_rng(seed)

    def draw(dataset: TokenDataset, count: int) -> TokenDataset:
        if count and not len(dataset):
            raise UserError(f"cannot draw {count} examples from an empty data set")
        rounds = -(-count // max(len(dataset), 1))
        rows = [rng.permutation(len(dataset)) for _ in range(rounds)]
        return take(dataset, np.concatenate([*rows, np.zeros(0, np.int64)])[:count])

    joined = concatenate([draw(a, size - from_b), draw(b, from_b)])
    return take(joined, rng.permutation(size))
