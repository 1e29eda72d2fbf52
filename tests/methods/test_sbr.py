"""SBR: the right prompts, their states and loss against a twin in NumPy, a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from trees import jitter, vector

from sbr_jax import models
from sbr_jax.data.batches import TokenDataset, batch, concatenate, take
from sbr_jax.methods.base import Method
from sbr_jax.methods.sbr import (
    anchor_prompts,
    hidden_anchor_loss,
    prompt_states,
    reference_states,
    sbr,
)
from sbr_jax.typing import UserError

ANSWER = tiny.VOCAB - 1  # A token that no prompt of `requests` holds.
WIDTH = tiny.CONFIG.width


def requests(seed, size, shortest=2, longest=4):
    """Random prompts of several lengths, each answered by two tokens ANSWER."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((size, tiny.LENGTH), np.int32)
    mask = np.zeros((size, tiny.LENGTH), np.float32)
    for row, length in enumerate(rng.integers(shortest, longest + 1, size)):
        tokens[row, :length] = rng.integers(1, ANSWER, length)
        tokens[row, length : length + 2] = ANSWER
        mask[row, length : length + 2] = 1
    return TokenDataset(tokens, mask)


MODEL = tiny.model()
APPLY, BASE = MODEL.apply_fn, MODEL.params
HARMFUL = requests(4, 12)
KEY = jax.random.key(0)
PROBLEM = tiny.problem(
    apply_fn=APPLY,
    steps_per_domain=6,
    batch_size=8,
    calibration=tiny.dataset(1, 24, shift=0),
    harmful=HARMFUL,
    weight_decay=0.0,
)
FRESH = models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0, targets="(q|v)_proj")


MOVED = jitter(FRESH, 1)
ANCHORS = anchor_prompts(HARMFUL, 8, KEY)
REFERENCE = reference_states(PROBLEM, BASE, FRESH, ANCHORS)
STATE = {"anchor": {"prompts": ANCHORS, "reference": REFERENCE}}

states_of = jax.jit(functools.partial(prompt_states, APPLY))


@functools.partial(jax.jit, static_argnames="reduction")
def loss_and_gradient(adapter, reference, reduction="mean"):
    return jax.value_and_grad(
        lambda a, r: hidden_anchor_loss(PROBLEM, BASE, a, ANCHORS, r, reduction),
        argnums=(0, 1),
    )(adapter, reference)


def prompts_of(found):
    """The prompts as a list of tuples without padding."""
    pairs = zip(np.asarray(found["tokens"]), found["last"], strict=True)
    return [tuple(row[: int(last) + 1].tolist()) for row, last in pairs]


hidden_of = jax.jit(lambda b, a, x: APPLY(b, a, x, return_hidden=True)[1])


def prompts_in(data):
    first = np.argmax(data.mask > 0, axis=1)
    pairs = zip(data.tokens, first, strict=True)
    return {tuple(row[:end].tolist()) for row, end in pairs}


# --- drawing anchors ----------------------------------------------------------------


def test_anchors_are_distinct_harmful_prompts_without_their_answers(capfd):
    found = anchor_prompts(HARMFUL, 8, KEY)
    assert found["tokens"].dtype == found["last"].dtype == jnp.int32
    drawn = prompts_of(found)
    assert len(set(drawn)) == 8
    assert set(drawn) <= prompts_in(HARMFUL)
    assert not (np.asarray(found["tokens"]) == ANSWER).any()
    after = (
        np.arange(found["tokens"].shape[1])[None] > np.asarray(found["last"])[:, None]
    )
    assert after.any()
    assert not np.asarray(found["tokens"])[after].any()
    # Harmful text must not end up in a log.
    assert capfd.readouterr() == ("", "")


def test_the_draw_is_nested_depends_on_the_key_and_keeps_its_shape():
    eight, three = (prompts_of(anchor_prompts(HARMFUL, n, KEY)) for n in (8, 3))
    assert eight[:3] == three
    others = [anchor_prompts(HARMFUL, 3, jax.random.key(seed)) for seed in range(8)]
    assert len({tuple(prompts_of(other)) for other in others}) > 4
    # A set where most draws miss the longest prompt: seeds could not be stacked.
    uneven = concatenate([requests(1, 15, 2, 3), requests(2, 1, 7, 7)])
    drawn = [anchor_prompts(uneven, 2, jax.random.key(seed)) for seed in range(6)]
    assert {x["tokens"].shape for x in drawn} == {(2, 7)}
    assert min(int(x["last"].max()) for x in drawn) < 6


def test_one_prompt_with_many_answers_is_one_anchor():
    again = TokenDataset(
        np.where(HARMFUL.mask > 0, 7, HARMFUL.tokens).astype(np.int32), HARMFUL.mask
    )
    doubled = concatenate([HARMFUL, again])
    assert prompts_of(anchor_prompts(doubled, 12, KEY)) == prompts_of(
        anchor_prompts(HARMFUL, 12, KEY)
    )
    with pytest.raises(UserError, match=r"at least 13 distinct .* got 12"):
        anchor_prompts(doubled, 13, KEY)


# --- the states and the loss --------------------------------------------------------


def test_states_are_those_of_each_prompt_alone():
    """Every prompt by itself, without padding: the state at its last position."""
    found = np.asarray(states_of(BASE, MOVED, ANCHORS))
    assert found.shape == (8, WIDTH)
    alone = [
        np.asarray(hidden_of(BASE, MOVED, np.array([prompt], np.int32)))[0, -1]
        for prompt in prompts_of(ANCHORS)
    ]
    # States of size 1 whose sums run in another order.
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)
    earlier = {**ANCHORS, "last": ANCHORS["last"] - 1}
    assert np.abs(found - np.asarray(states_of(BASE, MOVED, earlier))).max() > 0.1
    # They are what the unembedding reads: logits of the first answer token.
    logits = jax.jit(APPLY)(BASE, MOVED, ANCHORS["tokens"])
    read = np.asarray(logits)[np.arange(8), np.asarray(ANCHORS["last"])]
    head = np.asarray(BASE["embed"]).T if tiny.CONFIG.tied else np.asarray(BASE["head"])
    np.testing.assert_allclose(found @ head, read, atol=1e-4)


