"""Antidote against dense definitions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import tiny
from trees import vector
from weight_space_case import (
    BASE,
    PROBLEM,
    STUDY,
    TUNED,
    capture,
    dense,
)

from sbr_jax import models
from sbr_jax.data.batches import TokenDataset
from sbr_jax.methods.antidote import antidote, mean_squares, prune
from sbr_jax.methods.base import Method


def dense_inputs(adapter, data):
    """Inputs of every projection at the real tokens, [L, tokens, in], by a loop."""
    rows = {name: [] for name in adapter}
    _, seen = capture(BASE, adapter, data.tokens)
    for i, mask in enumerate(data.mask):
        real = np.flatnonzero(mask).max() + 1
        for name in adapter:
            rows[name].append(dense(seen["inputs"][name][:, i, :real]))
    return {name: np.concatenate(found, axis=1) for name, found in rows.items()}


def dense_pruned(weight, squares, fraction):
    weight = np.array(weight)
    for layer, output in np.ndindex(weight.shape[0], weight.shape[2]):
        score = np.abs(dense(weight[layer, :, output])) * np.sqrt(squares[layer])
        count = int(np.ceil(round(fraction * len(score), 6)))
        weight[layer, np.argsort(-score)[:count], output] = 0
    return weight


def test_antidote_zeroes_the_top_scores_of_every_output():
    base, adapter = antidote(fraction=0.1).deploy(PROBLEM, BASE, TUNED, {})
    assert adapter is None
    merged, inputs = (
        models.merge_adapter(BASE, TUNED),
        dense_inputs(TUNED, STUDY.harmful),
    )
    for name, weight in base["layers"].items():
        whole = merged["layers"][name]
        if name not in TUNED:
            assert weight is BASE["layers"][name]
            continue
        squares = np.mean(inputs[name] ** 2, axis=1)
        np.testing.assert_array_equal(weight, dense_pruned(whole, squares, 0.1))
        zeros = np.sum(np.asarray(weight) == 0, axis=1)
        np.testing.assert_array_equal(zeros, 2)  # ⌈0.1 · 16⌉ for every output


def test_antidote_on_the_adapter_prunes_both_factors_and_leaves_the_base():
    method = antidote(weights="adapter")
    base, adapter = method.deploy(PROBLEM, BASE, TUNED, {})
    assert base is BASE
    inputs = dense_inputs(TUNED, STUDY.harmful)
    for name, pair in TUNED.items():
        x = inputs[name]
        down = x @ dense(pair.lora_a)
        lora_a, lora_b = adapter[name].lora_a, adapter[name].lora_b
        square = np.mean(x**2, axis=1), np.mean(down**2, axis=1)
        np.testing.assert_array_equal(lora_a, dense_pruned(pair.lora_a, square[0], 0.1))
        np.testing.assert_array_equal(lora_b, dense_pruned(pair.lora_b, square[1], 0.1))
        assert adapter[name].scale == pair.scale


def test_antidote_ignores_padding():
    data = STUDY.harmful
    mask = np.array(data.mask)
    mask[:, 6:] = 0  # Answers end at 5: what follows is padding.
    noise = np.array(data.tokens)
    noise[:, 6:] = (noise[:, 6:] + 7) % tiny.VOCAB
    found = [
        mean_squares(
            dataclasses.replace(PROBLEM, harmful=TokenDataset(tokens, mask)),
            BASE,
            TUNED,
        )
        for tokens in (data.tokens, noise)
    ]
    np.testing.assert_allclose(vector(found[0]), vector(found[1]), rtol=1e-5)
    wanted = dense_inputs(TUNED, TokenDataset(data.tokens, mask))["v_proj"]
    ours = found[0]["v_proj"][0]
    np.testing.assert_allclose(ours, np.mean(wanted**2, axis=1), rtol=1e-4)


def test_antidote_looks_at_as_many_examples_as_it_is_told():
    squares = [mean_squares(PROBLEM, BASE, TUNED, n)["q_proj"][0] for n in (4, None)]
    assert np.abs(squares[0] / squares[1] - 1).max() > 0.01


def test_antidote_rounds_the_count_up_but_not_past_a_whole_number():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 3)), jnp.float32)
    for fraction, count in ((0.01, 1), (0.1, 1), (0.3, 3), (0.31, 4)):
        pruned = prune(weight, jnp.ones((1, 10)), fraction)
        np.testing.assert_array_equal(np.sum(np.asarray(pruned) == 0, axis=1), count)


def test_antidote_leaves_training_undisturbed():
    changed = {
        field.name
        for field in dataclasses.fields(Method)
        if getattr(antidote(), field.name) != getattr(Method("plain"), field.name)
    }
    assert not changed & {"gradient", "optimizer", "mix", "prepare"}
