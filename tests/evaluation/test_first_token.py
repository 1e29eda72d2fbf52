"""Refusal at the first token: areas, tokens and probabilities, against plain twins."""

import dataclasses

import checkpoints
import jax
import numpy as np
import pytest
import tiny_data as files
from tasks_case import request, words

from sbr_jax import models
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.evaluation.benchmarks import prepare
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.tasks import first_token
from sbr_jax.typing import UserError


def test_the_area_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 6, 30) + 1.0, rng.integers(0, 6, 40).astype(float)
    wins = (high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])
    area = first_token.roc_area(high, low)
    assert area == pytest.approx(100 * wins.mean(), abs=1e-9)
    assert first_token.roc_area(low, high) == pytest.approx(100 - area, abs=1e-9)
    assert first_token.roc_area([1.0, 1.0], [1.0]) == 50
    with pytest.raises(UserError, match="both sides"):
        first_token.roc_area([], [1.0])


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}"
    "{{ m.content }}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def chat_runner(template=TEMPLATE):
    names = ["I", "Sorry", "As", "one", "two", "three"]
    tokenizer = words(names, ("<unk>", "<s>", "</s>", "<u>", "<a>"), template)
    model = models.make_model(checkpoints.CONFIG, checkpoints.params(), tokenizer)
    return ModelRunner(model, model.params)


def asked(*prompts):
    return [request(prompt) for prompt in prompts]


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_first_tokens_equal_a_plain_softmax(template):
    runner = chat_runner(template)
    tokenizer = runner.model.tokenizer
    tokens = first_token.opening_tokens(runner, ["sorry", "I cannot", "as an AI", "x"])
    assert [tokenizer.decode([t]) for t in tokens] == ["I", "Sorry", "As"]
    prompts = ["one two", "three", "two two one"]
    found = first_token.opening_probabilities(runner, prompts, tokens)
    for prompt, mine in zip(prompts, found, strict=True):
        text = f"<s> <u> {prompt} </s> <a>" if template else f"<s> {prompt}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row = np.zeros((1, 8), np.int32)  # One program for all.
        row[0, : len(ids)] = ids
        forward = jax.jit(runner.model.apply_fn)
        logits = forward(runner.base, None, row)[0, len(ids) - 1]
        p = np.asarray(jax.nn.softmax(logits))[list(tokens)].sum()
        # The same float32 forward, with and without a cache.
        assert mine == pytest.approx(float(p), rel=1e-4)


def test_refusal_auc_tells_sides_apart_and_not_copies_of_one():
    runner = chat_runner()
    phrases = ["sorry", "I cannot"]
    sides = asked("one two", "three"), asked("two", "one one")
    found = first_token.refusal_auc(runner, *sides, phrases)
    p = np.array([row["p"] for row in found.items])
    assert found.metrics["refusal_auc"] == first_token.roc_area(p[:2], p[2:])
    # Rows are rounded to six digits.
    assert found.metrics["first_refusal"] == pytest.approx(100 * p[:2].mean(), abs=1e-4)
    assert len(set(np.round(p, 5))) == 4
    same = first_token.refusal_auc(runner, sides[0], sides[0], phrases)
    assert same.metrics["refusal_auc"] == 50
    # Another output row for the token "Sorry", which no prompt holds.
    rows = runner.base["embed"].at[6].multiply(5.0)
    other = dataclasses.replace(runner, base={**runner.base, "embed": rows})
    moved = first_token.refusal_auc(other, *sides, phrases)
    assert moved.metrics["first_refusal"] != found.metrics["first_refusal"]
    with pytest.raises(UserError, match="unknown tokens only"):
        first_token.refusal_auc(runner, *sides, ["unheard of"])


def test_refusal_auc_has_a_topic_and_an_intent_side(tmp_path):
    folder = files.evalsets(tmp_path)
    measured = prepare("refusal-auc", folder, judge=KeywordJudge())
    found = measured(chat_runner())
    for name in ("alpaca", "xstest"):
        assert 0 <= found[f"refusal_auc/{name}"] <= 100
        assert 0 < found[f"first_refusal/{name}"] < 100
