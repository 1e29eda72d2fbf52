"""Every row on the tiny study, learned once for all tests that look at it."""

import dataclasses
import functools

import jax
import numpy as np
import tiny

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.methods import VARIANTS
from sbr_jax.training.program import init_adapter

STUDY = tiny.study()
SETTINGS = tiny.config(steps_per_domain=3)


TINY = {
    "safeanchor-exact": {"max_rank": 6},
    # A random model is unsure of everything: its raw traces are far above 1/λ.
    "safeanchor": {"max_rank": 6, "strictness": 1e-3},
    "unified": {"max_rank": 6},
    "salora": {"safety_rank": 4},
    # So that three steps see both states, and a pair lies below the threshold.
    "lisa": {"period": 2, "alignment_share": 0.5},
    "safe-lora": {"threshold": 0.99},
}
"""Options for a model of width 16 and domains of three steps."""


def program(row):
    method = VARIANTS.get(row, (row, {}))[0]
    options = dict(TINY.get(method, {}))
    if row == "safeanchor-exact:refresh":  # Its own interval is beyond three steps.
        row, options["refresh_every"] = method, 2
    return tiny.program(row, SETTINGS, STUDY, **options)


def without_diagnostics(state):
    return {k: v for k, v in state.items() if k != "diagnostics"}


def learn(row, seed=0):
    """Two domains of three steps, by hand: what the pipeline does with the hooks."""
    found = program(row)
    method, problem = found.method, found.problem
    key = jax.random.key(seed)
    adapter = init_adapter(STUDY, SETTINGS, seed)
    base = method.prepare(problem, STUDY.model.params, adapter, key)
    state = method.init(problem, base, adapter, key)
    seen = []
    for index, domain in enumerate(STUDY.domains.values()):
        seen.append(state.get("diagnostics", {}))
        state = without_diagnostics(state)
        train = found.start(adapter, state)
        data = method.mix(problem, domain.train, seed)
        for step in range(3):
            if method.refresh is not None and step == method.refresh_every:
                state = method.refresh(problem, base, train.adapter, state, key)
                state = without_diagnostics(state)
                opt_state = found.insert(train.opt_state, state)
                train = dataclasses.replace(train, opt_state=opt_state)
            step_key = jax.random.fold_in(key, index)
            train, metrics = found.step(
                base, train, state, batch(data, 8, seed, step), step_key
            )
        learned_from = dataclasses.replace(problem, domain=data)
        adapter, state = method.end_domain(
            learned_from, base, train.adapter, state, key
        )
    seen.append(state.get("diagnostics", {}))
    shipped = models.merge_adapter(
        *method.deploy(problem, base, adapter, without_diagnostics(state))
    )
    return shipped["layers"], jax.device_get(metrics), seen, adapter


learned = functools.cache(learn)


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
