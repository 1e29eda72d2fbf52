"""A trust region's ε from a measured divergence: the controller, the rows, the end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import slow_parts
from methods_case import SETTINGS, STUDY, program, without_diagnostics
from trees import jitter, vector

from sbr_jax.data.batches import batch, take
from sbr_jax.methods import _kl_budget
from sbr_jax.methods._kl_budget import next_epsilon
from sbr_jax.methods._trust import with_trust_region
from sbr_jax.methods.lazy import lazy
from sbr_jax.training.program import init_adapter, insert
from sbr_jax.typing import UserError

BASE, KEY, STEPS = STUDY.model.params, jax.random.key(0), 40
FRESH = init_adapter(STUDY, SETTINGS, 0)


# --- the controller -------------------------------------------------------------------


def slow_next(epsilon, used, measured, budget):
    if used <= 0 or measured <= 0:
        return epsilon
    target = used * budget / measured
    found = min(max(target, epsilon / 4), 4 * epsilon)
    return min(max(found, budget / 1e8), 1e8 * budget)


control = jax.jit(next_epsilon)


def test_the_rule_is_its_slow_twin_and_bounded():
    rng = np.random.default_rng(0)
    for _ in range(200):
        budget, measured, used = 10.0 ** rng.uniform(-6, 2, 3)
        epsilon = budget * 10.0 ** rng.uniform(-8, 8)
        used, measured = (x * (rng.random() > 0.1) for x in (used, measured))
        args = np.array([epsilon, used, measured, budget], np.float32)
        found = float(control(*args))
        np.testing.assert_allclose(found, slow_next(*args.astype(float)), rtol=2e-6)
        assert epsilon / 4.001 <= found <= 4.001 * epsilon
    for place, bad, kept in ((1, np.inf, 1.0), (2, np.inf, 0.25), (1, np.nan, 1.0)):
        args = np.ones(4, np.float32)
        args[place] = bad
        assert control(*args) == kept
    assert control(1.0, 1.0, np.nan, 1.0) == 1.0


@pytest.mark.parametrize(("slope", "power"), [(1e-4, 0.7), (1.0, 1.0), (1e4, 1.5)])
def test_a_closed_loop_ends_at_the_budget_from_anywhere(slope, power):
    """d = slope · q^power and a region that binds: however wrong the first ε is."""
    budget = 0.1
    for start in (1e-6, 0.1, 1e4):
        epsilon, seen = np.float32(start), []
        for _ in range(30):
            used = np.float32(epsilon)
            measured = np.float32(slope * used**power)
            seen.append(measured)
            epsilon = np.asarray(control(epsilon, used, measured, budget))
        np.testing.assert_allclose(seen[-1], budget, rtol=1e-2)


# --- the rows -------------------------------------------------------------------------


def test_held_out_rows_are_in_nothing_else():
    problem = tiny.problem(STUDY.model.apply_fn, STUDY.calibration, batch_size=8)
    rows = {bytes(r) for r in _kl_budget.held_out_rows(problem).tokens}
    own = {bytes(r) for r in _kl_budget.without_held_out(problem).calibration.tokens}
    whole = {bytes(r) for r in STUDY.calibration.tokens}
    assert len(rows) == 6
    assert rows | own == whole
    assert not rows & own
    method = program("lean:kl-budget").method
    mixed = method.mix(problem, STUDY.domains["medical"].train, 0)
    assert {bytes(r) for r in mixed.tokens[mixed.tied >= 0]} == own
    state = method.init(problem, BASE, FRESH, KEY)
    assert state["reference"].top.rest.shape[0] == len(own)
    # What is read of another problem's rows is refused, as for any reference.
    method.begin_domain(problem, BASE, state, mixed, KEY)
    few = dataclasses.replace(problem, calibration=take(STUDY.calibration, range(20)))
    with pytest.raises(UserError, match="of another calibration set"):
        method.begin_domain(few, BASE, state, mixed, KEY)
    three = dataclasses.replace(problem, calibration=take(STUDY.calibration, range(3)))
    with pytest.raises(UserError, match="kl_budget: expected a calibration set of at"):
        method.init(three, BASE, FRESH, KEY)


def test_what_is_measured_is_the_slow_divergence_of_those_rows():
    problem = tiny.problem(STUDY.model.apply_fn, STUDY.calibration)
    rows, moved = _kl_budget.held_out_rows(problem), jitter(FRESH, 1, 0.3)
    state = _kl_budget.first_state(problem, BASE, 0.25)
    found = _kl_budget.measure(problem, BASE, moved, state["held"])
    drawn = {"tokens": rows.tokens, "mask": rows.mask}
    np.testing.assert_allclose(found, slow_parts(moved, drawn)[1].mean(), rtol=1e-4)
    at_start = _kl_budget.measure(problem, BASE, FRESH, state["held"])
    assert abs(float(at_start)) < 1e-6
    np.testing.assert_allclose(state["epsilon"], 0.25 * rows.mask.sum(1).mean())


# --- training -------------------------------------------------------------------------


@functools.cache
def made(**options):
    settings = tiny.config(steps_per_domain=STEPS)
    options = {"max_rank": 12, "kl_weight": 0.0, "refresh_every": 4, **options}
    return tiny.program("lean", settings, STUDY, **options)


def refreshed(method, *args):
    assert method.refresh is not None
    return method.refresh(*args)


def walked(found, start=None, until=STEPS):
    """Steps of a domain with refreshes, from the start or from what was kept."""
    method, problem = found.method, found.problem
    if start is None:
        adapter = jax.tree.map(jnp.copy, FRESH)
        state = without_diagnostics(method.init(problem, BASE, adapter, KEY))
        start = (found.start(adapter, state), state, 0)
    train, state, first = start
    data, told = method.mix(problem, STUDY.domains["medical"].train, 0), []
    for step in range(first, until):
        due = method.refresh is not None and step and step % method.refresh_every == 0
        if due:
            state = refreshed(method, problem, BASE, train.adapter, state, KEY)
            opt_state = insert(train.opt_state, state)
            train = dataclasses.replace(train, opt_state=opt_state)
        train, metrics = found.step(BASE, train, state, batch(data, 8, 0, step), KEY)
        told.append(jax.device_get(metrics))
    return train, state, told


@functools.cache
def whole(**options):
    """A domain from its beginning to its end, walked once for all tests."""
    return walked(made(**options))


def divergence_at_the_end(**options):
    """d after a domain, and the ε and d of every step."""
    problem, (train, _, told) = made(**options).problem, whole(**options)
    held = _kl_budget.first_state(problem, BASE, 1.0)["held"]
    final = float(_kl_budget.measure(problem, BASE, train.adapter, held))
    return final, told


FREE = {"kl_budget": 1e6}


@functools.cache
def bound():
    """A budget of three tenths of what a domain uses without one."""
    free, _ = divergence_at_the_end(**FREE)
    return {"kl_budget": 0.3 * free, "refresh_subspace": True}


def test_the_measured_divergence_ends_within_a_factor_of_its_budget():
    """A factor of 1.5, where without a region it is more than three times the budget.

    A tenth would be out of reach here: what a basis of 12 directions, from 18 rows,
    does not cover moves by more.
    """
    budget = bound()["kl_budget"]
    final, told = divergence_at_the_end(**bound())
    assert budget / 1.5 <= final <= 1.5 * budget
    epsilons = np.array([float(m["epsilon"]) for m in told])
    measured = np.array([float(m["measured_kl"]) for m in told])
    assert np.all(measured[:4] == 0)
    assert len(set(measured)) == STEPS // 4
    assert len(set(epsilons)) >= STEPS // 8
    # Inside the region of its own ε after every step, as the next one tells.
    used = np.array([float(m["budget"]) for m in told])
    same = np.flatnonzero(np.diff(epsilons) == 0) + 1
    assert used[same].max() <= 1 + 1e-3


def test_a_region_that_stays_where_it_was_found_holds_less():
    """Its basis covers B at B = 0 alone; renewed, A counts as well."""
    method = made(**FREE).method
    problem, moved = made(**FREE).problem, jitter(FRESH, 1, 0.3)
    state = without_diagnostics(method.init(problem, BASE, FRESH, KEY))
    size = tiny.CONFIG.width * SETTINGS.training.lora_rank  # B comes first in a unit.

    def of_a(found):
        basis = np.asarray(found["subspace"].basis["q_proj"])
        return float((basis[:, size:] ** 2).sum())

    assert of_a(state) == 0.0
    kept = refreshed(method, problem, BASE, moved, state, KEY)
    assert of_a(kept) == 0.0
    renewing = made(**FREE, refresh_subspace=True).method
    found = refreshed(renewing, problem, BASE, moved, state, KEY)
    assert of_a(found) > 0.5
    assert jax.tree.structure(found) == jax.tree.structure(state)


def test_a_stop_between_two_measurements_changes_no_bit():
    found = made(**bound())
    train, state, _ = walked(found, until=STEPS // 2 + 1)
    # As a checkpoint holds them: arrays of the host, of the shapes that are told.
    told = found.method.state_shapes(found.problem, BASE, FRESH)
    kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(told)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == kinds
    train, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (train, state))
    rest = walked(found, (train, state, STEPS // 2 + 1))
    for ours, theirs in zip(rest[:2], whole(**bound())[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_end_of_a_domain_measures_and_tells():
    found = made(**FREE)
    train, state, _ = walked(found, until=3)
    args = (found.problem, BASE, train.adapter, state, KEY)
    adapter, after = found.method.end_domain(*args)
    assert adapter is train.adapter
    held = state["kl_budget"]["held"]
    wanted = _kl_budget.measure(found.problem, BASE, train.adapter, held)
    told = after["diagnostics"]
    np.testing.assert_array_equal(told["measured_kl"], [wanted])
    np.testing.assert_array_equal(told["epsilon"], [after["kl_budget"]["epsilon"]])
    assert state["kl_budget"]["epsilon"] != after["kl_budget"]["epsilon"]


def test_it_goes_around_a_method_that_refreshes_on_the_same_clock():
    inner = lazy(refresh_every=4, top_tokens=4)
    options = {"epsilon": None, "max_rank": 6, "kl_budget": 0.1}
    problem, moved = made(**FREE).problem, jitter(FRESH, 1, 0.3)
    method = with_trust_region(inner, refresh_every=4, **options)
    state = method.init(problem, BASE, FRESH, KEY)
    found = refreshed(method, problem, BASE, moved, state, KEY)
    assert np.abs(vector(found["alignment"]) - vector(state["alignment"])).max() > 1e-4
    assert found["kl_budget"]["measured"] > 0
    with pytest.raises(UserError, match="expected 4, which lazy renews its state by"):
        with_trust_region(inner, refresh_every=8, **options)
