"""Lisa: its rule against a slow twin, and does it take turns?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from alignment_case import (
    ADAPTER,
    BASE,
    KEY,
    PROBLEM,
    SAFE,
    TASK,
    arrays,
    moved,
    toy_loss,
)
from trees import stack, vector

from sbr_jax.data.batches import batch
from sbr_jax.methods.base import adamw, draw_rows
from sbr_jax.methods.lisa import ALIGNMENT, USER, lisa
from sbr_jax.training import loop
from sbr_jax.training.step import compiled_step, make_step

LISA = lisa(proximal=0.7)
lisa_gradient = jax.jit(LISA.gradient, static_argnums=0)
ROWS = {**arrays(TASK), "row": jnp.arange(8, dtype=jnp.int32)}


def started(phase=ALIGNMENT, age=0, other=ADAPTER, problem=PROBLEM):
    state = LISA.init(problem, BASE, other, KEY)
    assert (int(state["phase"]), int(state["age"])) == (ALIGNMENT, 0)
    return {**state, "phase": jnp.int32(phase), "age": jnp.int32(age)}


@pytest.mark.parametrize("age", [0, 1])
@pytest.mark.parametrize("phase", [USER, ALIGNMENT])
def test_lisa_gradient_equals_its_twin(phase, age):
    """Warm-up is 0.3 of the three steps here: over at age 1, not at age 0."""
    adapter, state = moved(1), started(phase, age, moved(2))
    grads, extra, metrics = lisa_gradient(PROBLEM, BASE, adapter, state, ROWS, KEY)
    safe = draw_rows(PROBLEM, state["safe"], ROWS, jax.random.split(KEY)[0], 8)
    loss, wanted = toy_loss(BASE, adapter, safe if phase == ALIGNMENT else arrays(TASK))
    drift = vector(adapter) - vector(moved(2))
    pull = 0.7 * drift if age else 0.0
    np.testing.assert_allclose(vector(grads), vector(wanted) + pull, atol=5e-6)
    assert extra == {}
    assert float(metrics["drift"]) == pytest.approx(drift @ drift, rel=1e-5)
    assert float(metrics["aligning"]) == phase
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("share", "ages"), [(0.0, {0: True}), (0.1, {19: False, 20: True})]
)
def test_lisas_warm_up_is_its_share_of_the_steps(share, ages):
    """Step 20 is the 21st: it is not among the first tenth of 200."""
    problem = tiny.changed(PROBLEM, steps_per_domain=200)
    method = lisa(warmup_share=share, proximal=0.7)
    hook = jax.jit(functools.partial(method.gradient, problem))
    adapter = moved(1)
    drift = vector(adapter) - vector(moved(2))
    wanted = vector(toy_loss(BASE, adapter, arrays(TASK))[1])
    for age, pulled in ages.items():
        state = started(USER, age, moved(2))
        grads = hook(BASE, adapter, state, ROWS, KEY)[0]
        pull = 0.7 * drift if pulled else 0.0
        np.testing.assert_allclose(vector(grads), wanted + pull, atol=5e-6)


def run_lisa(method, steps, watch=None):
    """A domain as the pipeline runs it: the loop's result, and its compiled step."""
    problem = tiny.changed(PROBLEM, steps_per_domain=steps)
    optimizer = adamw(problem, ADAPTER, 1e-2)
    step = compiled_step(make_step(problem, method.gradient, optimizer))
    adapter = jax.tree.map(jnp.copy, ADAPTER)
    train = loop.TrainState(adapter, optimizer.init(adapter), jnp.int32(0))

    def refresh(now):
        new = method.refresh(problem, BASE, now.train.adapter, now.state, KEY)
        if watch is not None:
            watch(now.step, vector(now.train.adapter), now.state, new)
        return dataclasses.replace(now, state=new)

    done = loop.train(
        lambda train, state, n: step(BASE, train, state, batch(TASK, 8, 0, n), KEY),
        loop.Progress(train, method.init(problem, BASE, adapter, KEY)),
        steps,
        where="lisa",
        refresh=loop.Every(method.refresh_every, refresh),
        quiet=True,
    )
    return done, step


