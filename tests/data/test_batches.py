"""Batches are a function of seed and step; sets are checked, joined and mixed."""

import numpy as np
import pytest

from sbr_jax import data
from sbr_jax.data.batches import batch
from sbr_jax.typing import UserError


def numbers(size, start=0, length=1):
    rows = np.arange(start, start + size)[:, None]
    tokens = np.tile(rows, (1, length))
    return data.TokenDataset(tokens, np.ones((size, length)))


def draws(dataset, size, steps, seed=0):
    taken = [batch(dataset, size, seed, step) for step in steps]
    return np.concatenate([part["tokens"][:, 0] for part in taken]).tolist()


def test_a_batch_depends_on_seed_and_step_only():
    dataset = numbers(10)
    late = draws(dataset, 4, [7])
    assert late == draws(dataset, 4, range(8))[-4:]
    assert late == draws(numbers(10), 4, [7])
    assert draws(dataset, 4, range(5)) != draws(dataset, 4, range(5), seed=1)


def test_every_epoch_holds_every_example_once_in_a_new_order():
    found = draws(numbers(10), 4, range(5))
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10] != found[10:]


def test_a_set_smaller_than_a_batch_repeats():
    assert sorted(draws(numbers(3), 6, [0])) == [0, 0, 1, 1, 2, 2]


PROMPTS = ([5, 6, 7, 8], [9, 10], [11], [12, 13, 14, 15])


def padded(prompts, side, pad=0, bos=(), answer=(20, 21)):
    """Tokens, answer mask and attention mask, as a tokenizer pads them."""
    rows = [[*bos, *prompt, *answer] for prompt in prompts]
    longest = max(map(len, rows))
    fill = {
        "left": lambda row, value: [value] * (longest - len(row)) + row,
        "right": lambda row, value: row + [value] * (longest - len(row)),
    }[side]
    marks = [[0] * (len(row) - len(answer)) + [1] * len(answer) for row in rows]
    tokens = np.array([fill(row, pad) for row in rows])
    return (
        tokens,
        np.array([fill(m, 0) for m in marks]),
        np.array([fill([1] * len(row), 0) for row in rows]),
    )


@pytest.mark.parametrize("pad", [0, 1, 21])
@pytest.mark.parametrize("bos", [(), (1,)])
@pytest.mark.parametrize("told", [False, True])
def test_rows_padded_on_the_left_are_refused(pad, bos, told):
    tokens, mask, attention = padded(PROMPTS, "right", pad, bos)
    given = {"attention_mask": attention} if told else {}
    assert len(data.TokenDataset(tokens, mask, **given)) == 4
    tokens, mask, attention = padded(PROMPTS, "left", pad, bos)
    given = {"attention_mask": attention} if told else {}
    with pytest.raises(UserError, match=r"padded on the right, got 2 of 4 with"):
        data.TokenDataset(tokens, mask, **given)


def test_a_row_alone_is_told_by_its_attention_mask():
    tokens, mask, attention = (rows[1:2] for rows in padded(PROMPTS, "left"))
    assert len(data.TokenDataset(tokens, mask)) == 1
    with pytest.raises(UserError, match="got 1 of 1"):
        data.TokenDataset(tokens, mask, attention_mask=attention)
    with pytest.raises(UserError, match="an attention_mask of 0 and 1 of the shape"):
        data.TokenDataset(tokens, mask, attention_mask=attention[0])
    whole = data.TokenDataset(tokens, mask, attention_mask=np.ones_like(mask))
    assert whole.attention_mask is None


def test_rows_of_one_length_that_begin_alike_are_no_padding():
    """Nor are repeated tokens at the start of some prompts, or parts of a set."""
    tokens, mask, _ = padded([[3, 3, 5], [3, 4, 6], [7, 7, 7]], "right")
    assert len(data.TokenDataset(tokens, mask, attention_mask=np.ones_like(mask))) == 3
    rows = [[1, 5, 6], [1, 7, 8], [1, 1, 9]]
    longer = data.TokenDataset(*padded([*rows, [1, 2]], "right")[:2])
    assert len(data.take(longer, [0, 1, 2])) == 3
    same = np.full((4, 6), 3)
    assert len(data.TokenDataset(same, np.eye(6)[[5] * 4])) == 4


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_mixture_replaces_the_fraction(fraction):
    mixed = data.mixture(numbers(20), numbers(30, 100), fraction, seed=0)
    found = mixed.tokens[:, 0]
    assert len(found) == 20 == len(set(found.tolist()))
    assert (found >= 100).sum() == round(20 * fraction)


def test_a_mixture_repeats_only_when_its_set_is_used_up():
    mixed = data.mixture(numbers(4), numbers(2, 100), 0.5, seed=0, size=10)
    counts = np.unique(mixed.tokens[:, 0], return_counts=True)[1]
    assert counts.sum() == 10
    assert sorted(counts[:4].tolist()) == [1, 1, 1, 2]
    assert sorted(counts[4:].tolist()) == [2, 3]


def test_subsets_nest_and_concatenation_pads():
    small, large = (
        set(data.subset(numbers(20), n, seed=3).tokens[:, 0].tolist()) for n in (5, 9)
    )
    assert len(small) == 5
    assert small < large
    joined = data.concatenate([numbers(2, 1), numbers(3, 5, length=4)])
    assert joined.tokens.shape == (5, 4)
    assert joined.mask[0].tolist() == [1, 0, 0, 0]


def tokens(rows, mask=((0, 1),)):
    return lambda: data.TokenDataset(np.array(rows), np.array(mask))


WHOLE = "whole numbers of at least 0 as tokens, got"
MISTAKES = [
    (lambda: batch(numbers(0), 2, 0, 0), "without examples"),
    (lambda: batch(numbers(2), 2, 0, -1), "at least 0"),
    (lambda: batch(numbers(9), 0, 0, 0), "batch size of at least 1, got 0"),
    (lambda: data.mixture(numbers(2), numbers(2), 1.5, seed=0), "fraction"),
    (lambda: data.mixture(numbers(2), numbers(0), 0.5, seed=0), "empty"),
    (lambda: data.concatenate([]), "at least one"),
    (tokens(np.ones((2, 3)), np.ones((2, 4))), "one shape"),
    (tokens([[1.5, 2]]), f"{WHOLE} other"),
    (tokens([[-100, 2]]), WHOLE),
    (tokens([[2**31, 2]]), WHOLE),
    (tokens([[np.nan, 2]]), WHOLE),
    (tokens([[True, False]]), f"{WHOLE} bool"),
    (tokens([["a", "b"]]), WHOLE),
    (tokens([[1, 2]], [[0, np.nan]]), "a mask of 0 and 1"),
    (tokens([[1, 2]], [[0, -1]]), "a mask of 0 and 1"),
    (tokens([[1, 2]], [[0, 7]]), "a mask of 0 and 1"),
]


@pytest.mark.parametrize(("call", "said"), MISTAKES)
def test_mistakes_are_named(call, said):
    with pytest.raises(UserError, match=said):
        call()
