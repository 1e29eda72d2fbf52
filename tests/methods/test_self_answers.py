"""Self-answers: which rows are answered anew, by whom, and who is not believed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import BASE, FRESH, KEY, PROBLEM, STUDY, forward

from sbr_jax.data import concatenate, take
from sbr_jax.methods._self_answers import answered, risky_rows, with_self_answers
from sbr_jax.methods.lean import lean, tied_mixture
from sbr_jax.methods.plain import plain
from sbr_jax.training import pipeline
from sbr_jax.training.program import make_program
from sbr_jax.typing import UserError

HARMFUL = tiny.with_prompts(tiny.dataset(4, 24, shift=7), 26, 32, count=4)
BENIGN = tiny.with_prompts(tiny.dataset(3, 24, shift=5), 0, 6, count=4)
# Prompts that nobody fitted: harmful ones, then benign ones.
NEW = [tiny.with_prompts(tiny.dataset(8, 8), *of, 1, 4) for of in ((26, 32), (0, 6))]
MIXED = concatenate(NEW)


def greedy(base, prompts, most, stops):
    """One token after another, the whole row anew each time."""
    found = []
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + most:
            logits = forward(base, None, jnp.asarray([row + [0] * (24 - len(row))]))
            token = int(np.argmax(logits[0, len(row) - 1]))
            if token in stops:
                break
            row.append(token)
        found.append(row[len(prompt) :])
    return found


SETS = {"harmful": HARMFUL, "calibration_controls": {"benign": BENIGN}}
ASKED = dataclasses.replace(PROBLEM, answer=greedy, **SETS)


@functools.cache
def probe():
    method = with_self_answers(plain(), 0.5)
    return method.init(ASKED, BASE, FRESH, KEY)["self_answers"]["probe"]


def begun(threshold, examples, method=None):
    method = with_self_answers(method or plain(), threshold)
    state = {"self_answers": {"probe": probe()}}
    return method.begin_domain(ASKED, BASE, state, examples, KEY)


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_risky_rows_keep_their_prompt_and_get_the_models_own_answer(threshold):
    found, metrics = begun(threshold, MIXED)
    risk = risky_rows(ASKED, BASE, probe(), MIXED)
    np.testing.assert_array_equal(risk[:8] > 0.5, True)
    changed = np.flatnonzero(risk >= threshold)
    assert metrics == {"self_answers": len(changed) / 16}
    assert len(changed) < 12 if threshold else len(changed) == 16
    for row in range(16):
        if row not in changed:
            np.testing.assert_array_equal(found.tokens[row], MIXED.tokens[row])
            np.testing.assert_array_equal(found.mask[row], MIXED.mask[row])
            continue
        prompt = MIXED.tokens[row, :4]
        np.testing.assert_array_equal(found.tokens[row, :4], prompt)
        (answer,) = greedy(BASE, [prompt.tolist()], 5, [])
        np.testing.assert_array_equal(found.tokens[row, 4:9], answer)
        assert found.mask[row].sum() == 5


def test_answers_end_where_the_datas_do_and_rows_grow_where_they_must():
    long = take(MIXED, range(8))
    tokens = long.tokens.copy()
    tokens[:, 8] = 30  # Most answers end with it.
    tokens[0, 4:8], mask = [7, 8, 9, 30], long.mask.copy()
    mask[0] = np.isin(np.arange(10), [8, 9])
    tokens[0, 8:] = [5, 6]
    data = dataclasses.replace(long, tokens=tokens, mask=mask)

    def short(base, prompts, most, stops):
        assert (most, list(stops)) == (5, [30])
        return [[1, 2], [1, 2, 3, 4, 5]]

    problem = dataclasses.replace(PROBLEM, answer=short)
    found = answered(problem, BASE, data, np.array([0, 1]))
    assert found.length == 13
    assert found.tokens[0].tolist() == [*tokens[0, :8], 1, 2, 30, 0, 0]
    assert np.flatnonzero(found.mask[0]).tolist() == [8, 9, 10]
    assert found.tokens[1, 4:].tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 0]
    np.testing.assert_array_equal(found.tokens[2:, :10], tokens[2:])


def test_tied_rows_are_left_alone():
    tied = tied_mixture(MIXED, PROBLEM.calibration, 2)
    found, metrics = begun(0.0, tied)
    assert metrics["self_answers"] == 1
    np.testing.assert_array_equal(found.tokens[16:], tied.tokens[16:])
    np.testing.assert_array_equal(found.tied, tied.tied)
    assert found.quota == 2


def test_a_probe_that_cannot_tell_is_refused_and_another_method_named():
    blind = dataclasses.replace(ASKED, harmful=tiny.dataset(4, 64, shift=7))
    controls = {"benign": tiny.dataset(3, 64, shift=5)}
    blind = dataclasses.replace(blind, calibration_controls=controls)
    method = lean(self_answers=0.5)
    with pytest.raises(
        UserError, match=r"AUROC of 0\.9 or more.*use lean without it"
    ) as e:
        method.init(blind, BASE, FRESH, KEY)
    assert "adaptive-judge" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="expected a model that generates"):
        answered(PROBLEM, BASE, MIXED, np.array([0]))


def test_a_run_asks_the_model_and_says_how_often(tmp_path):
    domain = dataclasses.replace(STUDY.domains["medical"], train=MIXED)
    study = dataclasses.replace(
        STUDY,
        domains={"medical": domain},
        probe=None,
        **SETS,
    )
    settings = tiny.config(steps_per_domain=2)
    row = "lean:self-answers"
    pipeline.run(study, [row], [0], tmp_path, settings, quiet=True)
    lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    (told,) = (x["metrics"] for x in lines if x["stage"] == "train")
    # Half of the data's own examples ask for harm.
    assert 8 / 16 <= told["self_answers"] < 12 / 16
    made = make_program(row, study, settings)
    prompts = [MIXED.tokens[row, :4].tolist() for row in range(3)]
    ours = made.problem.answer(BASE, prompts, 5, [])
    assert ours == greedy(BASE, prompts, 5, [])
    assert jax.tree.leaves(BASE)
