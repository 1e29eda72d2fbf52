"""The same questions to every row: does it act, is it deterministic, does it refuse?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.methods import ABLATIONS, METHODS, InertProjectionWarning, build
from sbr_jax.methods.anchor import anchor_loss
from sbr_jax.methods.base import Problem
from sbr_jax.methods.calibrate import perturb_b
from sbr_jax.training.program import init_adapter, make_program
from sbr_jax.typing import UserError

ROWS = [*METHODS, *ABLATIONS]
# Rows that differ from their method in the monitor or the repair only.
SAME_STEPS = {
    "safeanchor-exact:csm-only": "plain",
    "safeanchor-exact:no-csm": "safeanchor-exact",
    "safeanchor-exact:replay-bypass": "safeanchor-exact",
    "safeanchor:no-csm": "safeanchor",
}
STUDY = tiny.study()
SETTINGS = tiny.settings(steps_per_domain=3)


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


def overrides(row):
    options = dict(TINY.get(ABLATIONS.get(row, (row, {}))[0], {}))
    if row == "safeanchor-exact:refresh":
        options["refresh_every"] = 2
    return options


def program(row):
    return make_program(row, tuple(sorted(overrides(row).items())), STUDY, SETTINGS)


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


@pytest.mark.parametrize("row", ROWS)
def test_row_changes_the_result_and_leaves_the_base_alone(row):
    before = jax.tree.map(np.array, STUDY.model.params)
    shipped, metrics = learned(row)[:2]
    assert all(np.isfinite(v) for v in metrics.values())
    assert metrics["finite"] == 1
    result = vector(shipped)
    if row in SAME_STEPS:
        np.testing.assert_array_equal(result, vector(learned(SAME_STEPS[row])[0]))
        ours, theirs = build(row), build(SAME_STEPS[row])
        changed = ours.monitored != theirs.monitored
        assert changed or row == "safeanchor-exact:replay-bypass"
    elif row != "plain":
        assert np.abs(result - vector(learned("plain")[0])).max() > 1e-5
    jax.tree.map(np.testing.assert_array_equal, before, STUDY.model.params)


@pytest.mark.parametrize(
    "row", sorted(set(ABLATIONS) - set(SAME_STEPS) - {"safeanchor-exact:keep-base"})
)
def test_ablation_differs_from_its_method(row):
    parent = ABLATIONS[row][0]
    difference = vector(learned(row)[0]) - vector(learned(parent)[0])
    assert np.abs(difference).max() > 1e-6


@pytest.mark.parametrize("row", METHODS)
def test_row_is_deterministic_and_seeds_differ(row):
    first = vector(learned(row)[0])
    np.testing.assert_array_equal(first, vector(learn(row)[0]))
    assert np.abs(first - vector(learn(row, seed=1)[0])).max() > 1e-3


@pytest.mark.parametrize("row", METHODS)
def test_row_works_with_mapped_seeds(row):
    found = program(row)
    base, seeds = STUDY.model.params, (0, 1)
    keys = [jax.random.key(seed) for seed in seeds]
    adapters = [init_adapter(STUDY, SETTINGS, seed) for seed in seeds]
    states = [
        without_diagnostics(found.method.init(found.problem, base, a, k))
        for a, k in zip(adapters, keys, strict=True)
    ]
    domain = STUDY.domains["medical"].train
    batches = [
        batch(found.method.mix(found.problem, domain, seed), 8, seed, 0)
        for seed in seeds
    ]

    # Off B = 0: a pull to the aligned model is nothing but rounding there, which Adam's
    # first step would make as large as the learning rate.
    moved = [perturb_b(k, a, 1.0) for a, k in zip(adapters, keys, strict=True)]

    def starts():
        # The step gives its arguments away.
        copies = jax.tree.map(jnp.copy, moved)
        return [found.start(a, s) for a, s in zip(copies, states, strict=True)]

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    together, metrics = found.mapped_step(
        base, stack(starts()), stack(states), stack(batches), jnp.stack(keys)
    )
    assert metrics["loss"].shape == (2,)
    for i, one in enumerate(starts()):
        alone, _ = found.step(base, one, states[i], batches[i], keys[i])
        mine = jax.tree.map(lambda x, i=i: x[i], together.adapter)
        # A thousandth of the learning rate.
        np.testing.assert_allclose(vector(mine), vector(alone.adapter), atol=1e-5)


def test_update_projection_keeps_the_step_out_of_the_subspace():
    strict = learned("safeanchor-exact:projection-only")[1]
    assert strict["safety_update"] < strict["safety_gradient"]
    found = program("safeanchor-exact:no-relaxation")
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    key = jax.random.key(0)
    state = found.method.init(found.problem, base, adapter, key)
    state = without_diagnostics(state)
    # The anchor's gradient is zero at its reference, so nothing bypasses here.
    _, metrics = found.step(
        base,
        found.start(adapter, state),
        state,
        batch(STUDY.domains["medical"].train, 8, 0, 0),
        key,
    )
    assert metrics["safety_gradient"] > 0.05
    assert metrics["safety_update"] < 1e-5
    np.testing.assert_allclose(
        metrics["removed"], metrics["safety_gradient"], rtol=1e-4
    )


def test_gradient_projection_before_adam_leaks():
    found = program("safeanchor:no-relaxation")
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    state = found.method.init(found.problem, base, adapter, jax.random.key(0))
    state = without_diagnostics(state)
    _, metrics = found.step(
        base,
        found.start(adapter, state),
        state,
        batch(STUDY.domains["medical"].train, 8, 0, 0),
        jax.random.key(0),
    )
    assert metrics["safety_update"] > 1e-2


def test_anchor_is_zero_with_zero_gradient_at_the_reference_and_positive_after():
    problem = program("safeanchor").problem
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    safe = {k: jnp.asarray(getattr(STUDY.calibration, k)) for k in ("tokens", "mask")}
    reference = STUDY.model.apply_fn(base, adapter, safe["tokens"])
    value = jax.jit(
        jax.value_and_grad(lambda a: anchor_loss(problem, base, a, reference, safe))
    )
    loss, grads = value(adapter)
    assert abs(float(loss)) < 1e-6
    assert float(optax.tree.norm(grads)) < 1e-6
    moved = learned("plain")[3]
    loss, grads = value(moved)
    assert float(loss) > 1e-3
    assert float(optax.tree.norm(grads)) > 1e-3


def confident_study():
    """A model that is sure of every calibration answer."""
    model = tiny.model()

    def sharp(base, adapter, tokens, **options):
        return 1e3 * model.apply_fn(base, adapter, tokens, **options)

    tokens = np.array(STUDY.calibration.tokens[:6])
    for place in range(4, tiny.LENGTH):
        logits = sharp(model.params, None, jnp.asarray(tokens))
        tokens[:, place] = np.argmax(np.asarray(logits)[:, place - 1], -1)
    data = TokenDataset(tokens, STUDY.calibration.mask[:6])
    sure = dataclasses.replace(model, apply_fn=sharp)
    return tiny.study(model=sure, calibration=data, calibration_controls={})


def test_published_relaxation_is_inert_on_a_confident_model_and_warns():
    study = confident_study()
    problem = Problem(study.model.apply_fn, 1, 2, study.calibration)
    base, adapter = study.model.params, init_adapter(study, SETTINGS, 0)
    args = problem, base, adapter, jax.random.key(0)
    with pytest.warns(InertProjectionWarning, match="the projection is inert"):
        state = build("safeanchor", max_rank=4).init(*args)
    assert min(float(a.min()) for a in jax.tree.leaves(state["coefficients"])) > 0.95
    # Normalised traces do not depend on how sure the model is.
    state = build("safeanchor-exact", max_rank=4).init(*args)
    if float(optax.tree.norm(state["subspace"].trace)) > 0:
        assert min(float(a.min()) for a in jax.tree.leaves(state["coefficients"])) < 1


def test_protect_a_gives_the_first_subspace_an_a_block():
    size = tiny.CONFIG.width * SETTINGS.lora_rank  # B comes first in a unit.
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    blocks = {}
    for protect_a in ("none", "perturb"):
        method = build("safeanchor-exact", max_rank=16, protect_a=protect_a)
        state = method.init(program("plain").problem, base, adapter, jax.random.key(0))
        basis = np.asarray(state["subspace"].basis["q_proj"])
        blocks[protect_a] = (basis[:, :size] ** 2).sum(), (basis[:, size:] ** 2).sum()
    assert blocks["none"][1] == 0
    assert blocks["perturb"][1] > 0.5
    assert blocks["perturb"][0] > 0.5


def test_controls_keep_the_rank_and_lose_the_subspace():
    real = learned("safeanchor-exact:projection-only")[2][0]
    for name in ("random", "shuffled"):
        control = learned(f"safeanchor-exact:{name}")[2][0]
        jax.tree.map(
            np.testing.assert_array_equal,
            real["effective_rank"],
            control["effective_rank"],
        )


def test_diagnostics_say_what_the_report_draws():
    first, _, last = learned("safeanchor-exact")[2]
    wanted = {"alpha", "trace", "effective_rank", "spectrum", "random_spectrum"}
    assert wanted <= set(first)
    assert {"alpha", "trace", "principal_angles", "discarded"} <= set(last)
    assert last["principal_angles"]["q_proj"].shape == (2, 8)
    assert first["alpha"]["q_proj"].shape == (2,)
    assert {"safety_gradient", "removed", "safety_update", "anchor"} <= set(
        learned("safeanchor-exact")[1]
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strictness": -1.0}, "strictness"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"max_rank": 0}, "max_rank"),
        ({"projection": "grad"}, "projection"),
        ({"weighting": "x"}, "weighting"),
        ({"fisher": "x"}, "fisher"),
        ({"basis": "x"}, "basis"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"anchor_weight": float("nan")}, "anchor_weight"),
        ({"strictnes": 1.0}, "strictness"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        build("safeanchor-exact", **options)


def test_rank_above_the_dimension_is_refused_before_any_work():
    with pytest.raises(UserError, match="max_rank: expected at most the 64"):
        make_program("safeanchor", (("max_rank", 65),), STUDY, SETTINGS)


def test_unknown_rows_list_the_nearest():
    with pytest.raises(UserError, match="did you mean safeanchor"):
        build("safeancor")
    with pytest.raises(UserError, match="unknown option 'max_rank'"):
        build("plain", max_rank=3)


def test_benign_control_needs_its_data():
    problem = dataclasses.replace(program("plain").problem, calibration_controls={})
    method = build("safeanchor-exact:benign", max_rank=4)
    adapter = init_adapter(STUDY, SETTINGS, 0)
    with pytest.raises(UserError, match="calibration_controls"):
        method.init(problem, STUDY.model.params, adapter, jax.random.key(0))


def test_replay_bypass_lets_the_safety_gradient_past():
    key, adapter = jax.random.key(0), init_adapter(STUDY, SETTINGS, 0)
    task = batch(STUDY.domains["legal"].train, 4, 0, 0)
    safe = batch(STUDY.calibration, 4, 0, 0)
    results = {}
    for row in ("safeanchor-exact", "safeanchor-exact:replay-bypass"):
        method = build(row)
        results[row] = method.replay_gradient(
            program("plain").problem,
            STUDY.model.params,
            adapter,
            {},
            task,
            safe,
            jnp.float32(2.0),
            key,
        )
    joint, nothing, _ = results["safeanchor-exact"]
    task_grads, extra, _ = results["safeanchor-exact:replay-bypass"]
    assert nothing == {}
    together = jax.tree.map(jnp.add, task_grads, extra["bypass"])
    np.testing.assert_allclose(vector(together), vector(joint), atol=1e-5)
