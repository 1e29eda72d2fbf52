"""The step and the loop: accumulation, schedule, tracing, failures, resuming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sbr_jax.data.batches import batch
from sbr_jax.methods.base import adamw, task_gradient
from sbr_jax.training import checkpoint, loop
from sbr_jax.training.monitor import monitor, needs_repair
from sbr_jax.training.program import init_adapter
from sbr_jax.training.step import (
    TrainState,
    compiled_step,
    learning_rate_schedule,
    make_step,
)
from sbr_jax.typing import UserError

STUDY = tiny.study()
SETTINGS = tiny.config()
BASE = STUDY.model.params
DATA = STUDY.domains["medical"].train


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def toy():
    """A step on a plain pytree: no model, so it compiles at once."""

    def gradient(problem, base, adapter, state, batch, key):
        def loss_fn(a):
            return jnp.mean((batch["tokens"] @ (a["w"] * base) - batch["mask"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        return grads, {}, {"loss": loss}

    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    step = compiled_step(make_step(None, gradient, optimizer))
    adapter = {"w": jnp.ones(3, jnp.float32)}
    start = TrainState(adapter, optimizer.init(adapter), jnp.zeros((), jnp.int32))
    return step, jnp.float32(0.5), start


def toy_batch(step):
    rng = np.random.default_rng(step)
    return {
        "tokens": rng.normal(size=(4, 3)).astype(np.float32),
        "mask": rng.normal(size=4).astype(np.float32),
    }


def run_toy(**options):
    step, base, start = toy()
    defaults = {"steps": 7, "where": "toy", "log_every": 3, "quiet": True}
    return loop.train(
        step, base, start, {}, toy_batch, jax.random.key(0), **{**defaults, **options}
    )


def test_schedule_warms_up_and_ends_at_its_floor():
    rate = learning_rate_schedule(2e-4, 200, warmup_fraction=0.03, final_fraction=0.005)
    values = [float(rate(i)) for i in range(201)]
    assert np.argmax(values) == 6
    assert values[6] == pytest.approx(2e-4)
    assert 0 < values[0] < values[1] < values[5]
    assert values[200] == pytest.approx(1e-6)
    assert np.all(np.diff(values[6:]) < 0)
    assert float(learning_rate_schedule(1.0, 1)(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("row", ["safeanchor-exact"])
def test_accumulation_equals_one_big_batch(row):
    results = []
    for accumulation in (1, 4):
        settings = tiny.changed(SETTINGS, accumulation=accumulation)
        found = tiny.program(row, settings, STUDY, kl_batch_size=4, max_rank=6)
        adapter = init_adapter(STUDY, SETTINGS, 0)
        key = jax.random.key(3)
        state = found.method.init(found.problem, BASE, adapter, key)
        del state["diagnostics"]
        # A reference elsewhere, so that the anchor has a gradient.
        moved = jax.tree.map(lambda x: x + jnp.asarray(0.05, x.dtype), adapter)
        state["reference"] = moved
        train = found.start(adapter, state)
        train, metrics = found.step(BASE, train, state, batch(DATA, 8, 0, 0), key)
        results.append((vector(train.adapter), jax.device_get(metrics)))
    (one, big), (four, small) = results
    assert big["anchor"] > 1e-4
    np.testing.assert_allclose(one, four, atol=2e-5)
    for name in ("loss", "anchor", "grad_norm"):
        np.testing.assert_allclose(big[name], small[name], rtol=1e-4)


def test_clipping_bounds_what_enters_the_optimizer():
    problem = tiny.problem(
        STUDY.model.apply_fn,
        STUDY.calibration,
        steps_per_domain=1,
        batch_size=8,
        max_grad_norm=1e-3,
    )
    transform = adamw(problem, None, 1.0)
    params = {"w": jnp.zeros(4)}
    with jax.numpy_dtype_promotion("standard"):
        state = transform.init(params)
        _, state = transform.update({"w": jnp.full(4, 100.0)}, state, params)
    first = optax.tree.get(state, "mu")["w"]
    assert float(jnp.linalg.norm(first)) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_domains_seeds_and_subspaces_share_one_trace(monkeypatch):
    traced = []

    def counting(problem, base, adapter, state, batch, key):
        traced.append(1)
        return task_gradient(problem, base, adapter, state, batch, key)

    found = tiny.program("safeanchor-exact", SETTINGS, STUDY, kl_weight=0.0, max_rank=6)
    step = compiled_step(make_step(found.problem, counting, found.optimizer))
    for seed in (0, 1):
        adapter = init_adapter(STUDY, SETTINGS, seed)
        key = jax.random.key(seed)
        state = found.method.init(found.problem, BASE, adapter, key)
        for domain in STUDY.domains.values():
            state = {k: v for k, v in state.items() if k != "diagnostics"}
            train = found.start(adapter, state)
            for number in range(2):
                data = batch(domain.train, 8, seed, number)
                train, _ = step(BASE, train, state, data, key)
            adapter, state = found.method.end_domain(
                found.problem, BASE, train.adapter, state, key
            )
    assert len(traced) == 1
    assert step._cache_size() == 1
    again = tiny.program("safeanchor-exact", SETTINGS, STUDY, kl_weight=0.0, max_rank=6)
    assert again is found


def test_dropout_depends_on_seed_and_step_only():
    settings = tiny.changed(SETTINGS, lora_dropout=0.5)
    found = tiny.program("plain", settings, STUDY)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(0.1, x.dtype), init_adapter(STUDY, SETTINGS, 0)
    )

    def loss(seed, number):
        train = found.start(moved, {})
        train = dataclasses.replace(train, step=jnp.int32(number))
        key = jax.random.key(seed)
        _, metrics = found.step(BASE, train, {}, batch(DATA, 8, 0, 0), key)
        return float(metrics["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_loop_resumes_to_the_same_bits():
    whole = run_toy()
    saved = {}

    def keep(step, train, state, history):
        saved[step] = (jax.tree.map(jnp.copy, train), state, dict(history))

    with_saving = run_toy(checkpoint_every=2, checkpoint=keep)
    assert sorted(saved) == [2, 4, 6]
    np.testing.assert_array_equal(
        vector(whole.train.adapter), vector(with_saving.train.adapter)
    )
    step, base, _ = toy()
    train, state, history = saved[4]
    resumed = loop.train(
        step,
        base,
        train,
        state,
        toy_batch,
        jax.random.key(0),
        steps=7,
        where="toy",
        first_step=4,
        history=history,
        quiet=True,
    )
    np.testing.assert_array_equal(
        vector(whole.train.adapter), vector(resumed.train.adapter)
    )
    assert whole.history == resumed.history
    assert loop.summarise(whole.history) == loop.summarise(resumed.history)


def test_a_loss_that_is_not_finite_stops_and_says_where():
    def poisoned(step):
        data = toy_batch(step)
        if step == 4:
            data["mask"][0] = np.nan
        return data

    step, base, start = toy()
    with pytest.raises(UserError, match=r"plain, seed 3, domain x: .*nan.* at step 4"):
        loop.train(
            step,
            base,
            start,
            {},
            poisoned,
            jax.random.key(0),
            steps=7,
            where="plain, seed 3, domain x",
            quiet=True,
        )


def test_refresh_is_called_between_steps_only():
    seen = []

    def refresh(train, state, step):
        seen.append(step)
        return train, state

    run_toy(refresh_every=3, refresh=refresh)
    assert seen == [3, 6]


def test_checkpoint_keeps_bits_and_structure(tmp_path):
    adapter = init_adapter(STUDY, SETTINGS, 0)
    tree = {"adapter": adapter, "n": jnp.int32(3), "half": jnp.ones(2, jnp.bfloat16)}
    checkpoint.save(tmp_path / "a", tree)
    checkpoint.save(tmp_path / "a", tree)
    found = checkpoint.restore(tmp_path / "a", jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    checkpoint.save(tmp_path / "empty", {})
    assert checkpoint.restore(tmp_path / "empty", {}) == {}
    with pytest.raises(UserError, match="does not hold what is expected"):
        checkpoint.restore(tmp_path / "a", {"n": jnp.int32(3)})
    with pytest.raises(UserError, match="found none"):
        checkpoint.restore(tmp_path / "b", tree)


def test_monitor_repairs_exactly_when_the_rule_says():
    assert needs_repair(94.99, 100.0)
    assert not needs_repair(95.0, 100.0)
    assert not needs_repair(0.0, 0.0)
    calls = []

    def repair(x, block):
        calls.append(block)
        return x + 1

    for scores, expected in (
        ([100.0], []),
        ([95.0], []),
        ([90.0, 96.0], [0]),
        ([90.0, 91.0, 99.0], [0, 1]),
        ([90.0, 90.0, 90.0], [0, 1]),
    ):
        calls.clear()
        result, seen = monitor(0, lambda x, s=scores: s[x], repair, 100.0)
        assert calls == expected
        assert seen == scores
        assert result == len(expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps_per_domain": 0}, "training.steps_per_domain"),
        ({"steps_per_domain": "6"}, "training.steps_per_domain"),
        ({"batch_size": True}, "training.batch_size"),
        ({"learning_rate": 0.0}, "training.learning_rate"),
        ({"learning_rate": float("nan")}, "training.learning_rate"),
        ({"tolerance": 1.0}, "training.tolerance"),
        ({"lora_targets": 3}, "training.lora_targets"),
        ({"batch_size": 6, "accumulation": 4}, "training.batch_size"),
        ({"vmap_seeds": "maybe"}, "hardware.vmap_seeds"),
        ({"checkpoint_every": 0}, "hardware.checkpoint_every"),
    ],
)
def test_wrong_settings_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=f"expected {named}"):
        tiny.config(**options)