def test_reference_is_the_aligned_model_in_float32():
    state = sbr().init(PROBLEM, BASE, FRESH, KEY)
    assert state["anchor"]["reference"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    # A fresh adapter is null, so no adapter at all gives the same.
    without = reference_states(PROBLEM, BASE, None, ANCHORS)
    np.testing.assert_allclose(state["anchor"]["reference"], without, atol=1e-6)
    learned = reference_states(PROBLEM, BASE, MOVED, ANCHORS)
    assert np.abs(np.asarray(learned - without)).max() > 1e-2


def slow_loss(adapter, reduction):
    total = 0.0
    for prompt in prompts_of(ANCHORS):
        tokens = np.array([prompt], np.int32)
        here, there = (
            np.asarray(hidden_of(BASE, a, tokens))[0, -1].astype(np.float64)
            for a in (adapter, FRESH)
        )
        total += sum((x - y) ** 2 for x, y in zip(here, there, strict=True))
    total /= len(prompts_of(ANCHORS))
    return total / WIDTH if reduction == "mean" else total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_its_twin(reduction):
    value, _ = loss_and_gradient(MOVED, REFERENCE, reduction)
    assert value.dtype == jnp.float32
    wanted = slow_loss(MOVED, reduction)
    assert wanted > 1e-3
    assert float(value) == pytest.approx(wanted, rel=1e-4)


def test_gradient_reaches_the_adapter_only():
    _, (grads, to_reference) = loss_and_gradient(MOVED, REFERENCE)
    assert jax.tree.structure(grads) == jax.tree.structure(FRESH)
    assert not np.asarray(to_reference).any()
    rng, flat, h = np.random.default_rng(0), vector(grads), 1e-2
    leaves, structure = jax.tree.flatten(MOVED)
    for _ in range(3):
        steps = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        size = np.linalg.norm(vector(steps))
        up, down = (
            slow_loss(
                jax.tree.unflatten(
                    structure,
                    [x + s * h / size * d for x, d in zip(leaves, steps, strict=True)],
                ),
                "mean",
            )
            for s in (1, -1)
        )
        slope = flat @ vector(steps) / size
        # Rounding of float32 states, divided by 2h; curvature is of order h².
        assert slope == pytest.approx((up - down) / (2 * h), rel=0.02, abs=1e-4)


# --- in training ----------------------------------------------------------------------

TASK = {
    **batch(tiny.dataset(10, 64, shift=1), 8, 0, 0),
    "row": np.arange(8, dtype=np.int32),
}


def hook(method, problem=PROBLEM):
    return jax.jit(functools.partial(method.gradient, problem))


def test_gradient_is_the_tasks_plus_lambda_times_the_anchors():
    method = sbr(anchor_weight=3.0, reduction="sum")
    found, extra, metrics = hook(method)(BASE, MOVED, STATE, TASK, KEY)
    task, _, plain = hook(Method("plain"))(BASE, MOVED, {}, TASK, KEY)
    value, (pull, _) = loss_and_gradient(MOVED, REFERENCE, "sum")
    assert extra == {}
    wanted = vector(task) + 3 * vector(pull)
    np.testing.assert_allclose(vector(found), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(3 * vector(pull)).max() > 1e-1
    assert float(metrics["anchor"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)


def test_the_reference_outlives_a_domain():
    adapter, state = sbr().end_domain(PROBLEM, BASE, MOVED, STATE, KEY)
    assert adapter is MOVED
    assert state["anchor"] is STATE["anchor"]


def test_the_anchors_pass_has_no_dropout():
    run = hook(sbr(), tiny.changed(PROBLEM, lora_dropout=0.5))
    values = [run(BASE, MOVED, STATE, TASK, jax.random.key(seed))[2] for seed in (0, 1)]
    assert float(values[0]["loss"]) != float(values[1]["loss"])
    assert float(values[0]["anchor"]) == float(values[1]["anchor"])
    value = float(loss_and_gradient(MOVED, REFERENCE)[0])
    assert float(values[0]["anchor"]) == pytest.approx(value, rel=1e-5)


# --- refusals -----------------------------------------------------------------------


def unanswered():
    mask = np.array(HARMFUL.mask)
    mask[3] = 0
    return TokenDataset(HARMFUL.tokens, mask)


def unprompted():
    mask = np.array(HARMFUL.mask)
    mask[[3, 4], 0] = 1
    return TokenDataset(HARMFUL.tokens, mask)


@pytest.mark.parametrize(
    ("harmful", "message"),
    [
        (None, "anchors: expected harmful requests .* got None: give the study"),
        (take(HARMFUL, []), "anchors: expected harmful .* got an empty set: give"),
        (take(HARMFUL, range(5)), "at least 8 distinct .* got 5: .* lower `anchors`"),
        (unanswered(), "got 1 of 12 without: remove"),
        (unprompted(), "got 2 of 12 without: remove"),
    ],
)
def test_harmful_data_that_cannot_anchor_is_refused(harmful, message):
    problem = dataclasses.replace(PROBLEM, harmful=harmful)
    with pytest.raises(UserError, match=message) as caught:
        sbr().init(problem, BASE, FRESH, KEY)
    assert "\n" not in str(caught.value)
