"""Every variant on the tiny study, learned once for all tests that look at it."""

import dataclasses
import functools
import re
import types
from pathlib import Path

import jax
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.methods._ssi import perturb_b
from sbr_jax.training.program import init_adapter, insert, make_program

# Harmful prompts that a probe can tell: it is asked whether it can.
STUDY = tiny.study(
    harmful=tiny.with_prompts(tiny.dataset(4, 24, shift=7), 26, 32, count=4),
    calibration_controls={
        **tiny.study().calibration_controls,
        "benign": tiny.with_prompts(tiny.dataset(3, 24, shift=5), 0, 6, count=4),
    },
)
SETTINGS = tiny.config(steps_per_domain=3)


TINY = {
    "safeanchor-exact": {"max_rank": 6},
    # A random model is unsure of everything: its raw traces are far above 1/λ.
    "safeanchor": {"max_rank": 6, "strictness": 1e-3},
    "unified": {"max_rank": 6},
    "lean": {"max_rank": 6},
    "lazy": {"refresh_every": 2},
    "salora": {"safety_rank": 4},
    # So that three steps see both states, and a pair lies below the threshold.
    "lisa": {"period": 2, "alignment_share": 0.5},
    "safe-lora": {"threshold": 0.99},
}
"""Options for a model of width 16 and domains of three steps."""


CONTRIBUTED = "noise"
"""The example of CONTRIBUTING.md, which answers what every method is asked."""


@functools.cache
def contributed():
    """That example as a module."""
    text = Path(__file__).parent.with_name("CONTRIBUTING.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("contributed")
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def registered():
    """What the page asks for: one line in `METHODS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, CONTRIBUTED, contributed().noise)
        yield
    make_program.cache_clear()


def program(row, settings=SETTINGS, **options):
    method = VARIANTS.get(row, (row, {}))[0]
    options = {**TINY.get(method, {}), **options}
    if row == "safeanchor-exact:refresh":  # Its own interval is beyond three steps.
        row, options["refresh_every"] = method, 2
    return tiny.program(row, settings, STUDY, **options)


def without_diagnostics(state):
    return {k: v for k, v in state.items() if k != "diagnostics"}


def midway(row, study=STUDY, settings=SETTINGS):
    """In mid-training: the program, base, an adapter off B = 0, state and data."""
    found = tiny.program(row, settings, study, **TINY.get(row, {}))
    method, problem, key = found.method, found.problem, jax.random.key(0)
    adapter = init_adapter(study, settings, 0)
    base = method.prepare(problem, study.model.params, adapter, key)
    state = without_diagnostics(method.init(problem, base, adapter, key))
    data = method.mix(problem, study.domains["medical"].train, 0)
    return found, base, perturb_b(key, adapter, 1.0), state, data


def learn(row, seed=0, domains=2, **changes):
    """Domains of three steps, by hand: what the pipeline does with the hooks."""
    found = program(row, **changes)
    method, problem = found.method, found.problem
    key = jax.random.key(seed)
    adapter = init_adapter(STUDY, SETTINGS, seed)
    base = method.prepare(problem, STUDY.model.params, adapter, key)
    state = first = method.init(problem, base, adapter, key)
    seen, after = [], []
    for index, domain in enumerate([*STUDY.domains.values()][:domains]):
        seen.append(state.get("diagnostics", {}))
        state = without_diagnostics(state)
        train = found.start(adapter, state)
        mixed = method.mix(problem, domain.train, seed)
        data, _ = method.begin_domain(problem, base, state, mixed, key)
        for step in range(3):
            if method.refresh is not None and step == method.refresh_every:
                state = method.refresh(problem, base, train.adapter, state, key)
                state = without_diagnostics(state)
                opt_state = insert(train.opt_state, state)
                train = dataclasses.replace(train, opt_state=opt_state)
            step_key = jax.random.fold_in(key, index)
            train, metrics = found.step(
                base, train, state, batch(data, 8, seed, step), step_key
            )
        learned_from = dataclasses.replace(problem, domain=data)
        adapter, state = method.end_domain(
            learned_from, base, train.adapter, state, key
        )
        after.append(jax.device_get(adapter))
    seen.append(state.get("diagnostics", {}))
    shipped = models.merge_adapter(
        *method.deploy(problem, base, adapter, without_diagnostics(state))
    )
    first = without_diagnostics(first)
    return shipped["layers"], jax.device_get(metrics), seen, after, first


learned = functools.cache(learn)
