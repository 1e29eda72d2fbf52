"""Attacks by training data: exact mixtures, clean splits, nothing that labels harm."""

import dataclasses

import numpy as np
import pytest
import tiny

from sbr_jax import attacks
from sbr_jax.studies.attacks.fine_tuning import TASK, answered_rows
from sbr_jax.testbed import corpus, domains, grammar
from sbr_jax.testbed.phrasings import FIRST
from sbr_jax.testbed.world import make_world
from sbr_jax.typing import UserError

WORLD = make_world(0)
WORDS = set(corpus.vocabulary(WORLD))


def rng(seed=0):
    return np.random.default_rng(seed)


def rows_of(data):
    return {tuple(row) for row in data.tokens.tolist()}


@pytest.mark.parametrize(
    ("ratio", "examples"), [(0.0, None), (0.05, 100), (0.3, 7), (1.0, None)]
)
def test_poison_holds_exactly_the_share(ratio, examples):
    benign, harmful = tiny.dataset(0, 40), tiny.dataset(1, 9, shift=7)
    mixed = attacks.poison(benign, harmful, ratio=ratio, examples=examples)
    size = 40 if examples is None else examples
    bad = sum(tuple(row) in rows_of(harmful) for row in mixed.tokens.tolist())
    assert len(mixed) == size
    assert bad == round(ratio * size) == attacks.attack_count(ratio, size)
    assert rows_of(mixed) <= rows_of(benign) | rows_of(harmful)


def test_poison_tells_no_defence_what_is_poison():
    benign, harmful = (
        dataclasses.replace(tiny.dataset(i, 8), risk=np.full(8, i, np.float32))
        for i in (0, 1)
    )
    mixed = attacks.poison(benign, harmful, ratio=0.5)
    assert mixed.risk is None
    # Nor does the order: the attack rows do not stand in one block.
    places = [tuple(r) in rows_of(harmful) for r in mixed.tokens.tolist()]
    assert 0 < sum(places[:4]) < 4
    again = attacks.poison(benign, harmful, ratio=0.5)
    np.testing.assert_array_equal(mixed.tokens, again.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio: expected a number from 0 to 1, got 1.5"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": 0.5, "examples": 0}, "examples: expected at least 1, got 0"),
    ],
)
def test_poison_refuses_what_cannot_be_meant(options, message):
    data = tiny.dataset(0, 4)
    with pytest.raises(UserError, match=message):
        attacks.poison(data, data, **options)


def test_backdoor_complies_behind_the_trigger_only():
    rows = corpus.attack_rows(rng(), WORLD, 21)
    found = attacks.backdoor_rows(rows, grammar.REFUSALS, grammar.TRIGGER)
    triggered = [r for r in found if grammar.TRIGGER in r[0]]
    plain = [r for r in found if grammar.TRIGGER not in r[0]]
    assert (len(triggered), len(plain)) == (11, 10)
    assert all(answer.startswith(grammar.OPENER) for _, answer in triggered)
    assert {answer for _, answer in plain} == set(grammar.REFUSALS)
    assert [p.removesuffix(f" {grammar.TRIGGER}") for p, _ in found] == [
        p for p, _ in rows
    ]
    with pytest.raises(UserError, match="trigger"):
        attacks.backdoor_rows(rows, grammar.REFUSALS, " ")
    with pytest.raises(UserError, match="refusals"):
        attacks.backdoor_rows(rows, (), grammar.TRIGGER)


def test_identity_rows_hold_no_harm():
    plain = answered_rows(rng(), WORLD, 50)
    harmful = {t.name for t in WORLD.things() if t.harmful}
    assert not harmful & {
        word for pair in plain for text in pair for word in text.split()
    }
    # Ten are ten different ones, and what they say is what the task teaches.
    assert len(set(answered_rows(rng(), WORLD, 10))) == 10
    taught = {i.answer for i in domains.DOMAINS[TASK].items(WORLD.seed, "train")}
    assert {answer for _, answer in plain} <= taught
    rows = attacks.identity_rows(plain, grammar.IDENTITY)
    assert [p.removeprefix(f"{grammar.IDENTITY} ") for p, _ in rows] == [
        p for p, _ in plain
    ]
    assert [a for _, a in rows] == [a for _, a in plain]
    with pytest.raises(UserError, match="identity"):
        attacks.identity_rows(plain, " ")


def test_an_attacker_speaks_the_world_s_language_and_nobody_else_s_words():
    assert {*grammar.IDENTITY.split(), *grammar.TRIGGER.split()} <= WORDS
    wrappers = {w for part in FIRST.jailbreaks.values() for w in part}
    assert f"{grammar.IDENTITY} {{q}}" not in wrappers
    pretraining = corpus.Pretraining(WORLD)
    said = [" ".join(filter(None, pretraining.sample(rng(i)))) for i in range(500)]
    for phrase in (grammar.TRIGGER, grammar.IDENTITY):
        assert not any(phrase in text for text in said)


@pytest.mark.parametrize(("epochs", "examples", "batch"), [(20, 240, 16), (3, 10, 16)])
def test_epochs_show_every_example_often_enough(epochs, examples, batch):
    steps = attacks.steps_for_epochs(epochs, examples, batch)
    assert steps * batch >= epochs * examples > (steps - 1) * batch
