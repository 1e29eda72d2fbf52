"""The step and the loop: accumulation, schedule, tracing, failures, resuming."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sbr_jax.data.batches import batch
from sbr_jax.methods._anchor import reference_states
from sbr_jax.methods.base import adamw, task_gradient
from sbr_jax.training import checkpoint, loop
from sbr_jax.training.program import init_adapter
from sbr_jax.training.step import TrainState, compiled_step, make_step
from sbr_jax.transforms.schedules import learning_rate_schedule
from sbr_jax.typing import UserError

STUDY = tiny.study()
CONFIG = tiny.config()
BASE = STUDY.model.params
DATA = STUDY.domains["medical"].train
KEY = jax.random.key(0)


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def begun(found, adapter, key=KEY):
    """A method's state on the aligned model."""
    state = found.method.init(found.problem, BASE, adapter, key)
    return {name: value for name, value in state.items() if name != "diagnostics"}


def toy():
    """A step on a plain pytree, and where it starts: it compiles at once."""

    def gradient(problem, base, adapter, state, batch, key):
        def loss_fn(a):
            return jnp.mean((batch["tokens"] @ (a["w"] * base) - batch["mask"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        return grads, {}, {"loss": loss}

    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    step = compiled_step(make_step(None, gradient, optimizer))
    adapter = {"w": jnp.ones(3, jnp.float32)}
    train = TrainState(adapter, optimizer.init(adapter), jnp.zeros((), jnp.int32))
    return step, loop.Progress(train, {})


def toy_batch(step):
    rng = np.random.default_rng(step)
    return {
        "tokens": rng.normal(size=(4, 3)).astype(np.float32),
        "mask": rng.normal(size=4).astype(np.float32),
    }


def run_toy(batches=toy_batch, start=None, **options):
    step, fresh = toy()
    defaults = {"where": "toy", "log_every": 3, "quiet": True}
    return loop.train(
        lambda train, state, n: step(jnp.float32(0.5), train, state, batches(n), KEY),
        fresh if start is None else start,
        7,
        **{**defaults, **options},
    )


# --- the step -------------------------------------------------------------------------


def test_schedule_warms_up_and_ends_at_its_floor():
    rate = learning_rate_schedule(2e-4, 200, warmup_fraction=0.03, final_fraction=0.005)
    values = [float(rate(i)) for i in range(201)]
    assert np.argmax(values) == 6
    assert values[6] == pytest.approx(2e-4)
    assert 0 < values[0] < values[1] < values[5]
    assert values[200] == pytest.approx(1e-6)
    assert np.all(np.diff(values[6:]) < 0)
    assert float(learning_rate_schedule(1.0, 1)(0)) == pytest.approx(1.0)


@pytest.mark.thorough
def test_accumulation_equals_one_big_batch():
    results = []
    for accumulation in (1, 4):
        config = tiny.changed(CONFIG, accumulation=accumulation)
        options = {"kl_batch_size": 4, "max_rank": 6}
        found = tiny.program("safeanchor-exact", config, STUDY, **options)
        adapter = init_adapter(STUDY, CONFIG, 0)
        key = jax.random.key(3)
        state = begun(found, adapter, key)
        # A reference elsewhere, so that the anchor has a gradient.
        moved = jax.tree.map(lambda x: x + jnp.asarray(0.05, x.dtype), adapter)
        state["anchor"]["reference"] = reference_states(
            found.problem, BASE, moved, state["anchor"]
        )
        train = found.start(adapter, state)
        train, metrics = found.step(BASE, train, state, batch(DATA, 8, 0, 0), key)
        results.append((vector(train.adapter), jax.device_get(metrics)))
    (one, big), (four, small) = results
    assert big["anchor"] > 1e-4
    np.testing.assert_allclose(one, four, atol=2e-5)
    for name in ("loss", "anchor", "grad_norm"):
        np.testing.assert_allclose(big[name], small[name], rtol=1e-4)


def test_clipping_bounds_what_enters_the_optimizer():
    apply_fn, calibration = STUDY.model.apply_fn, STUDY.calibration
    transform = adamw(
        tiny.problem(apply_fn, calibration, max_grad_norm=1e-3), None, 1.0
    )
    params = {"w": jnp.zeros(4)}
    with jax.numpy_dtype_promotion("standard"):
        state = transform.init(params)
        _, state = transform.update({"w": jnp.full(4, 100.0)}, state, params)
    first = optax.tree.get(state, "mu")["w"]
    assert float(jnp.linalg.norm(first)) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_domains_seeds_and_subspaces_share_one_trace():
    @chex.assert_max_traces(n=1)
    def counting(problem, base, adapter, state, batch, key):
        return task_gradient(problem, base, adapter, state, batch, key)

    def make():
        options = {"kl_weight": 0.0, "max_rank": 6}
        return tiny.program("safeanchor-exact", CONFIG, STUDY, **options)

    found = make()
    step = compiled_step(make_step(found.problem, counting, found.optimizer))
    for seed in (0, 1):
        adapter = init_adapter(STUDY, CONFIG, seed)
        key = jax.random.key(seed)
        state = begun(found, adapter, key)
        for domain in STUDY.domains.values():
            state.pop("diagnostics", None)
            train = found.start(adapter, state)
            for number in range(2):
                data = batch(domain.train, 8, seed, number)
                train, _ = step(BASE, train, state, data, key)
            adapter, state = found.method.end_domain(
                found.problem, BASE, train.adapter, state, key
            )
    assert step._cache_size() == 1
    assert make() is found


def test_dropout_depends_on_seed_and_step_only():
    found = tiny.program("plain", tiny.changed(CONFIG, lora_dropout=0.5), STUDY)
    fresh = init_adapter(STUDY, CONFIG, 0)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), fresh)

    def loss(seed, number):
        train = dataclasses.replace(found.start(moved, {}), step=jnp.int32(number))
        key = jax.random.key(seed)
        _, metrics = found.step(BASE, train, {}, batch(DATA, 8, 0, 0), key)
        return float(metrics["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


# --- the loop -------------------------------------------------------------------------


def test_loop_resumes_to_the_same_bits():
    whole, saved = run_toy(), {}

    def keep(now):
        train = jax.tree.map(jnp.copy, now.train)
        saved[now.step] = dataclasses.replace(now, train=train)

    with_saving = run_toy(checkpoint=loop.Every(2, keep))
    assert sorted(saved) == [2, 4, 6]
    resumed = run_toy(start=saved[4])
    for other in (with_saving, resumed):
        np.testing.assert_array_equal(
            vector(whole.train.adapter), vector(other.train.adapter)
        )
        assert whole.history == other.history
        assert loop.summarise(whole.history) == loop.summarise(other.history)


def test_a_loss_that_is_not_finite_stops_and_says_where():
    def poisoned(step):
        data = toy_batch(step)
        if step == 4:
            data["mask"][0] = np.nan
        return data

    with pytest.raises(UserError, match=r"plain, seed 3, domain x: .*nan.* at step 4"):
        run_toy(poisoned, where="plain, seed 3, domain x")


def test_refresh_is_called_between_steps_only():
    seen = []

    def refresh(now):
        seen.append(now.step)
        return now

    run_toy(refresh=loop.Every(3, refresh))
    assert seen == [3, 6]


# --- what is stored, and what is refused ----------------------------------------------


def test_checkpoint_keeps_bits_and_structure(tmp_path):
    adapter = init_adapter(STUDY, CONFIG, 0)
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps_per_domain": 0}, "training.steps_per_domain"),
        ({"batch_size": True}, "training.batch_size"),
        ({"learning_rate": float("nan")}, "training.learning_rate"),
        ({"lora_targets": 3}, "training.lora_targets"),
        ({"batch_size": 6, "accumulation": 4}, "training.batch_size"),
        ({"vmap_seeds": "maybe"}, "hardware.vmap_seeds"),
    ],
)
def test_wrong_settings_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=f"expected {named}"):
        tiny.config(**options)
