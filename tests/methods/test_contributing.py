"""The example of CONTRIBUTING.md, asked what every method is asked."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.methods import METHODS, Method, build
from sbr_jax.training import pipeline
from sbr_jax.training.program import init_adapter, make_program
from sbr_jax.typing import UserError

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NAME = "noise"
STUDY = tiny.study()
SETTINGS = tiny.config(steps_per_domain=3)


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """What the page asks for: the block in one file, one line in `METHODS`."""
    path = tmp_path_factory.mktemp("methods") / f"{NAME}.py"
    path.write_text(CODE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"contributed_{NAME}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, NAME, getattr(module, NAME))
        yield module
    make_program.cache_clear()


def program(row=NAME, settings=SETTINGS, **options):
    return tiny.program(row, settings, STUDY, **options)


def learn(found, seed=0):
    """Three steps on one domain: the weights that are shipped, and the last metrics."""
    base, key = STUDY.model.params, jax.random.key(seed)
    adapter = init_adapter(STUDY, SETTINGS, seed)
    state = found.method.init(found.problem, base, adapter, key)
    train = found.start(adapter, state)
    data = found.method.mix(found.problem, STUDY.domains["medical"].train, seed)
    for step in range(3):
        examples, step_key = batch(data, 8, seed, step), jax.random.fold_in(key, step)
        train, metrics = found.step(base, train, state, examples, step_key)
    adapter, state = found.method.end_domain(
        dataclasses.replace(found.problem, domain=data), base, train.adapter, state, key
    )
    shipped = found.method.deploy(found.problem, base, adapter, state)
    return vector(models.merge_adapter(*shipped)), jax.device_get(metrics)


learned = functools.cache(lambda row: learn(program(row)))


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_the_block_makes_a_method_of_the_name_that_it_is_registered_under(registered):
    method = build(NAME)
    assert isinstance(method, Method)
    assert registered.noise().name == method.name == NAME
    assert "scale" in registered.noise.__doc__


def test_it_changes_the_result_and_leaves_the_base_alone():
    before = jax.tree.map(np.array, STUDY.model.params)
    result, metrics = learned(NAME)
    assert all(np.isfinite(v) for v in metrics.values())
    assert metrics["finite"] == 1
    assert np.abs(result - learned("plain")[0]).max() > 1e-5
    jax.tree.map(np.testing.assert_array_equal, before, STUDY.model.params)


def test_its_hyper_parameter_decides_how_much():
    # A fresh A has no gradient of its own, and Adam makes a whole step of any noise
    # above its ε of 1e-8: this scale is well below.
    plain = learned("plain")[0]
    faint = np.linalg.norm(learn(program(scale=1e-11))[0] - plain)
    assert faint < 0.1 * np.linalg.norm(learned(NAME)[0] - plain)


def test_it_is_deterministic_and_seeds_differ():
    first = learned(NAME)[0]
    np.testing.assert_array_equal(first, learn(program())[0])
    assert np.abs(first - learn(program(), seed=1)[0]).max() > 1e-3


def test_it_works_with_mapped_seeds():
    found, base = program(), STUDY.model.params
    keys = [jax.random.key(seed) for seed in (0, 1)]
    adapters = [init_adapter(STUDY, SETTINGS, seed) for seed in (0, 1)]
    batches = [batch(STUDY.domains["medical"].train, 8, seed, 0) for seed in (0, 1)]

    def starts():
        return [found.start(adapter, {}) for adapter in adapters]

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    together, metrics = found.mapped_step(
        base, stack(starts()), {}, stack(batches), jnp.stack(keys)
    )
    assert metrics["loss"].shape == (2,)
    for i, start in enumerate(starts()):
        alone, _ = found.step(base, start, {}, batches[i], keys[i])
        mine = jax.tree.map(lambda x, i=i: x[i], together.adapter)
        # A thousandth of the learning rate, as for every other row.
        np.testing.assert_allclose(vector(mine), vector(alone.adapter), atol=1e-5)


def test_a_step_is_the_same_in_microbatches():
    # The noise is the step's, not the microbatch's: else its variance would be halved.
    halves = program(settings=tiny.changed(SETTINGS, accumulation=2))
    np.testing.assert_allclose(learn(halves)[0], learned(NAME)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": -1.0}, "noise.scale to be a finite number above 0"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": True}, "noise.scale to be a finite number above 0"),
        ({"scal": 0.1}, "unknown option of noise 'scal'; nearest: scale"),
    ],
)
def test_a_wrong_hyper_parameter_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=re.escape(named)):
        build(NAME, **options)


def test_the_job_runs_it_beside_other_rows(tmp_path):
    settings = tiny.changed(SETTINGS, repair_steps=1)
    summary = pipeline.run(
        STUDY, ["plain", NAME], [0], tmp_path, settings, ["medical"], quiet=True
    )
    rows = summary["methods"]
    assert list(rows) == ["plain", NAME]
    assert rows["plain"]["composite"] != rows[NAME]["composite"]
