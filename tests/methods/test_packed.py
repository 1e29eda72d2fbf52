"""Packed steps give the numbers of padded ones, for every method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from methods_case import SETTINGS, STUDY, midway
from tiers import few
from trees import vector

from sbr_jax.data import TokenDataset
from sbr_jax.data.batches import batch
from sbr_jax.data.layout import arrange, choose
from sbr_jax.methods import METHODS
from sbr_jax.methods.base import task_gradient
from sbr_jax.training import sharding

# Sums in another order, in float32: of losses and gradients of order 1.
KEPT = ["plain", "safegrad", "sbr", "adaptive-probe", "lean"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def uneven(data, seed):
    """The same prompts with answers of 1 to 16 tokens."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(5, 21, len(data))
    inside = np.arange(2 * tiny.LENGTH) < kept[:, None]
    more = rng.integers(1, tiny.VOCAB, data.tokens.shape)
    tokens = np.concatenate([data.tokens, more], axis=1)
    mask = np.concatenate([data.mask, np.ones_like(data.mask)], axis=1)
    mask[:, tiny.LENGTH - 1] = 1
    return TokenDataset(np.where(inside, tokens, 0), np.where(inside, mask, 0))


@pytest.fixture(scope="module")
def ragged():
    study = STUDY
    data = {n: uneven(d.train, i) for i, (n, d) in enumerate(study.domains.items())}
    domains = {
        n: dataclasses.replace(d, train=data[n]) for n, d in study.domains.items()
    }
    return dataclasses.replace(
        study, domains=domains, calibration=uneven(study.calibration, 9)
    )


@pytest.mark.parametrize("row", few(METHODS, KEPT))
def test_gradients_of_packed_steps_are_those_of_padded_ones(row, ragged):
    # What a batch meets is this hook; many methods have that of plain training.
    if row != "plain" and METHODS[row]().gradient is task_gradient:
        return
    found, base, adapter, state, data = midway(row, ragged)
    drawn, key = batch(data, 8, 0, 0), jax.random.key(1)
    packed, padded = (
        arrange([drawn], choose(data, 8, packing=packing))[0]
        for packing in ("yes", "no")
    )
    assert packed["tokens"].size < padded["tokens"].size
    hook = jax.jit(
        lambda b: found.method.gradient(found.problem, base, adapter, state, b, key)
    )
    rows = {"row": jnp.arange(8)}
    bare = hook({**drawn, **rows})
    for laid in (packed, {**padded, **rows}) if row == "plain" else (packed,):
        for ours, theirs in zip(hook(laid), bare, strict=True):
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            if jax.tree.leaves(ours):
                np.testing.assert_allclose(vector(ours), vector(theirs), **CLOSE)


@pytest.mark.parametrize("row", few(["plain", "unified"], 1))
def test_packed_microbatches_give_the_step_of_one_batch(row, ragged):
    drawn = None
    seen = []
    for parts in (1, 4):
        settings = tiny.changed(SETTINGS, accumulation=parts)
        found, base, adapter, state, data = midway(row, ragged, settings)
        drawn = batch(data, 8, 0, 0) if drawn is None else drawn
        layout = choose(data, 8, packing="yes", parts=parts)
        train = found.start(adapter, state)
        _, metrics = found.step(
            base, train, state, arrange([drawn], layout)[0], jax.random.key(1)
        )
        seen.append(jax.device_get(metrics))
    assert seen[0].keys() == seen[1].keys()
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(seen[0][name], seen[1][name], **CLOSE)


def test_rows_of_a_mesh_give_the_step_of_one_row(ragged):
    seen = []
    for mesh, rows in ((None, 1), ("fsdp=4,tp=2", 4)):
        settings = tiny.changed(SETTINGS, mesh=mesh)
        found, base, adapter, state, data = midway("plain", ragged, settings)
        base = sharding.place_base(found.mesh, base, ragged.model.config)
        layout = choose(data, 8, packing="yes", rows=rows)
        (laid,) = arrange([batch(data, 8, 0, 0)], layout)
        assert laid["tokens"].shape[0] == rows
        train = found.start(adapter, state)
        laid = sharding.place_batch(found.mesh, laid)
        _, metrics = found.step(base, train, state, laid, jax.random.key(1))
        seen.append(jax.device_get(metrics))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(seen[0][name], seen[1][name], **CLOSE)
