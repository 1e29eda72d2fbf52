"""A guard as the judge of training pairs: its formula, and what it refuses to rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data import TokenDataset, take
from sbr_jax.methods.adaptive import adaptive_judge
from sbr_jax.methods.judges import label_likelihood_judge, label_log_probs, then_ask
from sbr_jax.methods.risk import JudgeError, judged
from sbr_jax.studies import testbed as study_maker
from sbr_jax.studies.options import TestbedOptions
from sbr_jax.testbed.world import make_world
from sbr_jax.training import pipeline
from sbr_jax.typing import UserError

MODEL = tiny.model()
LABELS = (5, 9)
QUESTION = (30, 31)
WORLD = make_world(0)


def ragged(size=7, length=tiny.LENGTH, seed=0):
    """Prompts and answers of several lengths, padded with zeros."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((size, length), np.int32)
    mask = np.zeros((size, length), np.float32)
    for row in range(size):
        end = (4, 7, length)[row % 3]
        start = int(rng.integers(1, end - 1))
        tokens[row, :end] = rng.integers(1, tiny.VOCAB, end)
        mask[row, start:end] = 1
    return TokenDataset(tokens, mask)


def tiny_judge(**options):
    # A random model gives every token about 1 / V: any mass is taken for a rating.
    options = {"model": MODEL, "adapter": None, "least_mass": 0.0, **options}
    return label_likelihood_judge(
        label_tokens=LABELS, render=then_ask(QUESTION), **options
    )


def dense_risk(model, adapter, dataset):
    """The formula, one unpadded example at a time, from all logits in float64."""
    risks = []
    for tokens, mask in zip(dataset.tokens, dataset.mask, strict=True):
        ids = [*tokens[: np.flatnonzero(mask)[-1] + 1], *QUESTION]
        forward = jax.jit(model.apply_fn)  # One program a length, not one an operation.
        logits = forward(model.params, adapter, np.array([ids], np.int32))
        p = np.exp(np.asarray(logits, np.float64)[0, -1])
        risks.append(p[LABELS[0]] / (p[LABELS[0]] + p[LABELS[1]]))
    return np.array(risks)


def moved_adapter():
    adapter = models.init_adapter(jax.random.key(1), tiny.CONFIG, rank=2, alpha=8.0)
    return jax.tree.map(lambda x: x + jnp.full_like(x, 0.2), adapter)


# --- the formula --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 32])
def test_the_risk_is_the_renormalised_likelihood_of_the_unsafe_label(batch_size):
    data = ragged()
    risk = tiny_judge(batch_size=batch_size)(data)
    assert risk.shape == (7,)
    assert risk.dtype == np.float32
    # Float32 logits of order one; padding and batching change the order of sums.
    np.testing.assert_allclose(risk, dense_risk(MODEL, None, data), atol=1e-5)
    assert np.ptp(risk) > 0.02


def test_the_adapter_is_the_guards():
    data, adapter = ragged(), moved_adapter()
    risk = tiny_judge(adapter=adapter)(data)
    np.testing.assert_allclose(risk, dense_risk(MODEL, adapter, data), atol=1e-5)
    assert np.abs(risk - tiny_judge()(data)).max() > 1e-2


def test_every_example_is_rated_by_itself():
    data, judge = ragged(), tiny_judge(batch_size=4)
    risk = judge(data)
    assert (judge(data) == risk).all()
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    np.testing.assert_allclose(judge(take(data, order)), risk[order], atol=1e-6)
    alone = [judge(take(data, [i]))[0] for i in range(len(data))]
    np.testing.assert_allclose(alone, risk, atol=1e-6)
    # What follows the answer is padding, whatever stands there.
    after = np.cumsum(data.mask[:, ::-1], axis=1)[:, ::-1] == 0
    filled = TokenDataset(np.where(after, 17, data.tokens), data.mask)
    np.testing.assert_array_equal(judge(filled), risk)


def test_likelihoods_are_over_the_whole_vocabulary():
    everything = label_log_probs(MODEL, None, range(tiny.VOCAB), [[1, 2], [3]])
    np.testing.assert_allclose(np.exp(everything).sum(axis=1), 1, atol=1e-5)


def test_no_examples_have_no_risks():
    nothing = TokenDataset(np.zeros((0, 4)), np.zeros((0, 4)))
    assert tiny_judge()(nothing).shape == (0,)
    assert judged(tiny_judge(), nothing).risk.shape == (0,)


# --- refusing to rate ---------------------------------------------------------------


