"""The stage that Vaccine and Booster share: does it act, and on what?"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from alignment_case import (
    ADAPTER,
    BASE,
    KEY,
    PROBLEM,
    SAFE,
    WIDE,
    arrays,
    like,
    loss_of,
    moved,
    toy,
    toy_gradient,
    toy_loss,
    weights,
)
from trees import vector

from sbr_jax import models
from sbr_jax.methods._alignment_stage import Stage, fresh_like, make_realign
from sbr_jax.methods.booster import booster
from sbr_jax.methods.vaccine import perturbation, vaccine
from sbr_jax.typing import UserError

# --- the stage ------------------------------------------------------------------------

STEPS, RATE = 30, 1e-2
MAKERS = {"vaccine": vaccine, "booster": booster}


@functools.cache
def prepared(name, **options):
    method = MAKERS[name](steps=STEPS, learning_rate=RATE, **options)
    return method.prepare(PROBLEM, BASE, ADAPTER, KEY)


def cosine(step):
    """Three steps of warm-up from a quarter of the peak, then a cosine to 0."""
    if step < 3:
        return RATE * (1 + step) / 4
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))


def plainly_aligned():
    """A twin: alignment by clipping and AdamW, written out in NumPy."""
    adapter = fresh_like(ADAPTER, jax.random.split(KEY, 3)[0])
    w = vector(adapter)
    first = second = np.zeros_like(w)
    for step in range(STEPS):
        g = toy_gradient(like(adapter, w), SAFE)
        g = g / max(1.0, np.linalg.norm(g))
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        unbiased = np.sqrt(second / (1 - 0.999 ** (step + 1)))
        move = first / (1 - 0.9 ** (step + 1)) / (unbiased + 1e-8)
        w = w - cosine(step) * (move + 0.1 * w)
    return models.merge_adapter(BASE, like(adapter, w))["layers"]


def test_without_its_rule_a_stage_is_plain_alignment():
    wanted = vector(plainly_aligned())
    found = vector(prepared("vaccine", radius=0.0)["layers"])
    # Adam divides by gradients that are small at first: float32 against float64.
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    assert np.abs(wanted - vector(BASE["layers"])).max() > 0.05
    assert np.abs(vector(prepared("vaccine")["layers"]) - wanted).max() > 5e-3


@pytest.mark.parametrize("name", MAKERS)
def test_stage_returns_new_weights_and_leaves_the_aligned_ones(name):
    after = prepared(name)
    jax.tree.map(np.testing.assert_array_equal, BASE, weights())
    assert jax.tree.structure(after) == jax.tree.structure(BASE)
    assert after["embed"] is BASE["embed"]
    assert after["layers"]["up_proj"] is BASE["layers"]["up_proj"]
    change = np.asarray(after["layers"]["q_proj"] - BASE["layers"]["q_proj"])
    assert np.abs(change).max(axis=(1, 2)).min() > 1e-3
    assert (np.linalg.matrix_rank(change, tol=1e-5) == 2).all()
    before, now = (toy_loss(b, ADAPTER, arrays(SAFE))[0] for b in (BASE, after))
    assert float(now) < float(before) - 0.1


def test_vaccine_makes_the_loss_rise_less_under_its_disturbance():
    """What the rule minimises is smaller than after alignment without it."""

    @jax.jit
    def risen(base):
        data = arrays(SAFE)
        shift = perturbation(PROBLEM, base, ADAPTER, data, KEY, 2.0)
        still = loss_of(toy, base, ADAPTER, data)
        return loss_of(toy, base, ADAPTER, data, attention_shift=shift) - still

    assert (
        0
        < float(risen(prepared("vaccine")))
        < float(risen(prepared("vaccine", radius=0.0)))
    )


def spy(seen=None, rate=RATE, **options):
    """A stage whose rule says what it is given; it pulls to the batch's mean token."""

    def rule(problem, base, adapter, batches, key):
        del problem, base, key
        if seen is not None:
            jax.debug.callback(
                lambda x: seen.append(x), batches["safe"]["tokens"][:, 0]
            )
        goal = jnp.mean(batches["safe"]["tokens"].astype(jnp.float32))
        return jax.tree.map(lambda x: x - goal, adapter), jnp.sum(
            adapter["q_proj"].lora_b ** 2
        )

    fields = {"steps": None, "batch_size": None, **options}
    return make_realign(rule, Stage("spy", rate, "constant", 0.0, **fields))


def test_stage_lasts_one_domain_and_takes_its_batch_unless_told_otherwise():
    data = {"safe": tiny.dataset(3, 24)}
    for options, wanted in (({"steps": 5, "batch_size": 12}, (5, 12)), ({}, (3, 8))):
        seen = []
        jax.block_until_ready(spy(seen, **options)(PROBLEM, BASE, ADAPTER, data, KEY))
        jax.effects_barrier()
        assert np.shape(seen) == wanted
    # Three batches of eight are one epoch of 24.
    assert sorted(np.ravel(seen)) == sorted(data["safe"].tokens[:, 0])


def test_stage_is_deterministic_keys_differ_and_the_adapter_is_only_a_shape():
    run, data = spy(), {"safe": tiny.dataset(3, 24)}
    touched = moved()["q_proj"].lora_b
    dirty = {"q_proj": dataclasses.replace(ADAPTER["q_proj"], lora_b=touched)}
    first, second, third, fourth = (
        vector(run(PROBLEM, BASE, start, data, jax.random.key(key))["layers"])
        for key, start in ((0, ADAPTER), (0, ADAPTER), (1, ADAPTER), (0, dirty))
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, fourth)
    assert np.abs(first - third).max() > 1e-4


def test_a_fresh_adapter_is_another_draw_of_the_same_kind():
    fresh, old = fresh_like(WIDE, KEY), WIDE
    assert fresh.keys() == old.keys()
    for name, pair in fresh.items():
        assert not pair.lora_b.any()
        assert pair.scale == old[name].scale
        was, now = np.asarray(old[name].lora_a), np.asarray(pair.lora_a)
        np.testing.assert_array_equal(np.sort(now, axis=1), np.sort(was, axis=1))
        # Unrelated columns of 16 entries: |cosine| is about 1/4.
        cosines = np.sum(was * now, axis=1) / np.linalg.norm(was, axis=1) ** 2
        assert np.abs(cosines).mean() < 0.5


def test_booster_needs_harmful_data():
    problem = dataclasses.replace(PROBLEM, harmful=None)
    with pytest.raises(UserError, match=r"booster: expected harmful .* got None"):
        booster().prepare(problem, BASE, ADAPTER, KEY)


def test_a_stage_that_diverges_says_so():
    with pytest.raises(UserError, match=r"spy: .*finite loss.*lower its learning_rate"):
        spy(rate=1e30)(PROBLEM, BASE, ADAPTER, {"safe": SAFE}, KEY)
