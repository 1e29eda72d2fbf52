"""Interleaving: how many examples are replaced, by which, and what stays."""

import dataclasses

import numpy as np
import pytest
import tiny

from sbr_jax.data.batches import TokenDataset
from sbr_jax.methods.base import Method
from sbr_jax.methods.interleaving import interleaving
from sbr_jax.typing import UserError

STUDY = tiny.study()
DOMAIN = STUDY.domains["medical"].train
SAFE = STUDY.safety_mix
PROBLEM = tiny.problem(
    apply_fn=STUDY.model.apply_fn,
    steps_per_domain=6,
    batch_size=8,
    calibration=STUDY.calibration,
    safety_mix=SAFE,
)


def rows(data):
    """Every example with its mask, as bytes: tokens alone could be equal by chance."""
    return [
        t.tobytes() + m.tobytes() for t, m in zip(data.tokens, data.mask, strict=True)
    ]


def mixed(fraction=0.1, seed=0, domain=DOMAIN, **changes):
    problem = tiny.changed(PROBLEM, **changes)
    return interleaving(fraction=fraction).mix(problem, domain, seed)


@pytest.mark.parametrize(("fraction", "wanted"), [(0.1, 6), (0.25, 16), (0.9, 58)])
def test_a_fraction_of_the_domain_is_replaced(fraction, wanted):
    found = rows(mixed(fraction))
    safe, own = set(rows(SAFE)), set(rows(DOMAIN))
    assert not safe & own
    assert len(found) == len(DOMAIN) == 64
    assert sum(row in safe for row in found) == wanted
    kept = [row for row in found if row in own]
    assert len(set(kept)) == len(kept) == 64 - wanted
    # 24 safety examples: each is used before one comes back.
    counts = [found.count(row) for row in safe]
    assert max(counts) - min(counts) <= 1


def test_safety_examples_are_spread_over_the_order():
    safe = set(rows(SAFE))
    places = [i for i, row in enumerate(rows(mixed(0.5))) if row in safe]
    halves = sum(place < 32 for place in places)
    assert 8 <= halves <= 24  # Of 32; all in one half would be 0 or 32.


def test_the_choice_is_a_function_of_the_seed():
    assert rows(mixed(seed=3)) == rows(mixed(seed=3))
    assert set(rows(mixed(seed=3))) != set(rows(mixed(seed=4)))


def test_nothing_is_replaced_at_zero_and_the_sets_are_left_alone():
    before = rows(DOMAIN), rows(SAFE)
    assert sorted(rows(mixed(0.0))) == sorted(rows(DOMAIN))
    assert sorted(rows(mixed())) != sorted(rows(DOMAIN))
    assert (rows(DOMAIN), rows(SAFE)) == before


def test_a_longer_safety_mix_widens_with_padding_that_is_no_answer():
    wide = TokenDataset(
        np.pad(SAFE.tokens, ((0, 0), (0, 3))), np.pad(SAFE.mask, ((0, 0), (0, 3)))
    )
    found = mixed(safety_mix=wide)
    assert found.length == tiny.LENGTH + 3
    assert not found.mask[:, tiny.LENGTH :].any()
    np.testing.assert_array_equal(found.tokens[:, : tiny.LENGTH], mixed().tokens)


def test_everything_else_is_plain_fine_tuning():
    method, plain = interleaving(), Method(name="plain")
    changed = {
        field.name
        for field in dataclasses.fields(Method)
        if getattr(method, field.name) != getattr(plain, field.name)
    }
    assert changed == {"name", "mix"}
    assert rows(method.mix(PROBLEM, DOMAIN, 0)) == rows(mixed(0.1))


@pytest.mark.parametrize(
    ("safe", "got"),
    [
        (None, "None"),
        (TokenDataset(np.zeros((0, 4)), np.zeros((0, 4))), "an empty set"),
    ],
)
def test_it_needs_a_safety_mix(safe, got):
    with pytest.raises(UserError, match=f"interleaving: expected safety .* got {got}"):
        mixed(safety_mix=safe)


def test_a_fraction_that_replaces_nothing_is_refused():
    with pytest.raises(UserError, match=r"at least one of the domain's 64 .* 0\.005"):
        mixed(0.005)
