"""Rows that hold several examples: nothing is lost, moved between examples, or cut."""

import numpy as np
import pytest

from sbr_jax.data import TokenDataset
from sbr_jax.data.batches import batch
from sbr_jax.data.by_length import by_length
from sbr_jax.data.layout import (
    Layout,
    answer_places,
    arrange,
    choose,
    lengths_of,
    needed,
    pack,
    used_lengths,
    widest,
)
from sbr_jax.typing import UserError


def ragged(seed, size=40, longest=30, answers=6):
    """Examples of many lengths; a few have gaps in their answer, or none at all."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((size, longest), np.int32)
    mask = np.zeros((size, longest), np.float32)
    for row in range(size):
        length = int(rng.integers(4, longest + 1))
        tokens[row, :length] = rng.integers(1, 50, length)
        first = max(1, length - int(rng.integers(1, answers + 1)))
        mask[row, first:length] = 1
        if row % 5 == 3:
            mask[row, first] = 0
        if row % 11 == 7:
            mask[row] = 0
    return TokenDataset(tokens, mask, attention_mask=np.ones_like(tokens))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_packing_keeps_every_example_whole_and_apart(seed, rows):
    data = ragged(seed)
    drawn = batch(data, 16, seed, 0)
    layout = choose(data, 16, packing="yes", rows=rows)
    (found,) = arrange([drawn], layout)
    width = found["tokens"].shape[1]
    sizes = width, found["places"].size, found["pairs"].shape[1]
    assert sizes == needed(drawn, layout)
    tokens, positions = found["tokens"], found["positions"]
    segments = found["segments"].reshape(rows, -1)
    lengths = lengths_of(drawn["tokens"], drawn["mask"])
    for i, size in enumerate(lengths):
        (row,) = set(np.nonzero(segments == i + 1)[0])
        at = np.flatnonzero(segments[row] == i + 1)
        # One run of the row, in order, from position 0.
        assert at.tolist() == list(range(at[0], at[0] + size))
        assert tokens[row, at].tolist() == drawn["tokens"][i, :size].tolist()
        assert positions[row, at].tolist() == list(range(size))
        first = row * width + at[0]
        marked = np.flatnonzero(drawn["mask"][i])
        mine = found["owners"] == i
        assert found["places"][mine].tolist() == (first + marked - 1).tolist()
        assert found["targets"][mine].tolist() == drawn["tokens"][i, marked].tolist()
        np.testing.assert_allclose(found["shares"][mine].sum(), float(marked.size > 0))
        prompt = marked[0] - 1 if marked.size else 0
        assert found["last"][i] == first + prompt
    assert (segments > 0).sum() == lengths.sum()
    assert (found["shares"][found["owners"] == 16] == 0).all()
    assert found["row"].tolist() == list(range(16))


@pytest.mark.parametrize("longest", [30, 200, 700])
def test_pairs_are_those_tiles_that_share_an_example(longest):
    data = ragged(8, longest=longest)
    layout = choose(data, 8, packing="yes", rows=2)
    (found,) = arrange([batch(data, 8, 0, 0)], layout)
    for segments, pairs in zip(found["segments"], found["pairs"], strict=True):
        tiles = range(len(segments))
        own = [set(tile[tile > 0].tolist()) for tile in segments]
        # Back to where the example of a tile's first place begins, and no further.
        wanted = [
            i for i in tiles for j in range(i + 1) if i == j or segments[i, 0] in own[j]
        ]
        assert pairs[pairs < len(segments)].tolist() == wanted
        assert (pairs[len(wanted) :] == len(segments)).all()


def test_microbatches_are_packed_apart_and_several_seeds_share_a_shape():
    data = ragged(0)
    layout = choose(data, 16, packing="yes", parts=4)
    drawn = [batch(data, 16, seed, 0) for seed in range(3)]
    found = arrange(drawn, layout)
    shapes = {tuple((k, v.shape) for k, v in sorted(one.items())) for one in found}
    assert len(shapes) == 1
    assert found[0]["tokens"].shape[0] == 4
    assert found[0]["row"].tolist() == np.arange(16).reshape(4, 4).tolist()
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        answered = drawn[0]["tokens"][rows][drawn[0]["mask"][rows] > 0]
        real = found[0]["owners"][part] < 4
        assert found[0]["targets"][part][real].tolist() == answered.tolist()


def test_seeds_of_unequal_steps_share_the_wider_ones_shape():
    """Filling makes pairs: a short step in a wide row needs more than in its own."""
    data = ragged(9, size=64, longest=400)
    order = np.argsort(used_lengths(data))
    drawn = [
        {"tokens": data.tokens[rows], "mask": data.mask[rows]}
        for rows in (order[:8], order[-8:])
    ]
    layout = Layout(400, True, 8, unit=8, reach=0.1)
    assert needed(drawn[0], layout)[0] < 0.5 * needed(drawn[1], layout)[0]
    short, long = arrange(drawn, layout)
    assert short["pairs"].shape == long["pairs"].shape
    tiles = short["segments"].shape[1]
    met = np.bincount(short["pairs"][0], minlength=tiles + 1)[:tiles]
    assert met.min() == 1
    alone, _, pairs = needed(drawn[0], layout)
    assert met.sum() > pairs
    assert tiles * layout.tile > alone


@pytest.mark.parametrize(("longest", "fill"), [(64, 0.9), (400, 0.9), (30, 0.85)])
def test_layout_is_a_function_of_data_and_sizes_and_shapes_are_few(longest, fill):
    data = ragged(3, size=200, longest=longest)
    layout = choose(data, 16)
    assert layout.packed
    assert layout == choose(data, 16)
    draws = [batch(data, 16, seed, step) for seed in range(4) for step in range(50)]
    shapes = [needed(drawn, layout) for drawn in draws]
    assert len(set(shapes)) <= 16
    text = np.mean([lengths_of(d["tokens"], d["mask"]).sum() for d in draws])
    assert text / np.mean([width for width, _, _ in shapes]) > fill


def test_rows_of_one_length_are_not_packed():
    tokens = np.arange(1, 41, dtype=np.int32).reshape(4, 10)
    data = TokenDataset(tokens, np.arange(10) > 5 + np.zeros((4, 1)))
    layout = choose(data, 4)
    assert layout == Layout(10, False, 8)
    (found,) = arrange([batch(data, 4, 0, 0)], layout)
    assert found["tokens"].shape == (4, 10)
    assert "segments" not in found


@pytest.mark.parametrize(("more", "length"), [(2, 22), (9, 24)])
def test_padded_rows_keep_their_length_unless_much_of_it_is_unused(more, length):
    data = ragged(1, longest=20)
    wide = TokenDataset(
        np.pad(data.tokens, ((0, 0), (0, more))),
        np.pad(data.mask, ((0, 0), (0, more))),
        attention_mask=np.ones((40, 20 + more)),
    )
    assert used_lengths(data).max() == 20
    layout = choose(wide, 8, packing="no")
    assert layout == Layout(length, False, 8)
    (found,) = arrange([batch(wide, 8, 0, 0)], layout)
    (same,) = arrange([batch(data, 8, 0, 0)], widest([layout, layout]))
    assert found["tokens"].shape == (8, length)
    for name in found:
        np.testing.assert_array_equal(found[name], same[name])


def test_mixed_layouts_become_the_one_that_all_fit():
    packed, rows = Layout(20, True, 64, 8), Layout(30, False, 5)
    assert widest([packed, rows]) == Layout(30, False, 5, 8)
    assert widest([packed, Layout(24, True, 72, 4)]) == Layout(24, True, 72, 8)


def test_answer_places_of_rows_with_gaps_and_without_answers():
    data = ragged(2)
    found = answer_places(data.tokens, data.mask)
    for row in range(len(data)):
        marked = np.flatnonzero(data.mask[row])
        real = found["shares"][row] > 0
        assert found["places"][row][real].tolist() == (marked - 1).tolist()
        assert found["targets"][row][real].tolist() == data.tokens[row, marked].tolist()


@pytest.mark.parametrize("least", [1, 8])
def test_batches_by_length_hold_every_example_once(least):
    data = ragged(4, size=60, longest=100)
    seen, shapes = [], set()
    for part in by_length(data, 16, least=least):
        lengths = used_lengths(
            TokenDataset(
                part["tokens"],
                part["mask"],
                attention_mask=np.ones_like(part["tokens"]),
            )
        )
        shapes.add(part["tokens"].shape[1])
        if least == 1:
            assert part["tokens"].shape[1] < 2 * max(lengths.min(), 4)
        seen += [tuple(t[:n]) for t, n in zip(part["tokens"], lengths, strict=True)]
    lengths = used_lengths(data)
    expected = [tuple(t[:n]) for t, n in zip(data.tokens, lengths, strict=True)]
    assert sorted(seen) == sorted(expected)
    assert len(shapes) > 1


def test_batches_by_length_come_in_one_order():
    """A stream's n-th example, and what is drawn for it, is not the hardware's."""
    data = ragged(4, size=60, longest=100)

    def order(size, least):
        parts = by_length(data, size, least=least)
        return [t[t > 0].tolist() for part in parts for t in part["tokens"]]

    for size, least in ((16, 16), (5, 1), (60, 60)):
        assert order(size, least) == order(1, 1)


@pytest.mark.parametrize("longest", [(29, 32), (35, 39), (250, 256)])
def test_sets_of_about_one_length_share_their_shapes(longest):
    shapes = [
        {
            (part["tokens"].shape[1], part["places"].shape[1])
            for part in by_length(ragged(7, longest=most, answers=count), 40, least=40)
        }
        for most, count in zip(longest, (3, 7), strict=True)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 1


def test_an_example_longer_than_a_row_is_named():
    drawn = batch(ragged(5), 16, 0, 0)
    with pytest.raises(UserError, match=r"at most 10 tokens, got \d+ in example \d+"):
        arrange([drawn], Layout(10, True, 8))


@pytest.mark.parametrize(
    ("width", "places", "pairs"), [(40, 99, 99), (900, 3, 99), (900, 99, 9)]
)
def test_a_batch_beyond_its_budget_is_refused(width, places, pairs):
    wanted = f"fit 1 x {width} tokens, {places} answer places and {pairs} pairs"
    with pytest.raises(UserError, match=wanted):
        pack(batch(ragged(6), 16, 0, 0), Layout(30, True, 8), width, places, pairs)
