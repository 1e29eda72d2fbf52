"""A tiny problem, its dense matrices, and defences in weight space on it.

The twins are NumPy in double precision and form every d × d matrix that the package
does not. Tolerances: 1e-4 relative is a hundred roundings of float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.methods.antidote import antidote
from sbr_jax.methods.asft import asft
from sbr_jax.methods.lox import lox
from sbr_jax.methods.plain import plain
from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.methods.salora import salora

STUDY = tiny.study()
MODEL, BASE = STUDY.model, STUDY.model.params
PROBLEM = tiny.problem(
    apply_fn=MODEL.apply_fn,
    steps_per_domain=3,
    batch_size=8,
    calibration=STUDY.calibration,
    harmful=STUDY.harmful,
    unaligned=STUDY.unaligned,
)
FRESH = models.init_adapter(jax.random.key(0), MODEL.config, rank=2, alpha=4.0)
KEY = jax.random.key(1)
MEDICAL = STUDY.domains["medical"].train
MAKERS = {
    "safe-lora": safe_lora,
    "asft": asft,
    "lox": lox,
    "antidote": antidote,
    "salora": functools.partial(salora, safety_rank=4),
}
capture = jax.jit(functools.partial(MODEL.apply_fn, capture=True))


def random_adapter(seed=0):
    """An adapter after some learning: B is no longer zero."""
    rng = np.random.default_rng(seed)

    def noise(pair):
        drawn = rng.normal(0, 0.3, pair.lora_b.shape)
        return dataclasses.replace(pair, lora_b=jnp.asarray(drawn, jnp.float32))

    return {name: noise(pair) for name, pair in FRESH.items()}


TUNED = random_adapter()


def dense(x):
    return np.asarray(x, np.float64)


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def dense_c(name, layer):
    """The paper's C of one layer, in the paper's layout (V is [out, in])."""
    aligned, before = BASE["layers"][name], STUDY.unaligned["layers"][name]
    v = (dense(aligned[layer]) - dense(before[layer])).T
    return v @ v.T / np.linalg.norm(v)


def paper_update(name, layer, adapter=TUNED):
    """B A of the paper, [out, in]."""
    pair = adapter[name]
    return dense(pair.lora_b[layer]).T @ dense(pair.lora_a[layer]).T


def layers_of(adapter):
    return [(name, i) for name in adapter for i in range(MODEL.config.layers)]


@functools.cache
def method(row):
    return plain() if row == "plain" else MAKERS[row]()


@functools.cache
def start(row):
    """(prepared base, state without diagnostics) of a row."""
    base = method(row).prepare(PROBLEM, BASE, FRESH, KEY)
    state = dict(method(row).init(PROBLEM, base, FRESH, KEY))
    state.pop("diagnostics", None)
    return base, state


@functools.cache
def jitted_gradient(row):
    return jax.jit(functools.partial(method(row).gradient, PROBLEM))


def gradient(row, adapter, data=None):
    data = batch(MEDICAL, 8, 0, 0) if data is None else data
    return jitted_gradient(row)(BASE, adapter, start(row)[1], data, KEY)


def repair_gradients(row, adapter, plain_adapter):
    """What the row's repair and the plain one compute, in one program."""
    task, safe = batch(MEDICAL, 4, 0, 0), batch(STUDY.calibration, 4, 0, 0)

    @jax.jit
    def both(base, adapter, plain_adapter, state):
        rest = (task, safe, jnp.float32(1.0), KEY)
        ours = method(row).replay_gradient(PROBLEM, base, adapter, state, *rest)
        theirs = plain().replay_gradient(PROBLEM, base, plain_adapter, {}, *rest)
        return ours, theirs

    return both(BASE, adapter, plain_adapter, start(row)[1])
