"""Lazy: SafeGrad's surgery with a kept direction, and when it is renewed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from continual_case import (
    BASE,
    FRESH,
    KEY,
    MEDICAL,
    MOVED,
    OTHER,
    PROBLEM,
    TASK,
    hook,
    plain_gradient,
)
from trees import vector

from sbr_jax.methods._anchor import anchor_loss, anchored_set
from sbr_jax.methods.lazy import lazy
from sbr_jax.typing import UserError

# All of the calibration set and of the vocabulary: nothing is drawn, nothing is left.
WHOLE = {"kl_batch_size": 24, "top_tokens": tiny.VOCAB}


@functools.cache
def started(**options):
    method = lazy(**{**WHOLE, **options})
    return method, method.init(PROBLEM, BASE, FRESH, KEY)


@functools.cache
def alignment_gradient():
    """SafeGrad's, over the whole calibration set."""
    safe = anchored_set(PROBLEM, BASE, None)
    return jax.jit(jax.grad(lambda a: anchor_loss(PROBLEM.apply_fn, BASE, a, safe)))


@pytest.mark.parametrize("renew", ["refresh", "end_domain"])
def test_the_kept_direction_is_safegrads_where_it_was_renewed(renew):
    method, state = started()
    assert np.linalg.norm(vector(state["alignment"])) < 1e-5
    found = getattr(method, renew)(PROBLEM, BASE, OTHER, state, KEY)
    if renew == "end_domain":
        adapter, found = found
        assert adapter is OTHER
    wanted = vector(alignment_gradient()(OTHER))
    np.testing.assert_allclose(vector(found["alignment"]), wanted, rtol=1e-3, atol=1e-5)
    assert {name: found[name] for name in state if name != "alignment"} == {
        name: state[name] for name in state if name != "alignment"
    }


def test_a_step_resolves_conflicts_with_what_is_kept_and_adds_it():
    method, state = started(kl_weight=0.5)
    gradient, seen = hook(method), set()
    for adapter in (MOVED, OTHER):
        u = vector(plain_gradient(adapter, BASE, TASK)[1])
        for sign in (1.0, -1.0):
            kept = jax.tree.map(lambda x, s=sign: s * x, alignment_gradient()(OTHER))
            a = vector(kept)
            found = gradient(adapter, {**state, "alignment": kept}, TASK, KEY)
            grads, extra, metrics = found
            free = u - min(u @ a, 0.0) / (a @ a) * a
            np.testing.assert_allclose(vector(grads), free + 0.5 * a, atol=2e-5)
            assert extra == {}
            assert float(metrics["conflict"]) == (u @ a < 0)
            seen.add(float(metrics["conflict"]))
    assert seen == {0.0, 1.0}


def test_rows_are_drawn_by_the_key():
    method, state = started(kl_batch_size=4)
    keys = (KEY, KEY, jax.random.key(5))
    found = [
        vector(method.refresh(PROBLEM, BASE, OTHER, state, key)["alignment"])
        for key in keys
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_reference_of_another_model_is_refused():
    method, state = started()
    moved = {**BASE, "embed": -BASE["embed"]}
    with pytest.raises(UserError, match="lazy: expected a reference cached from this"):
        method.begin_domain(PROBLEM, moved, state, MEDICAL, KEY)
    same = dataclasses.replace(PROBLEM)
    assert method.begin_domain(same, BASE, state, MEDICAL, KEY) == (MEDICAL, {})
