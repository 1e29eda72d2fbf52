"""Accuracy in a domain of a chat study, by choice and by next tokens."""

import types

import numpy as np
import pytest

from sbr_jax.data import TokenDataset
from sbr_jax.evaluation import domain_scores
from sbr_jax.studies.chat.sources import Example, questions


def test_choices_are_scored_by_the_likeliest_option():
    examples = [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)]
    items = questions(examples, examples)

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
