"""The same questions to every row: does it act, is it deterministic, does it refuse?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from methods_case import (
    CONTRIBUTED,
    SETTINGS,
    STUDY,
    contributed,
    learn,
    learned,
    midway,
    program,
    registered,
    without_diagnostics,
)
from tiers import few
from trees import stack, vector

from sbr_jax.data.batches import batch
from sbr_jax.methods import METHODS, VARIANTS, Method, build
from sbr_jax.methods._ssi import perturb_b
from sbr_jax.methods.base import task_gradient
from sbr_jax.training.program import init_adapter
from sbr_jax.training.step import TrainState, make_step
from sbr_jax.typing import UserError

pytestmark = pytest.mark.usefixtures(registered.__name__)
ASKED = [*METHODS, CONTRIBUTED]
ROWS = [*ASKED, *VARIANTS]
# Plain steps are mapped by test_pipeline, those in phases by test_lisa.
MAPPED = ["safeanchor-exact", "unified"]
# Rows that differ from their method in the monitor or the repair only.
SAME_STEPS = {
    "safeanchor-exact:csm-only": "plain",
    "safeanchor-exact:no-csm": "safeanchor-exact",
    "safeanchor-exact:replay-bypass": "safeanchor-exact",
    "safeanchor:no-csm": "safeanchor",
}


@pytest.mark.parametrize("row", few(ROWS, ASKED))
def test_row_changes_the_result_and_leaves_the_base_alone(row):
    before = jax.tree.map(np.array, STUDY.model.params)
    shipped, metrics = learned(row)[:2]
    assert all(np.isfinite(v) for v in metrics.values())
    assert metrics["finite"] == 1
    # Whoever projects tells what of the task's own part of the step is inside.
    assert ("safety_task" in metrics) == ("safety_update" in metrics)
    result = vector(shipped)
    if row in SAME_STEPS:
        np.testing.assert_array_equal(result, vector(learned(SAME_STEPS[row])[0]))
        ours, theirs = build(row), build(SAME_STEPS[row])
        changed = ours.monitored != theirs.monitored
        assert changed or row == "safeanchor-exact:replay-bypass"
    elif row != "plain":
        assert np.abs(result - vector(learned("plain")[0])).max() > 1e-5
    jax.tree.map(np.testing.assert_array_equal, before, STUDY.model.params)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "row", sorted(set(VARIANTS) - set(SAME_STEPS) - {"safeanchor-exact:keep-base"})
)
def test_ablation_differs_from_its_method(row):
    parent = VARIANTS[row][0]
    difference = vector(learned(row)[0]) - vector(learned(parent)[0])
    assert np.abs(difference).max() > 1e-6


@pytest.mark.parametrize("row", ASKED)
def test_row_is_deterministic_and_seeds_differ(row):
    once, other = (learn(row, seed, domains=1) for seed in (0, 1))
    np.testing.assert_array_equal(vector(learned(row)[3][0]), vector(once[3][0]))
    assert np.abs(vector(once[0]) - vector(other[0])).max() > 1e-3


@pytest.mark.parametrize("row", few(ASKED, MAPPED))
def test_row_works_with_mapped_seeds(row):
    found = program(row)
    base, seeds = STUDY.model.params, (0, 1)
    keys = [jax.random.key(seed) for seed in seeds]
    adapters = [init_adapter(STUDY, SETTINGS, seed) for seed in seeds]
    states = [
        without_diagnostics(found.method.init(found.problem, base, a, k))
        for a, k in zip(adapters, keys, strict=True)
    ]
    domain = STUDY.domains["medical"].train
    batches = [
        batch(found.method.mix(found.problem, domain, seed), 8, seed, 0)
        for seed in seeds
    ]

    # Off B = 0: a pull to the aligned model is nothing but rounding there, which Adam's
    # first step would make as large as the learning rate.
    moved = [perturb_b(k, a, 1.0) for a, k in zip(adapters, keys, strict=True)]

    def starts():
        # The step gives its arguments away.
        copies = jax.tree.map(jnp.copy, moved)
        return [found.start(a, s) for a, s in zip(copies, states, strict=True)]

    together, metrics = found.mapped_step(
        base, stack(starts()), stack(states), stack(batches), jnp.stack(keys)
    )
    assert metrics["loss"].shape == (2,)
    for i, one in enumerate(starts()):
        alone, _ = found.step(base, one, states[i], batches[i], keys[i])
        mine = jax.tree.map(lambda x, i=i: x[i], together.adapter)
        # A thousandth of the learning rate.
        np.testing.assert_allclose(vector(mine), vector(alone.adapter), atol=1e-5)


@pytest.mark.parametrize(
    ("row", "near"),
    [("adaptive-judge", 1e-6), ("lean", 2e-5), ("sbr", 1e-4), (CONTRIBUTED, 1e-5)],
)
def test_microbatches_add_up(row, near):
    """SGD at rate 1 shows the gradient itself, which Adam would rescale."""
    ends, optimizer = [], optax.with_extra_args_support(optax.sgd(1.0))
    for parts in (1, 2):
        settings = tiny.changed(SETTINGS, accumulation=parts)
        found, base, adapter, state, data = midway(row, settings=settings)
        gradient = found.method.gradient
        step = make_step(found.problem, gradient, optimizer, accumulation=parts)
        train = TrainState(adapter, optimizer.init(adapter), jnp.int32(0))
        args = (base, train, state, batch(data, 8, 0, 0), jax.random.key(7))
        after, metrics = jax.jit(step)(*args)
        ends.append({**jax.device_get(metrics), "adapter": vector(after.adapter)})
    for name, whole in ends[0].items():
        np.testing.assert_allclose(ends[1][name], whole, rtol=1e-4, atol=near)


@pytest.mark.parametrize(
    "row", few(["lean", "adaptive-judge", "asft", "sbr"], ["lean"])
)
def test_a_repair_is_the_step_and_the_safe_examples(row):
    found, base, adapter, state, data = midway(row)
    method, problem, key = found.method, found.problem, jax.random.key(7)
    drawn = {**batch(data, 8, 0, 0), "row": np.arange(8, dtype=np.int32)}
    safe = batch(STUDY.calibration, 8, 0, 0)

    @jax.jit
    def both(base, adapter):
        args = (problem, base, adapter, state, drawn)
        mended = method.replay_gradient(*args, safe, jnp.float32(2.0), key)
        pull = task_gradient(problem, base, adapter, {}, safe, key)[0]
        return mended, method.gradient(*args, key)[0], pull

    (mended, _, told), step, pull = both(base, adapter)
    wanted = vector(step) + 2.0 * vector(pull)
    np.testing.assert_allclose(vector(mended), wanted, rtol=1e-4, atol=2e-5)
    assert told["safety_loss"] > 0


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


SHAPED = [*METHODS, "safeanchor-exact:keep-base", "safeanchor-exact:random"]


@pytest.mark.parametrize("row", few(SHAPED, ["plain", "unified"]))
def test_shapes_are_those_of_the_state_that_is_computed(row):
    found = program(row)
    adapter = init_adapter(STUDY, SETTINGS, 0)
    given = jax.eval_shape(lambda *x: x, STUDY.model.params, adapter)
    told = found.method.state_shapes(found.problem, *given)
    leaves = jax.tree.leaves(told)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert kinds(told) == kinds(learned(row)[4])


@pytest.mark.parametrize("row", METHODS)
def test_a_method_has_its_name_and_may_be_monitored(row):
    assert METHODS[row]().name == build(row).name == row
    assert METHODS[row](monitored=True).monitored
    assert not METHODS[row](monitored=False).monitored


def test_rank_above_the_dimension_is_refused_before_any_work():
    with pytest.raises(UserError, match="max_rank: expected at most the 64"):
        tiny.program("safeanchor", SETTINGS, STUDY, max_rank=65)


def test_benign_control_needs_its_data():
    problem = dataclasses.replace(program("plain").problem, calibration_controls={})
    method = build("safeanchor-exact:benign", max_rank=4)
    adapter = init_adapter(STUDY, SETTINGS, 0)
    with pytest.raises(UserError, match="calibration_controls"):
        method.init(problem, STUDY.model.params, adapter, jax.random.key(0))


# --- the example of CONTRIBUTING.md ---------------------------------------------------


def test_the_block_makes_a_method_of_the_name_that_it_is_registered_under():
    method = build(CONTRIBUTED)
    assert isinstance(method, Method)
    assert contributed().noise().name == method.name == CONTRIBUTED
    assert "scale" in contributed().noise.__doc__


def test_its_hyper_parameter_decides_how_much():
    # A fresh A has no gradient of its own, and Adam makes a whole step of any noise
    # above its ε of 1e-8: this scale is well below.
    plain = vector(learned("plain")[0])
    faint = vector(learn(CONTRIBUTED, scale=1e-11)[0]) - plain
    loud = vector(learned(CONTRIBUTED)[0]) - plain
    assert np.linalg.norm(faint) < 0.1 * np.linalg.norm(loud)


def test_a_wrong_hyper_parameter_is_refused_by_name():
    for options, named in (
        ({"scale": -1.0}, "noise.scale to be a finite number above 0"),
        ({"scal": 0.1}, "unknown option of noise 'scal'; nearest: scale"),
    ):
        with pytest.raises(UserError, match=named):
            build(CONTRIBUTED, **options)
