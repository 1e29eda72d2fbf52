"""SafeAnchor's rows in training: projection, anchor, relaxation and controls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from methods_case import SETTINGS, STUDY, learned, program
from trees import vector

from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.methods import Hyperparameters, InertProjectionWarning, build
from sbr_jax.methods._anchor import with_kl_anchor
from sbr_jax.methods._projection import with_projection
from sbr_jax.methods._ssi import Ssi
from sbr_jax.methods.base import Method
from sbr_jax.training.program import init_adapter
from sbr_jax.typing import UserError


def test_a_projection_drops_no_hook_in_silence():
    ssi = Ssi.of(Hyperparameters().safeanchor_exact)
    options = {"projection": "update", "update_subspace": True, "refresh_every": None}
    for name in ("sbr", "ewc", "safegrad"):
        with pytest.raises(UserError, match=f"without its own .*, got {name}"):
            with_projection(build(name), ssi, control_spectrum=False, **options)


def test_an_anchor_keeps_the_gradient_of_what_it_holds():
    """Of a method that mixes or weighs, too: nothing is replaced."""
    bare = Method(
        "still",
        gradient=lambda problem, base, adapter, *rest: (
            jax.tree.map(jnp.ones_like, adapter),
            {"own": 1},
            {"loss": jnp.float32(0)},
        ),
    )
    held = with_kl_anchor(
        bare, weight=0.1, reference="aligned", direction="forward", batch_size=2
    )
    problem = program("safeanchor").problem
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    key = jax.random.key(0)
    state = held.init(problem, base, adapter, key)
    drawn = batch(STUDY.domains["medical"].train, 8, 0, 0)
    grads, extra, metrics = held.gradient(problem, base, adapter, state, drawn, key)
    # At its reference the anchor pulls with nothing.
    np.testing.assert_allclose(vector(grads), 1.0, atol=1e-5)
    assert extra == {"own": 1}
    assert set(metrics) == {"loss", "anchor"}


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


@pytest.mark.thorough
def test_published_relaxation_is_inert_on_a_confident_model_and_warns():
    study = confident_study()
    problem = tiny.problem(
        study.model.apply_fn, study.calibration, steps_per_domain=1, batch_size=2
    )
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
    size = tiny.CONFIG.width * SETTINGS.training.lora_rank  # B comes first in a unit.
    base, adapter = STUDY.model.params, init_adapter(STUDY, SETTINGS, 0)
    blocks = {}
    for protect_a in ("none", "perturb"):
        method = build("safeanchor-exact", max_rank=16, protect_a=protect_a)
        state = method.init(program("plain").problem, base, adapter, jax.random.key(0))
        basis = np.asarray(state["subspace"].basis["q_proj"])
        blocks[protect_a] = (basis[:, :size] ** 2).sum(), (basis[:, size:] ** 2).sum()
        # A merge keeps ρ of the traces: were they less than is there, too little.
        values, traces = state["subspace"].eigenvalues, state["subspace"].trace
        for name, trace in traces.items():
            assert (values[name].sum(-1) <= trace * (1 + 1e-5)).all()
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


def test_the_tasks_part_is_told_apart_from_what_the_anchor_brought():
    strict = learned("safeanchor-exact")[1]
    assert strict["safety_task"] < 1e-5
    assert strict["safety_update"] > 1e-3  # The anchor's, let past on purpose.
    relaxed = learned("safeanchor-exact:relaxed")[1]
    assert relaxed["safety_task"] > 1e-3
    alone = learned("safeanchor-exact:projection-only")[1]
    np.testing.assert_allclose(alone["safety_task"], alone["safety_update"], rtol=1e-3)


@pytest.mark.thorough
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
