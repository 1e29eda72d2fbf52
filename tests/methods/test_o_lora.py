"""O-LoRA against slow twins, and what it must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from continual_case import (
    BASE,
    FRESH,
    KEY,
    MOVED,
    OTHER,
    PROBLEM,
    SAFE,
    TASK,
    by_halves,
    ended,
    hook,
    logits_of,
    plain_gradient,
)
from trees import vector

from sbr_jax import models
from sbr_jax.methods.o_lora import concatenated, o_lora, overlap, sum_of_norms
from sbr_jax.models import LoraPair
from sbr_jax.typing import UserError


def slow_overlap(old, new):
    total = 0.0
    for name, pair in new.items():
        for layer, mine in enumerate(np.asarray(pair.lora_a, np.float64)):
            before = np.asarray(old[name].lora_a[layer], np.float64)
            total += np.abs(before.T @ mine).sum()
    return total


def slow_norms(adapter):
    factors = [x for leaf in jax.tree.leaves(adapter) for x in np.asarray(leaf)]
    return sum(np.linalg.norm(x.ravel()) for x in factors)


def test_concatenated_adapter_is_the_sum_of_its_parts():
    both = models.merge_adapter(models.merge_adapter(BASE, MOVED), OTHER)
    found = logits_of(BASE, concatenated(MOVED, OTHER), SAFE["tokens"])
    wanted = logits_of(both, None, SAFE["tokens"])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = logits_of(BASE, MOVED, SAFE["tokens"])
    assert np.abs(np.asarray(alone) - np.asarray(wanted)).max() > 1e-2


def test_penalties_equal_their_loops_and_vanish_where_they_should():
    np.testing.assert_allclose(
        overlap(MOVED, OTHER), slow_overlap(MOVED, OTHER), rtol=1e-5
    )
    np.testing.assert_allclose(sum_of_norms(MOVED), slow_norms(MOVED), rtol=1e-5)
    eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    some_b = jnp.ones((2, 2, 3))
    left = {"q_proj": LoraPair(some_b, eye[..., :2], 1.0)}
    right = {"q_proj": LoraPair(some_b, eye[..., 2:], 1.0)}
    assert float(overlap(left, right)) == 0
    assert float(overlap(left, left)) == 4
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(sum_of_norms)(FRESH))
    )


def test_o_lora_gradient_is_the_tasks_plus_both_penalties():
    method = o_lora(orthogonality=0.7, l2=0.3, max_domains=2)
    gradient = hook(method)
    empty = method.init(PROBLEM, BASE, FRESH, KEY)
    grads, _, metrics = gradient(FRESH, empty, TASK, KEY)
    assert float(metrics["overlap"]) == 0
    assert np.isfinite(vector(grads)).all()

    _, state = ended(method, MOVED, empty)
    grads, _, metrics = gradient(OTHER, state, TASK, KEY)
    merged = models.merge_adapter(BASE, MOVED)
    loss, wanted = plain_gradient(OTHER, merged, TASK)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["overlap"], slow_overlap(MOVED, OTHER), rtol=1e-5
    )
    for name, pair in OTHER.items():
        a, b = np.asarray(pair.lora_a), np.asarray(pair.lora_b)
        old = np.asarray(MOVED[name].lora_a)
        signs = np.sign(np.einsum("lik,lij->lkj", old, a))
        shrink_a, shrink_b = (
            0.3 * x / np.sqrt((x**2).sum((1, 2), keepdims=True)) for x in (a, b)
        )
        pull = 0.7 * np.einsum("lik,lkj->lij", old, signs) + shrink_a
        np.testing.assert_allclose(
            grads[name].lora_a, wanted[name].lora_a + pull, atol=1e-4
        )
        np.testing.assert_allclose(
            grads[name].lora_b, wanted[name].lora_b + shrink_b, atol=1e-4
        )

    halves, _, means = by_halves(method, OTHER, state)
    np.testing.assert_allclose(vector(halves), vector(grads), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(means["overlap"], metrics["overlap"], rtol=1e-6)

    # A repair trains the same model: the whole one.
    repair = hook(method, "replay_gradient")
    _, _, repaired = repair(OTHER, state, TASK, SAFE, jnp.float32(1), KEY)
    whole = method.deploy(PROBLEM, BASE, OTHER, state)[1]
    np.testing.assert_allclose(
        repaired["safety_loss"], plain_gradient(whole, BASE, SAFE)[0], rtol=1e-4
    )
    np.testing.assert_allclose(repaired["loss"], loss, rtol=1e-4)


def test_ending_a_domain_moves_the_pair_and_leaves_the_function():
    method = o_lora(max_domains=2)
    state, key = method.init(PROBLEM, BASE, FRESH, KEY), KEY
    adapter, starts, shapes = MOVED, [], jax.tree.map(jnp.shape, state)
    for pair in (MOVED, OTHER):
        adapter = pair
        before = logits_of(
            *method.deploy(PROBLEM, BASE, adapter, state), SAFE["tokens"]
        )
        adapter, state = ended(method, adapter, state, key=key)
        after = logits_of(*method.deploy(PROBLEM, BASE, adapter, state), SAFE["tokens"])
        np.testing.assert_allclose(before, after, atol=1e-5)
        assert not any(np.asarray(p.lora_b).any() for p in adapter.values())
        assert jax.tree.map(jnp.shape, state) == shapes
        starts.append(vector(adapter))
    # One key for all domains still gives other A.
    assert np.abs(starts[0] - starts[1]).max() > 0.1
    bound = tiny.CONFIG.width**-0.5
    assert 0.8 * bound < np.abs(starts[0]).max() <= bound
    both = concatenated(MOVED, OTHER)
    np.testing.assert_array_equal(vector(state["frozen"]), vector(both))
    assert np.abs(after - logits_of(BASE, None, SAFE["tokens"])).max() > 0.1
    with pytest.raises(UserError, match=r"max_domains: expected at least 3.* got 2"):
        ended(method, MOVED, state)
