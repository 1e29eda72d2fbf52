"""Layout of a step's examples in memory: padded rows, or several to a row.

Padding every example to the longest of its data set leaves a third of the places with
text in them. :func:`pack` puts the examples of a step into as few rows as they need;
the model keeps them apart by segments, and counts positions anew in each. What is drawn
for a step does not depend on it (:mod:`sbr_jax.data.batches`), and neither do the
numbers, up to rounding.

Shapes are few: the number of rows and of answer places is rounded up to a grid, so a
program is compiled for each size that occurs and serves every step of that size.

Legend: N examples of a set, B of a step, T tokens of a row, R rows, K answer places, A
microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.typing import UserError

GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Numbers of rows; beyond, multiples of 16."""

WORTH = 0.8
"""Places that packing may keep, at most, of those that padding has, to be chosen."""

SAMPLE = 32
"""Steps that are looked at to choose a layout."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the steps of one data set are laid out.

    Attributes:
      length: T of a row.
      packed: several examples to a row.
      places: the least K that is used, of a microbatch; per row where not packed.
      parts: A microbatches, packed each on its own.
      multiple: R is a multiple of it, so that a mesh can split the rows.
    """

    length: int
    packed: bool
    places: int
    parts: int = 1
    multiple: int = 1


def choose(
    dataset: TokenDataset,
    batch_size: int,
    *,
    packing: str = "auto",
    parts: int = 1,
    multiple: int = 1,
) -> Layout:
    """The layout for a data set, from the steps that one seed would draw.

    It is a function of its arguments only, the same for every seed and on every host.

    Args:
      dataset: N examples.
      batch_size: B.
      packing: ``"yes"``, ``"no"``, or ``"auto"`` to pack where that leaves at most 80 %
        of the places.
      parts: A; divides B.
      multiple: of the number of rows.

    Returns:
      The layout.

    >>> lengths = [3, 3, 3, 12]
    >>> tokens = np.array([[7] * n + [0] * (12 - n) for n in lengths])
    >>> data = TokenDataset(tokens, np.roll(tokens > 0, 1, 1) & (tokens > 0))
    >>> choose(data, 4)
    Layout(length=12, packed=True, places=24, parts=1, multiple=1)
    """
    length = max(int(used_lengths(dataset).max(initial=1)), 1)
    counts = (dataset.mask[:, 1:] > 0).sum(axis=1)
    padded = Layout(length, False, max(int(counts.max(initial=1)), 1), parts)
    if packing == "no" or not len(dataset):
        return padded
    layout = Layout(length, True, 1, parts, multiple)
    rows, places = [], []
    for step in range(SAMPLE):
        for part in _parts(batch(dataset, batch_size, 0, step), parts):
            need = needed(part, layout)
            rows.append(need[0])
            places.append(need[1])
    share = np.mean(rows) / (batch_size // parts)
    if packing == "auto" and share > WORTH:
        return padded
    return dataclasses.replace(layout, places=_round(max(places), 8))


def widest(layouts: Sequence[Layout]) -> Layout:
    """The layout that the data sets of several seeds fit, packed where all are."""
    packed = all(layout.packed for layout in layouts)
    return dataclasses.replace(
        layouts[0],
        length=max(layout.length for layout in layouts),
        packed=packed,
        places=max(layout.places for layout in layouts if layout.packed == packed),
    )


def needed(drawn: Mapping[str, np.ndarray], layout: Layout) -> tuple[int, int]:
    """Rows and places that one microbatch takes, rounded up to the grid."""
    rows = len(_fitted(lengths_of(drawn["tokens"], drawn["mask"]), layout.length))
    rows = next((n for n in GRID if n >= rows), -(-rows // 16) * 16)
    rows = -(-rows // layout.multiple) * layout.multiple
    count, places = int((drawn["mask"][:, 1:] > 0).sum()), layout.places
    while places < count:
        places = _round(places * 3 // 2, 8)
    return rows, places


def arrange(
    drawn: Sequence[Mapping[str, np.ndarray]], layout: Layout
) -> list[dict[str, np.ndarray]]:
    """Lays out the same step of several seeds, all in one shape.

    Args:
      drawn: a batch of :func:`sbr_jax.data.batches.batch` for each seed.
      layout: of their data.

    Returns:
      For each seed the arrays of :mod:`sbr_jax.models.answers`, with the batch's other
      entries beside them. Where packed into A > 1 microbatches, every array has a
      leading axis A.

    Raises:
      UserError: for an example longer than a row.
    """
    if not layout.packed:
        return [_in_rows(one, layout) for one in drawn]
    split = [_parts(one, layout.parts) for one in drawn]
    sizes = [needed(part, layout) for parts in split for part in parts]
    rows, places = (max(size) for size in zip(*sizes, strict=True))
    done = []
    for parts in split:
        packed = [
            pack(part, layout.length, rows, places, first=i * len(part["tokens"]))
            for i, part in enumerate(parts)
        ]
        if layout.parts == 1:
            done.append(packed[0])
        else:
            done.append({k: np.stack([p[k] for p in packed]) for k in packed[0]})
    return done


def _parts(drawn: Mapping[str, np.ndarray], parts: int) -> list[dict[str, np.ndarray]]:
    size = len(drawn["tokens"]) // parts
    return [
        {name: x[i * size : (i + 1) * size] for name, x in drawn.items()}
        for i in range(parts)
    ]


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def used_lengths(dataset: TokenDataset) -> np.ndarray:
    """Tokens of each example up to its last answer token, int ``[N]``."""
    return lengths_of(dataset.tokens, dataset.mask)


def lengths_of(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens up to the last of an answer; what follows changes no loss.

    A row without an answer counts to its last token that is not 0.
    """
    marked = np.where((mask > 0).any(axis=1, keepdims=True), mask > 0, tokens != 0)
    places = np.arange(1, tokens.shape[1] + 1)
    return np.max(np.where(marked, places, 1), axis=1, initial=1)


def _fitted(lengths: np.ndarray, row: int) -> list[list[int]]:
    """First fit, longest first: the examples of each row."""
    if lengths.max(initial=0) > row:
        worst = int(np.argmax(lengths))
        raise UserError(
            f"expected examples of at most {row} tokens, got {lengths[worst]} in "
            f"example {worst} of a step: give rows of that length, or shorten it"
        )
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if at is None:
            at = len(rows)
            rows.append([])
            free.append(row)
        rows[at].append(i)
        free[at] -= int(lengths[i])
    return rows


def pack(
    drawn: Mapping[str, np.ndarray],
    length: int,
    rows: int,
    places: int,
    *,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Puts the examples of one microbatch into rows.

    **Guarantee**: every example is in one row, whole up to its last answer token, and
    the answer places are listed example by example in the given order.

    Args:
      drawn: ``tokens`` and ``mask [B, T]``; further arrays ``[B, ...]`` are kept.
      length: T of a row.
      rows: R.
      places: K.
      first: number of the first example in the whole step.

    Returns:
      ``tokens``, ``segments`` (0 at filling) and ``positions``, int32 ``[R, T]``;
      ``places``, ``targets``, ``owners`` (B at filling), int32 ``[K]``, and ``shares``,
      float32 ``[K]``; ``last [B]``, the flat place of the last token before an answer;
      ``row [B]``, and the further arrays.

    Raises:
      UserError: for an example longer than a row, or more than fit.

    >>> tokens, mask = [[5, 6, 0], [7, 8, 9]], [[0, 1, 0], [0, 1, 1]]
    >>> found = pack({"tokens": np.array(tokens), "mask": np.array(mask)}, 5, 1, 4)
    >>> found["tokens"].tolist(), found["positions"].tolist()
    ([[7, 8, 9, 5, 6]], [[0, 1, 2, 0, 1]])
    >>> found["places"].tolist(), found["targets"].tolist(), found["owners"].tolist()
    ([3, 0, 1, 0], [6, 8, 9, 0], [0, 1, 1, 2])
    """
    tokens, mask = drawn["tokens"], drawn["mask"]
    lengths, size = lengths_of(tokens, mask), len(tokens)
    fitted = _fitted(lengths, length)
    weights = np.where(np.arange(tokens.shape[1]) > 0, mask, 0).astype(np.float32)
    count = int((weights > 0).sum())
    if len(fitted) > rows or count > places:
        raise UserError(
            f"expected examples that fit {rows} rows and {places} answer places, got "
            f"{size} that need {len(fitted)} and {count}"
        )
    grid = {
        name: np.zeros((rows, length), np.int32)
        for name in ("tokens", "segments", "positions")
    }
    start = np.zeros(size, np.int32)
    for r, members in enumerate(fitted):
        at = 0
        for i in members:
            inside = slice(at, at + int(lengths[i]))
            grid["tokens"][r, inside] = tokens[i, : lengths[i]]
            grid["segments"][r, inside] = i + 1
            grid["positions"][r, inside] = np.arange(lengths[i])
            start[i] = r * length + at
            at = inside.stop
    owners, column = np.nonzero(weights)
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    filling = (0, places - count)
    return {
        **grid,
        "places": np.pad(start[owners] + column.astype(np.int32) - 1, filling),
        "targets": np.pad(tokens[owners, column].astype(np.int32), filling),
        "owners": np.pad(owners.astype(np.int32), filling, constant_values=size),
        "shares": np.pad(shares[owners, column], filling),
        "last": start + last_prompt(mask).astype(np.int32),
        "row": np.arange(first, first + size, dtype=np.int32),
        **{k: v for k, v in drawn.items() if k not in ("tokens", "mask")},
    }


def last_prompt(mask: np.ndarray) -> np.ndarray:
    """Place of the last token before each row's answer; 0 where there is none."""
    return np.maximum(np.argmax(mask > 0, axis=1) - 1, 0)


def _in_rows(drawn: Mapping[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """Rows of T tokens: what follows the longest answer of the set is left out."""
    short = max(layout.length - drawn["tokens"].shape[1], 0)
    tokens, mask = (
        np.pad(drawn[name], ((0, 0), (0, short)))[:, : layout.length]
        for name in ("tokens", "mask")
    )
    places = answer_places(tokens, mask, layout.places)
    return {**drawn, "tokens": tokens, "mask": mask, **places}


def answer_places(
    tokens: np.ndarray, mask: np.ndarray, places: int | None = None
) -> dict[str, np.ndarray]:
    """Where the answers of padded rows are predicted, inside each row.

    Args:
      tokens: ``[B, T]``.
      mask: ``[B, T]``.
      places: A, columns of the result; None for as many as the longest answer has.

    Returns:
      ``places`` and ``targets``, int32 ``[B, A]``, and ``shares``, float32 ``[B, A]``,
      0 at filling.

    >>> found = answer_places(np.array([[5, 6, 7]]), np.array([[0, 0, 1]]), 2)
    >>> found["places"].tolist(), found["targets"].tolist(), found["shares"].tolist()
    ([[1, 0]], [[7, 0]], [[1.0, 0.0]])
    """
    weights = np.where(np.arange(tokens.shape[1]) > 0, mask, 0).astype(np.float32)
    marked = weights > 0
    counts = marked.sum(axis=1)
    places = max(int(counts.max(initial=1)), 1) if places is None else places
    # Answer places first, in order; the rest is filling.
    order = np.argsort(~marked, axis=1, kind="stable")[:, :places]
    real = np.arange(order.shape[1]) < counts[:, None]
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    picked = {
        "places": order - 1,
        "targets": np.take_along_axis(tokens, order, axis=1),
        "shares": np.take_along_axis(shares, order, axis=1),
    }
    kinds = {"places": np.int32, "targets": np.int32, "shares": np.float32}
    return {
        name: np.where(real, value, 0).astype(kinds[name])
        for name, value in picked.items()
    }


def by_length(
    dataset: TokenDataset, size: int, *, least: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """All examples in batches of neighbours in length, none padded by half or more.

    Args:
      dataset: N examples.
      size: the most examples of a batch.
      least: fewer of one length go with the next longer ones, so that a program is not
        compiled for a few.

    Yields:
      ``tokens``, ``mask`` and what :func:`answer_places` gives, each with a leading
      axis of examples; shorter ones first, in their order. Batches of one length have
      one shape, but for the last's number of examples.

    >>> tokens = np.ones((5, 40), np.int32)
    >>> mask = np.arange(40) == np.array([[9], [35], [9], [9], [9]])
    >>> [b["tokens"].shape for b in by_length(TokenDataset(tokens, mask), 3)]
    [(3, 10), (1, 10), (1, 36)]
    """
    lengths = used_lengths(dataset)
    sizes = np.array([_length_bucket(int(n)) for n in lengths])
    groups: list[np.ndarray] = []
    waiting = np.zeros(0, np.int64)
    for each in sorted(set(sizes.tolist())):
        waiting = np.sort(np.concatenate([waiting, np.flatnonzero(sizes == each)]))
        if len(waiting) >= least:
            groups.append(waiting)
            waiting = waiting[:0]
    if len(waiting):
        # The longest are too few: they go with those before them.
        joined = [groups.pop()] if groups else []
        groups.append(np.sort(np.concatenate([*joined, waiting])))
    for group in groups:
        length = int(lengths[group].max())
        tokens, mask = dataset.tokens[group, :length], dataset.mask[group, :length]
        parts = {"tokens": tokens, "mask": mask, **answer_places(tokens, mask)}
        for start in range(0, len(group), size):
            yield {name: x[start : start + size] for name, x in parts.items()}


def _length_bucket(length: int) -> int:
    """1 or 1.5 times a power of two: none in a bucket is half as long as another."""
    power = 1 << max(length - 1, 0).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


__all__ = [
    "Layout",
    "answer_places",
    "arrange",
    "by_length",
    "choose",
    "last_prompt",
    "lengths_of",
    "needed",
    "pack",
    "used_lengths",
    "widest",
]
