"""SBR in training: the gradient of a step, and do states stay where they were?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from sbr_case import (
    BASE,
    FRESH,
    KEY,
    MOVED,
    PROBLEM,
    REFERENCE,
    STATE,
    WIDTH,
    loss_and_gradient,
)
from trees import vector

from sbr_jax.data.batches import batch
from sbr_jax.methods.base import replay_gradient, task_gradient
from sbr_jax.methods.sbr import sbr
from sbr_jax.training.step import TrainState, compiled_step, make_step

MEDICAL = tiny.dataset(10, 64, shift=1)
TASK = {**batch(MEDICAL, 8, 0, 0), "row": np.arange(8, dtype=np.int32)}


def hook(method, problem=PROBLEM, name="gradient"):
    return jax.jit(functools.partial(getattr(method, name), problem))


TOTAL = sbr(anchor_weight=3.0, reduction="sum")
gradient_of = hook(TOTAL)


def test_gradient_is_the_tasks_plus_lambda_times_the_anchors():
    found, extra, metrics = gradient_of(BASE, MOVED, STATE, TASK, KEY)
    task, _, plain = jax.jit(functools.partial(task_gradient, PROBLEM))(
        BASE, MOVED, {}, TASK, KEY
    )
    value, (pull, _) = loss_and_gradient(MOVED, REFERENCE, "sum")
    assert extra == {}
    wanted = vector(task) + 3 * vector(pull)
    np.testing.assert_allclose(vector(found), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(3 * vector(pull)).max() > 1e-1
    assert float(metrics["anchor"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)
    # Without weight it is the task's alone, and still says how far states are.
    off = learn(1, adapter=MOVED, weight=0.0)[1][0]
    assert off["grad_norm"] == pytest.approx(float(optax.tree.norm(task)), rel=1e-5)
    assert off["anchor"] * WIDTH == pytest.approx(float(value), rel=1e-5)


@pytest.mark.thorough
def test_a_repair_is_anchored_as_well():
    safe = batch(PROBLEM.calibration, 8, 0, 0)
    args = (BASE, MOVED, STATE, TASK, safe, jnp.float32(2), KEY)
    found, _, metrics = hook(TOTAL, name="replay_gradient")(*args)
    plain = jax.jit(functools.partial(replay_gradient, PROBLEM))(*args)[0]
    pull = loss_and_gradient(MOVED, REFERENCE, "sum")[1][0]
    wanted = vector(plain) + 3 * vector(pull)
    np.testing.assert_allclose(vector(found), wanted, rtol=1e-4, atol=1e-4)
    assert {"loss", "safety_loss", "anchor"} == set(metrics)


@functools.cache
def stepper(weight=50.0):
    method = sbr(anchor_weight=weight)
    optimizer = method.optimizer(PROBLEM, FRESH, 0.01)
    step = make_step(PROBLEM, method.gradient, optimizer)
    return optimizer, compiled_step(step)


def learn(steps, *, adapter=FRESH, state=STATE, key=KEY, **options):
    optimizer, step = stepper(**options)
    adapter = jax.tree.map(jnp.copy, adapter)
    train, history = TrainState(adapter, optimizer.init(adapter), jnp.int32(0)), []
    for index in range(steps):
        drawn = batch(MEDICAL, 8, 0, index)
        train, metrics = step(BASE, train, state, drawn, key)
        history.append(jax.device_get(metrics))
    return train.adapter, history


def test_microbatches_count_the_anchors_once():
    """SGD at rate 1 shows the gradient itself, which Adam would rescale."""
    whole, _, metrics = gradient_of(BASE, MOVED, STATE, TASK, KEY)
    problem = tiny.changed(PROBLEM, accumulation=4)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    step = jax.jit(make_step(problem, TOTAL.gradient, optimizer, accumulation=4))
    train = TrainState(MOVED, optimizer.init(MOVED), jnp.int32(0))
    after, found = step(BASE, train, STATE, batch(MEDICAL, 8, 0, 0), KEY)
    wanted = vector(MOVED) - vector(whole)
    np.testing.assert_allclose(vector(after.adapter), wanted, rtol=1e-4, atol=1e-4)
    for name in ("loss", "anchor"):
        assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


def test_the_reference_outlives_a_domain():
    adapter, state = sbr().end_domain(PROBLEM, BASE, MOVED, STATE, KEY)
    assert adapter is MOVED
    assert state["anchor"] is STATE["anchor"]


def test_the_anchors_pass_has_no_dropout():
    problem = tiny.changed(PROBLEM, lora_dropout=0.5)
    run = hook(sbr(), problem)
    values = [run(BASE, MOVED, STATE, TASK, jax.random.key(seed))[2] for seed in (0, 1)]
    assert float(values[0]["loss"]) != float(values[1]["loss"])
    assert float(values[0]["anchor"]) == float(values[1]["anchor"])
    value = float(loss_and_gradient(MOVED, REFERENCE)[0])
    assert float(values[0]["anchor"]) == pytest.approx(value, rel=1e-5)