def test_lisa_takes_turns_and_keeps_the_weights_of_the_last_switch():
    switches = []

    def watch(number, weights, old, new):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        assert int(new["age"]) == number
        if int(old["phase"]) == int(new["phase"]):
            assert new["other"] is old["other"]
        else:
            np.testing.assert_array_equal(vector(new["other"]), weights)
            switches.append(number)

    done, step = run_lisa(lisa(period=5, alignment_share=0.4), 12, watch)
    turns = done.history["aligning"]
    np.testing.assert_array_equal(turns, [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1])
    assert switches == [2, 5, 7, 10]
    # The drift is zero in the first step of a turn, and in no other.
    drift = np.asarray(done.history["drift"])
    np.testing.assert_array_equal(np.flatnonzero(drift == 0), [0, *switches])
    assert step._cache_size() == 1


def test_lisas_cycle_is_met_by_few_refreshes():
    assert lisa().refresh_every == 1
    # The published cycle, 100 + 900 steps, is met by one refresh in 100 steps.
    assert lisa(period=1000).refresh_every == 100
    assert lisa(period=12, alignment_share=0.5).refresh_every == 6


def test_lisas_microbatches_add_up():
    adapter, found = moved(), []
    for parts in (1, 2):
        problem = tiny.changed(PROBLEM, accumulation=parts)
        optimizer = optax.with_extra_args_support(optax.sgd(1.0))
        step = jax.jit(make_step(problem, LISA.gradient, optimizer, accumulation=parts))
        train = loop.TrainState(adapter, optimizer.init(adapter), jnp.int32(0))
        for phase in (USER, ALIGNMENT):
            after, told = step(BASE, train, started(phase, 1), arrays(TASK), KEY)
            found.append((vector(after.adapter), float(told["loss"])))
    for whole, halves in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(whole[0], halves[0], atol=5e-6)
        assert whole[1] == pytest.approx(halves[1], rel=1e-5)


def test_lisas_seeds_may_be_in_different_phases_when_mapped():
    adapters = [moved(1), moved(2)]
    states = [started(phase, 1) for phase in (USER, ALIGNMENT)]

    gradient = functools.partial(LISA.gradient, PROBLEM)
    mapped = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0, None, None)))
    together, _, metrics = mapped(BASE, stack(adapters), stack(states), ROWS, KEY)
    np.testing.assert_array_equal(metrics["aligning"], [0, 1])
    for i, (adapter, state) in enumerate(zip(adapters, states, strict=True)):
        alone, _, _ = lisa_gradient(PROBLEM, BASE, adapter, state, ROWS, KEY)
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        np.testing.assert_allclose(vector(mine), vector(alone), atol=2e-6)


def test_lisas_data_may_be_longer_than_the_users():
    more = ((0, 0), (0, 3))
    wide = tiny.TokenDataset(np.pad(SAFE.tokens, more), np.pad(SAFE.mask, more))
    problem, found = dataclasses.replace(PROBLEM, calibration=wide), []
    for one in (PROBLEM, problem):
        state = started(problem=one)
        found.append(lisa_gradient(one, BASE, moved(), state, ROWS, KEY)[0])
    np.testing.assert_allclose(*map(vector, found), atol=2e-6)


def test_lisas_clock_starts_anew_in_each_domain():
    here, late = moved(), started(USER, 7)
    adapter, state = LISA.end_domain(PROBLEM, BASE, here, late, KEY)
    assert adapter is here
    assert (int(state["phase"]), int(state["age"])) == (ALIGNMENT, 0)
    np.testing.assert_array_equal(vector(state["other"]), vector(here))
    assert state["other"]["q_proj"].lora_b is not here["q_proj"].lora_b
    assert jax.tree.structure(state) == jax.tree.structure(late)
