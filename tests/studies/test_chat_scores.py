"""What a chat study measures after each domain, and who judges it."""

import types

import numpy as np
import pytest
import tiny_chat
from chat_case import build, save_world

from sbr_jax.data import TokenDataset
from sbr_jax.evaluation import KeywordJudge, domain_scores
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.methods.risk import JudgeError
from sbr_jax.studies import chat_data, chat_model
from sbr_jax.studies.chat_data import Example
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def study(world):
    return build(world)


def test_choices_are_scored_by_the_likeliest_option():
    items = chat_data.questions(
        [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)],
        [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)],
    )

    def runner(right):
        asked = types.SimpleNamespace(describe=dict)
        asked.log_likelihoods = lambda prompts, options: [
            np.array([float((i % 2 == j) == right) for j in range(2)])
            for i in range(len(prompts))
        ]
        return lambda base, adapter: asked

    assert domain_scores.choice_accuracy(items, runner(True))(None, None) == 100.0
    assert domain_scores.choice_accuracy(items, runner(False))(None, None) == 0.0


def test_token_accuracy_equals_a_loop_over_the_answers():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, (7, 6)).astype(np.int32)
    mask = (rng.random((7, 6)) < 0.5).astype(np.float32)
    logits = rng.normal(size=(8, 6, 5)).astype(np.float32)

    def apply_fn(base, adapter, given):
        # The same logits for the same row, however rows are batched.
        return base[given[:, 0]]

    tokens[:, 0], mask[:, 0] = np.arange(7) + 1, 0.0
    tokens[3, 1:] = logits[4, :-1].argmax(-1)
    right = [
        logits[row[0], t - 1].argmax() == row[t]
        for row, kept in zip(tokens, mask, strict=True)
        for t in range(1, 6)
        if kept[t]
    ]
    score = domain_scores.TokenAccuracy(apply_fn, TokenDataset(tokens, mask), 3)
    assert score(logits, None) == pytest.approx(100 * np.mean(right), abs=1e-4)


def test_the_monitor_counts_refusals_of_the_probe_by_the_judge(study, monkeypatch):
    asked = []

    def answers(self, prompts, *, max_new_tokens):
        asked.append((tuple(prompts), max_new_tokens, self.system))
        return ["I'm sorry, no."] + ["Sure, w1 w2."] * (len(prompts) - 1)

    monkeypatch.setattr(ModelRunner, "answers", answers)
    assert study.probe(None, None) == 25.0
    ((found, length, _),) = asked
    assert len(set(found)) == tiny_chat.SIZES["probe"]
    assert length == tiny_chat.SIZES["max_new_tokens"]
    assert all(tiny_chat.MARK in prompt for prompt in found)


def test_a_list_of_words_rates_no_training_data_and_a_guard_does(world, study):
    assert study.judge is None
    place = str(world / "model")
    guard = chat_model.make_judge("llama-guard", place, dtype="float32")
    assert guard.describe()["refusal_means"] == "not harmful"
    rate = chat_model.risk_judge(guard, study.model.tokenizer)
    # A random model gives its labels no mass: nothing is made up in their place.
    with pytest.raises(JudgeError, match="one of the two labels"):
        rate(study.harmful)
    with pytest.raises(UserError, match="keyword, keyword:LIST, llama-guard"):
        chat_model.make_judge("lama", None, dtype="float32")
    found = chat_model.make_judge("keyword:jbb12", None, dtype="float32")
    assert found == KeywordJudge("jbb12")
