"""Broken weights give no measurement: whatever reads logits refuses to."""

import dataclasses

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stories
from tasks_case import choice, person, request

from sbr_jax import models
from sbr_jax.data import TokenDataset
from sbr_jax.evaluation import KeywordJudge, mc1, mc2, tasks
from sbr_jax.evaluation.benchmarks import Ask
from sbr_jax.evaluation.domain_scores import TokenAccuracy
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.tasks.first_token import roc_area
from sbr_jax.models.finite import comparable
from sbr_jax.studies._held_out import held_out
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = tiny_stories.tokenizer()
    tokenizer.add_tokens(["Sorry"])
    config = dataclasses.replace(checkpoints.CONFIG, vocab_size=len(tokenizer))
    return models.make_model(config, checkpoints.params(config), tokenizer)


def one(value):
    """One entry of one layer's weights replaced."""

    def broken(params):
        leaves, tree = jax.tree.flatten(params)
        at = max(range(len(leaves)), key=lambda i: leaves[i].ndim)
        leaves[at] = leaves[at].at[(0,) * leaves[at].ndim].set(value)
        return jax.tree.unflatten(tree, leaves)

    return broken


BROKEN = {
    "nan": one(jnp.nan),
    "infinite": one(jnp.inf),
    "overflowing": lambda params: jax.tree.map(lambda x: x * 1e30, params),
}
WORDS = ("w1 w2", "w3 w4 w5", "w6")
TOKENS = np.array([[1, 5, 6, 7], [1, 8, 9, 5]], np.int32)
MASK = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], np.float32)
HARMFUL = [request(w) for w in WORDS]
HARMLESS = [request(w, harmful=False) for w in WORDS]
CHOICES = [choice(w, ("w7", "w8 w9"), (0,), w) for w in WORDS]
LETTERS = [choice(w, ("w7", "w8"), (0,), w) for w in WORDS]
PEOPLE = [person(w, ("w7", "w8", "w9")) for w in WORDS]

READERS = {
    "generate": lambda m, r: models.generate(
        m, r.base, None, [[1, 5], [1, 6, 7]], max_new_tokens=3
    ),
    "sampling": lambda m, r: models.generate(
        m,
        r.base,
        None,
        [[1, 5]],
        max_new_tokens=3,
        temperature=1.0,
        key=jax.random.key(0),
    ),
    "token_log_probs": lambda m, r: models.token_log_probs(
        m, r.base, None, TOKENS, MASK
    ),
    "options": lambda m, r: r.log_likelihoods(["w1"], [[" w2", " w3"]]),
    "answers": lambda m, r: r.answers(WORDS, max_new_tokens=4),
    "harmbench": lambda m, r: tasks.harmbench(
        r, HARMFUL, KeywordJudge(), max_new_tokens=4
    ),
    "truthfulqa": lambda m, r: tasks.truthfulqa_mc(
        r, CHOICES, metric="mc1", preamble=False
    ),
    "medqa": lambda m, r: tasks.medqa(r, LETTERS),
    "legalbench": lambda m, r: tasks.legalbench(r, CHOICES),
    "bbq": lambda m, r: tasks.bbq(r, PEOPLE),
    "first token": lambda m, r: tasks.refusal_auc(r, HARMFUL, HARMLESS, ["sorry"]),
    "next token": lambda m, r: TokenAccuracy(m.apply_fn, TokenDataset(TOKENS, MASK))(
        r.base, None
    ),
    "held-out": lambda m, r: held_out(m, TokenDataset(TOKENS, MASK))(r.base, None),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_takes_broken_weights_for_a_result(model, reader):
    measure = READERS[reader]
    measure(model, ModelRunner(model, model.params))
    for breaks in BROKEN.values():
        runner = ModelRunner(model, breaks(model.params))
        with pytest.raises(UserError, match="expected finite logits"):
            measure(model, runner)


def test_one_broken_text_is_enough_and_is_named(model):
    # Only a text with token 5 reads the row of the table that is broken.
    head = model.params["embed"]
    params = {**model.params, "embed": head.at[5].set(jnp.nan), "head": head.T}
    config = dataclasses.replace(model.config, tied=False)
    whole = models.make_model(config, params, model.tokenizer)
    with pytest.raises(UserError, match=r"1 of 2 texts \(first: 1\)"):
        models.generate(whole, params, None, [[1, 6], [1, 5]], max_new_tokens=2)


def test_the_benchmark_is_named(model):
    ask = Ask("harmbench", None, None, KeywordJudge(), False, None, {})
    benchmark = ask.made(HARMFUL, lambda runner: READERS["harmbench"](None, runner))
    runner = ModelRunner(model, BROKEN["nan"](model.params))
    with pytest.raises(UserError, match="benchmark 'harmbench': generate: expected"):
        benchmark(runner)


def test_what_masks_a_token_for_good_is_no_fault():
    logits = jnp.array([[0.0, -jnp.inf], [jnp.nan, 0.0], [-jnp.inf, -jnp.inf]])
    assert comparable(logits).tolist() == [True, False, False]
    # Equal throughout: a norm has divided by infinity.
    assert not comparable(jnp.zeros(3))


@pytest.mark.parametrize("worst", [[np.nan, -1.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_scores_of_options_must_tell_them_apart(worst):
    rows = [np.array([-1.0, -2.0]), np.array(worst)]
    for metric in (
        lambda: mc1(rows, [0, 0]),
        lambda: mc2(rows, [[0], [0]]),
    ):
        with pytest.raises(UserError, match="item 1"):
            metric()
    # An option that cannot be is none that breaks the others.
    assert mc2([np.array([-1.0, -np.inf])], [[0]]) == 100.0


def test_an_area_is_of_numbers():
    with pytest.raises(UserError, match="1 and 0 NaN"):
        roc_area([np.nan, 1.0], [0.0])
