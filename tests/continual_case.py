"""A tiny problem for EWC, O-LoRA and SafeGrad, and what it takes to step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from trees import jitter

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.methods.base import task_loss
from sbr_jax.methods.plain import plain
from sbr_jax.training.step import TrainState, compiled_step, make_step

STUDY = tiny.study()
BASE = STUDY.model.params
MEDICAL, LEGAL = (domain.train for domain in STUDY.domains.values())
KEY = jax.random.key(0)
PROBLEM = tiny.problem(
    apply_fn=STUDY.model.apply_fn,
    steps_per_domain=6,
    batch_size=8,
    calibration=STUDY.calibration,
    fisher_microbatch=8,
    weight_decay=0.0,
)
FRESH = jax.device_get(
    models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0, targets="(q|v)_proj")
)
TASK = {**batch(MEDICAL, 8, 0, 0), "row": np.arange(8, dtype=np.int32)}
SAFE = batch(STUDY.calibration, 8, 0, 0)

PLAIN = plain()

logits_of = jax.jit(STUDY.model.apply_fn)
plain_gradient = jax.jit(
    jax.value_and_grad(lambda a, b, x: task_loss(PROBLEM, b, a, x, KEY))
)


MOVED, OTHER = jitter(FRESH, 1), jitter(FRESH, 2)


@functools.cache
def step_of(method):
    """The compiled step of a method, as the trainer makes it."""
    optimizer = method.optimizer(PROBLEM, FRESH, 0.02)
    return optimizer, compiled_step(make_step(PROBLEM, method.gradient, optimizer))


def run(method, state, adapter, data, steps, base=BASE):
    """Some steps of a method on one data set; also the metrics of each."""
    optimizer, step = step_of(method)
    adapter = jax.tree.map(jnp.array, adapter)
    train, history = TrainState(adapter, optimizer.init(adapter), jnp.int32(0)), []
    for index in range(steps):
        drawn = batch(data, 8, 0, index)
        train, metrics = step(base, train, state, drawn, jax.random.key(7))
        history.append(jax.device_get(metrics))
    return jax.device_get(train.adapter), history


@functools.cache
def hook(method, name="gradient", accumulation=1):
    problem = tiny.changed(PROBLEM, accumulation=accumulation)
    function = getattr(method, name)
    return jax.jit(lambda a, state, *rest: function(problem, BASE, a, state, *rest))


def by_halves(method, adapter, state):
    """Gradient and metrics as the mean over two microbatches."""
    halves = [{k: v[rows] for k, v in TASK.items()} for rows in (slice(4), slice(4, 8))]
    gradient = hook(method, accumulation=2)
    found = [gradient(adapter, state, half, KEY) for half in halves]
    return jax.tree.map(lambda x, y: (np.asarray(x) + np.asarray(y)) / 2, *found)


def ended(method, adapter, state, data=MEDICAL, key=KEY):
    problem = dataclasses.replace(PROBLEM, domain=data)
    return method.end_domain(problem, BASE, adapter, state, key)