def test_an_answer_that_is_no_label_is_no_rating():
    data = ragged()
    with pytest.raises(JudgeError, match=r"one of the two labels.* for 7 of 7 "):
        tiny_judge(least_mass=0.9)(data)
    # Some above and some below: those below are named, and nobody is rated.
    rows = [[*t[: np.flatnonzero(m)[-1] + 1], *QUESTION] for t, m in pairs(data)]
    mass = np.exp(label_log_probs(MODEL, None, LABELS, rows)).sum(axis=1)
    worst, second = np.argsort(mass)[:2]
    between = float(mass[worst] + mass[second]) / 2
    with pytest.raises(JudgeError, match=rf"for 1 of 7 examples \({worst}\)"):
        tiny_judge(least_mass=between)(data)


def pairs(data):
    return zip(data.tokens, data.mask, strict=True)


def test_likelihoods_that_are_not_finite_are_named():
    config = dataclasses.replace(tiny.CONFIG, tied=False)
    params = models.init_params(jax.random.key(0), config)
    params = {**params, "embed": params["embed"].at[17].set(jnp.nan)}
    data = ragged()
    tokens = np.where(data.tokens == 17, 16, data.tokens)
    tokens[[2, 4], 0] = 17
    judge = tiny_judge(model=models.make_model(config, params))
    with pytest.raises(JudgeError, match=r"finite .* for 2 of 7 examples \(2, 4\)"):
        judge(TokenDataset(tokens, data.mask))
    tokens[[2, 4], 0] = 16
    assert np.isfinite(judge(TokenDataset(tokens, data.mask))).all()


def test_an_example_that_does_not_fit_is_named():
    data = ragged()
    unanswered = data.mask.copy()
    unanswered[3] = 0
    with pytest.raises(JudgeError, match="example 3: expected an answer"):
        tiny_judge()(TokenDataset(data.tokens, unanswered))
    strange = data.tokens.copy()
    strange[1, 0] = tiny.VOCAB
    with pytest.raises(JudgeError, match="example 1: expected ids of the guard's 32"):
        tiny_judge()(TokenDataset(strange, data.mask))
    for ids, message in (([], "got 0"), ([1] * 9999, "got 9999")):
        judge = label_likelihood_judge(MODEL, None, LABELS, lambda t, m, i=ids: i)
        with pytest.raises(JudgeError, match=f"example 0: expected 1 to .*{message}"):
            judge(data)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ((5, 5), {}, "two different ids"),
        ((5, 6, 7), {}, "two different ids"),
        ((5, tiny.VOCAB), {}, "ids of the guard's 32 tokens"),
        ((5, -1), {}, "ids of the guard's 32 tokens"),
        (LABELS, {"least_mass": 1.5}, "least_mass: expected"),
        (LABELS, {"least_mass": float("nan")}, "least_mass: expected"),
        (LABELS, {"batch_size": 0}, "batch_size: expected"),
    ],
)
def test_impossible_judges_are_refused_when_they_are_made(labels, options, message):
    with pytest.raises(UserError, match=message):
        label_likelihood_judge(MODEL, None, labels, then_ask(QUESTION), **options)


# --- as the judge of a study --------------------------------------------------------


def test_adaptive_judge_takes_the_guards_risks():
    judge = tiny_judge(adapter=moved_adapter())
    study = tiny.study(judge=judge)
    train = study.domains["legal"].train
    mixed = adaptive_judge().mix(problem_of(study), train, 0)
    np.testing.assert_array_equal(mixed.risk, judge(train))
    assert np.ptp(mixed.risk) > 0.01


def test_a_judge_that_refuses_stops_the_run(tmp_path):
    study = tiny.study(judge=tiny_judge(least_mass=0.9))
    with pytest.raises(JudgeError, match="for 64 of 64 examples"):
        pipeline.run(
            study, ["adaptive-judge"], [0], tmp_path, tiny.config(), quiet=True
        )


def problem_of(study):
    return tiny.problem(
        apply_fn=study.model.apply_fn,
        steps_per_domain=2,
        batch_size=8,
        calibration=study.calibration,
        judge=study.judge,
    )


def test_the_testbeds_study_takes_the_guard_and_says_so():
    default, asked = (
        study_maker.build_study(
            ("medical",), TestbedOptions(calibration_examples=8, judge=judge)
        )
        for judge in ("exact", "guard")
    )
    assert default.fingerprint != asked.fingerprint
    few = take(default.domains["medical"].train, range(5))
    assert default.judge(few).tolist() == [0.0] * 5
    risk = asked.judge(few)
    assert ((risk > 0) & (risk < 0.5)).all()
    with pytest.raises(UserError, match=r"judge to be .exact. or .guard."):
        TestbedOptions(judge="keywords")


def test_a_model_of_other_words_cannot_take_the_guard():
    class Other:
        def get_vocab(self):
            return {"<pad>": 0}

    with pytest.raises(UserError, match="judge='guard': expected a model with"):
        study_maker.JUDGES["guard"](Other(), WORLD)
