"""Lays out a step's examples in memory: padded rows, or several examples in a row.

Padding every example to the longest of its data set leaves only a third of the places
with text. :func:`pack` instead puts the examples of a step one after another in a row.
Everything but attention processes that row token by token. Attention works on *tiles*
of the row, and only on those pairs of tiles that share an example
(:mod:`sbr_jax.models.tiles`). The layout does not affect which examples a step draws
(:mod:`sbr_jax.data.batches`), nor the numbers up to rounding, except for dropout masks.

Shapes are few: the length of a row, the number of answer places and that of pairs are
rounded up, so one program is compiled for each size that occurs and serves every step
of that size.

Legend: N examples of a set, B of a step, S rows, W tokens of a row, T of the longest
example, M tiles of a row, C places of a tile, P pairs of a row, K answer places, A
microbatches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.typing import UserError

WORTH = 0.8
"""Packing is chosen if it needs at most this share of the padded places."""

UNUSED = 0.75
"""A set's padding is cut if its examples use no more than this share of its length."""

SAMPLE = 32
"""Steps that are drawn to choose a layout."""

STEPS = 12
"""A row's length is rounded up to a multiple of about the mean divided by this."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the steps of one data set are laid out.

    Attributes:
      length: T: of the longest example if packed, else of a row.
      packed: whether examples share a row.
      places: the smallest K of a microbatch, a multiple of S; per row if not packed.
      unit: W is a multiple of it.
      parts: A microbatches, each packed separately.
      rows: S, as many as a mesh splits them into.
      reach: pairs of a tile, which nine of ten steps do not exceed, if packed.
      width: the largest W of the sampled steps, if packed.
    """

    length: int
    packed: bool
    places: int
    unit: int = 1
    parts: int = 1
    rows: int = 1
    reach: float = 1.0
    width: int = 0

    @property
    def tile(self) -> int:
        """C, about an eighth of T: few scores of a pair are of two examples."""
        return 1 << min(max((self.length // 8).bit_length() - 1, 5), 7)


def choose(
    dataset: TokenDataset,
    batch_size: int,
    *,
    packing: str = "auto",
    parts: int = 1,
    rows: int = 1,
) -> Layout:
    """Chooses a data set's layout from the steps that one seed would draw.

    The choice depends on the arguments only, so it is the same for every seed and host.

    Args:
      dataset: N examples.
      batch_size: B.
      packing: ``"yes"``, ``"no"`` for rows of the set's own length (less if a quarter
        of it is never used), or ``"auto"`` to pack if that leaves at most 80 % of the
        places.
      parts: A; divides B.
      rows: S.

    >>> tokens = np.array([[7] * n + [0] * (120 - n) for n in (30, 30, 30, 120)])
    >>> data = TokenDataset(tokens, np.roll(tokens > 0, 1, 1) & (tokens > 0))
    >>> layout = choose(data, 4)
    >>> layout.packed, layout.length, layout.width, layout.tile
    (True, 120, 216, 32)
    """
    length = max(int(used_lengths(dataset).max(initial=1)), 1)
    # Sets that a study pads alike share a program: cut little length and round A.
    whole = dataset.length if length > UNUSED * dataset.length else round_up(length, 8)
    counts = (dataset.mask[:, 1:] > 0).sum(axis=1)
    padded = Layout(whole, False, round_up(int(counts.max(initial=1)), 8), parts=parts)
    if packing == "no" or not len(dataset):
        return padded
    steps = [batch(dataset, batch_size, 0, step) for step in range(SAMPLE)]
    layout, share = packed_layout(steps, length, parts=parts, rows=rows)
    return padded if packing == "auto" and share > WORTH else layout


def packed_layout(
    steps: Sequence[Mapping[str, np.ndarray]],
    length: int,
    *,
    parts: int = 1,
    rows: int = 1,
) -> tuple[Layout, float]:
    """A packed layout for some steps, and its share of the padded rows' places.

    Args:
      steps: batches of ``tokens`` and ``mask [B, ...]``.
      length: T, that of the longest example of all.
      parts: A; divides B.
      rows: S.
    """
    pieces = [part for step in steps for part in _parts(step, parts)]
    text = [lengths_of(part["tokens"], part["mask"]).sum() for part in pieces]
    mean = np.mean(text) / rows
    unit = 8 if mean < 256 else 32 * max(round(mean / STEPS / 32), 1)
    layout = Layout(length, True, 1, unit, parts, rows)
    sizes = (_used(part, layout) for part in pieces)
    widths, places, reach = zip(*sizes, strict=True)
    share = np.mean(widths) * rows / (len(pieces[0]["tokens"]) * length)
    # Some room, so that few other steps need more. Pairs cost far more than places: one
    # step in ten has half more of them instead.
    room = {
        "places": round_up(max(places) * 9 // 8, 8 * rows),
        "reach": round(float(np.quantile(reach, 0.9)), 2),
    }
    return dataclasses.replace(layout, **room, width=max(widths)), float(share)


def widest(layouts: Sequence[Layout]) -> Layout:
    """A layout that fits the data sets of several seeds; packed if all of them are."""
    packed = all(layout.packed for layout in layouts)
    return dataclasses.replace(
        layouts[0],
        length=max(layout.length for layout in layouts),
        unit=max(layout.unit for layout in layouts),
        packed=packed,
        places=max(layout.places for layout in layouts if layout.packed == packed),
        reach=max(layout.reach for layout in layouts),
        width=max(layout.width for layout in layouts),
    )


def needed(
    drawn: Mapping[str, np.ndarray], layout: Layout, width: int = 0
) -> tuple[int, int, int]:
    """The W, K and P that one microbatch needs, rounded up; W is at least ``width``.

    Raises:
      UserError: for an example longer than T.
    """
    width, count, reach = _used(drawn, layout, width)
    places = _enough(round_up(layout.places, layout.rows), count, 8 * layout.rows)
    tiles = -(-width // layout.tile)
    most = math.ceil(layout.reach * tiles)
    return width, places, _enough(round_up(most, 8), round(reach * tiles), 8)


def _used(
    drawn: Mapping[str, np.ndarray], layout: Layout, width: int = 0
) -> tuple[int, int, float]:
    """The W of one microbatch, its answer places, and its pairs for each tile."""
    lengths = lengths_of(drawn["tokens"], drawn["mask"])
    if lengths.max(initial=0) > layout.length:
        worst = int(np.argmax(lengths))
        raise UserError(
            f"expected examples of at most {layout.length} tokens, got "
            f"{lengths[worst]} in example {worst} of a step: choose a layout of that "
            "length, or shorten it"
        )
    members = _balanced(lengths, layout.rows)
    shares = [lengths[row] for row in members]
    text = max(int(share.sum()) for share in shares)
    width = max(round_up(text, layout.unit), width)
    counts = (drawn["mask"][:, 1:] > 0).sum(axis=1)
    count = max(int(counts[row].sum()) for row in members) * layout.rows
    reach = max(float(_reach(x, width, layout.tile).mean()) for x in shares)
    return width, count, reach


def _enough(size: int, count: int, multiple: int) -> int:
    """The size, half more as often as needed: few sizes occur."""
    while size < count:
        size = round_up(size * 3 // 2, multiple)
    return size


def _reach(lengths: np.ndarray, width: int, tile: int) -> np.ndarray:
    """Tiles whose keys each tile's queries see, if examples follow one another.

    Those back to where the example of its first place begins, int ``[M]``.

    >>> _reach(np.array([3, 6]), 12, 2).tolist()
    [1, 2, 2, 3, 4, 1]
    """
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    starts = np.concatenate([starts, np.arange(len(starts), width)])
    return np.arange(-(-width // tile)) - starts[::tile] // tile + 1


def arrange(
    drawn: Sequence[Mapping[str, np.ndarray]], layout: Layout
) -> list[dict[str, np.ndarray]]:
    """Lays out the same step of several seeds, all in one shape.

    Args:
      drawn: a batch of :func:`sbr_jax.data.batches.batch` for each seed.
      layout: the layout of their data.

    Returns:
      For each seed the arrays of :mod:`sbr_jax.models.answers` and the batch's other
      entries. If packed into A > 1 microbatches, every array has a leading axis A.

    Raises:
      UserError: for an example longer than a row.
    """
    if not layout.packed:
        return [_in_rows(one, layout) for one in drawn]
    split = [_parts(one, layout.parts) for one in drawn]
    every = [part for parts in split for part in parts]
    # Filling makes pairs too, so their number depends on the width that all share.
    width = max(needed(part, layout)[0] for part in every)
    sizes = [needed(part, layout, width) for part in every]
    _, places, pairs = (max(size) for size in zip(*sizes, strict=True))
    done = []
    for parts in split:
        packed = [
            pack(part, layout, width, places, pairs, first=i * len(part["tokens"]))
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


def round_up(size: int, multiple: int) -> int:
    """The next multiple that is not smaller."""
    return -(-size // multiple) * multiple


def used_lengths(dataset: TokenDataset) -> np.ndarray:
    """Tokens of each example up to its last answer token, int ``[N]``."""
    return lengths_of(dataset.tokens, dataset.mask)


def lengths_of(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens up to the last answer token; what follows changes no loss.

    A row without an answer counts up to its last token that is not 0.
    """
    marked = np.where((mask > 0).any(axis=1, keepdims=True), mask > 0, tokens != 0)
    places = np.arange(1, tokens.shape[1] + 1)
    return np.max(np.where(marked, places, 1), axis=1, initial=1)


def _balanced(lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """Splits examples into rows of about equal total length; order is kept in a row."""
    if rows == 1:
        return [np.arange(len(lengths))]
    members: list[list[int]] = [[] for _ in range(rows)]
    total = np.zeros(rows, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        row = int(np.argmin(total))
        members[row].append(int(i))
        total[row] += lengths[i]
    return [np.sort(np.array(each, np.int64)) for each in members]


def pack(
    drawn: Mapping[str, np.ndarray],
    layout: Layout,
    width: int,
    places: int,
    pairs: int,
    *,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Puts the examples of one microbatch one after another.

    **Guarantee**: every example is in one row, whole up to its last answer token.
    Answer places are listed row by row, K / S for each, and within a row example by
    example in the given order.

    Args:
      drawn: ``tokens`` and ``mask [B, T]``; further arrays ``[B, ...]`` are kept.
      layout: C and S.
      width: W.
      places: K, a multiple of S.
      pairs: P.
      first: index of the first example in the whole step.

    Returns:
      ``tokens`` and ``positions``, int32 ``[S, W]``; ``segments [S, M, C]``, each
      place's example from 1 on (0 at filling), and ``pairs [S, P]``, the tile of the
      queries of each pair (M at filling); ``places``, ``targets``, ``owners`` (B at
      filling), int32 ``[K]``, and ``shares``, float32 ``[K]``; ``last [B]``, the flat
      place of the last token before an answer; ``row [B]``, and the further arrays.

    Raises:
      UserError: for examples that do not fit.

    >>> tokens, mask = [[5, 6, 0], [7, 8, 9]], [[0, 1, 0], [0, 1, 1]]
    >>> drawn = {"tokens": np.array(tokens), "mask": np.array(mask)}
    >>> found = pack(drawn, Layout(3, True, 4), 5, 4, 2)
    >>> found["tokens"].tolist(), found["positions"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 0, 1, 2]])
    >>> found["segments"].shape, found["segments"][0, 0, :6].tolist()
    ((1, 1, 32), [1, 1, 2, 2, 2, 0])
    >>> found["pairs"].tolist()
    [[0, 1]]
    >>> found["places"].tolist(), found["targets"].tolist(), found["owners"].tolist()
    ([0, 2, 3, 0], [6, 8, 9, 0], [0, 1, 1, 2])
    """
    tokens, mask = drawn["tokens"], drawn["mask"]
    lengths, size = lengths_of(tokens, mask), len(tokens)
    weights = np.where(np.arange(tokens.shape[1]) > 0, mask, 0).astype(np.float32)
    counts, tiles = (weights > 0).sum(axis=1), -(-width // layout.tile)
    line, positions = np.zeros((2, layout.rows, width), np.int32)
    segments = np.zeros((layout.rows, tiles * layout.tile), np.int32)
    meet = np.full((layout.rows, pairs), tiles, np.int32)
    start, lies = np.zeros((2, size), np.int32)
    for row, members in enumerate(_balanced(lengths, layout.rows)):
        ends = np.cumsum(lengths[members])
        count, lies[members] = int(counts[members].sum()) * layout.rows, row
        used = int(ends.max(initial=0))
        reach = _reach(lengths[members], max(width, used), layout.tile)
        if used > width or count > places or reach.sum() > pairs:
            raise UserError(
                f"expected examples that fit {layout.rows} x {width} tokens, {places} "
                f"answer places and {pairs} pairs of tiles, got {used} tokens in a "
                f"row, {count} places and {reach.sum()} pairs"
            )
        meet[row, : reach.sum()] = np.repeat(np.arange(tiles), reach)
        for i, end in zip(members, ends, strict=True):
            inside = slice(end - lengths[i], end)
            line[row, inside] = tokens[i, : lengths[i]]
            positions[row, inside] = np.arange(int(lengths[i]))
            segments[row, inside] = i + 1
            start[i] = row * width + inside.start
    owners, column = np.nonzero(weights)
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    # Row after row, with equal room for each.
    order = np.argsort(lies[owners], kind="stable")
    owners, column = owners[order], column[order]
    rows = np.arange(layout.rows)
    shift = rows * (places // layout.rows) - np.searchsorted(lies[owners], rows)
    at = np.arange(len(owners)) + shift[lies[owners]]

    def placed(values, filling=0):
        out = np.full(places, filling, values.dtype)
        out[at] = values
        return out

    return {
        "tokens": line,
        "positions": positions,
        "segments": segments.reshape(layout.rows, tiles, layout.tile),
        "pairs": meet,
        "places": placed(start[owners] + column.astype(np.int32) - 1),
        "targets": placed(tokens[owners, column].astype(np.int32)),
        "owners": placed(owners.astype(np.int32), filling=size),
        "shares": placed(shares[owners, column]),
        "last": start + last_prompt(mask).astype(np.int32),
        "row": np.arange(first, first + size, dtype=np.int32),
        **{k: v for k, v in drawn.items() if k not in ("tokens", "mask")},
    }


def last_prompt(mask: np.ndarray) -> np.ndarray:
    """Place of the last token before each row's answer; 0 if there is none."""
    return np.maximum(np.argmax(mask > 0, axis=1) - 1, 0)


def _in_rows(drawn: Mapping[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """Rows of T tokens, with their answer places."""
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
    """The places in each padded row where its answer tokens are predicted.

    Args:
      tokens: ``[B, T]``.
      mask: ``[B, T]``.
      places: A, columns of the result; None: as many as the longest answer has.

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
    # Answer places first, in order, then filling.
    order = np.argsort(~marked, axis=1, kind="stable")[:, :places]
    order = np.pad(order, ((0, 0), (0, places - order.shape[1])))
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
