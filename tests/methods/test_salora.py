"""SaLoRA against dense definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from trees import vector
from weight_space_case import (
    BASE,
    FRESH,
    KEY,
    MAKERS,
    PROBLEM,
    STUDY,
    TUNED,
    capture,
    dense,
    gradient,
    layers_of,
    method,
    repair_gradients,
    start,
)

from sbr_jax.methods.antidote import mean_squares
from sbr_jax.methods.salora import constrain, salora
from sbr_jax.typing import UserError


def dense_directions(name, layer, rank):
    """Right singular vectors of the outputs at the answer tokens, by NumPy's SVD."""
    data = STUDY.calibration
    _, seen = capture(BASE, None, data.tokens)
    x = dense(seen["inputs"][name][layer])[data.mask > 0]
    values, rows = np.linalg.svd(x @ dense(BASE["layers"][name][layer]))[1:]
    return rows[:rank].T, np.sum(values[:rank] ** 2) / np.sum(values**2)


def test_salora_directions_are_those_of_the_safety_outputs():
    state = salora(safety_rank=4).init(PROBLEM, BASE, FRESH, KEY)
    for name, layer in layers_of(FRESH):
        theirs, energy = dense_directions(name, layer, 4)
        ours = dense(state["directions"][name][layer])
        # Singular vectors are unique up to sign: compare the projectors.
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)
        share = state["diagnostics"]["safety_energy"][name][layer]
        np.testing.assert_allclose(share, energy, rtol=1e-4)


def test_salora_update_never_moves_a_safety_direction():
    state = start("salora")[1]
    base, shipped = method("salora").deploy(PROBLEM, BASE, TUNED, state)
    assert base is BASE
    for name, layer in layers_of(TUNED):
        basis = dense(state["directions"][name][layer])
        raw, update = (
            dense(pair.lora_a[layer]) @ dense(pair.lora_b[layer])
            for pair in (TUNED[name], shipped[name])
        )
        wanted = raw @ (np.eye(len(basis)) - basis @ basis.T)
        np.testing.assert_allclose(update, wanted, atol=1e-6)
        assert np.abs(update).max() > 1e-3  # Something is kept all the same.
        assert np.abs(update @ basis).max() < 1e-5 * np.abs(update).max()
        # Negative control: the raw update does move them.
        assert np.abs(raw @ basis).max() > 0.01 * np.abs(raw).max()


def test_salora_trains_the_model_it_deploys():
    state = start("salora")[1]
    folded = constrain(TUNED, state["directions"])
    grads, _, metrics = gradient("salora", TUNED)
    at_folded = gradient("plain", folded)
    np.testing.assert_allclose(metrics["loss"], at_folded[2]["loss"], rtol=1e-5)
    assert abs(metrics["loss"] - gradient("plain", TUNED)[2]["loss"]) > 1e-3
    for name, layer in layers_of(TUNED):
        basis = dense(state["directions"][name][layer])
        c = np.eye(len(basis)) - basis @ basis.T
        theirs = at_folded[0][name]
        np.testing.assert_allclose(
            grads[name].lora_b[layer], dense(theirs.lora_b[layer]) @ c, atol=1e-5
        )
        np.testing.assert_allclose(
            grads[name].lora_a[layer], theirs.lora_a[layer], atol=1e-5
        )
    twice = constrain(folded, state["directions"])
    np.testing.assert_allclose(vector(twice), vector(folded), atol=1e-6)


@pytest.mark.thorough
def test_salora_repairs_the_model_it_deploys():
    directions = start("salora")[1]["directions"]
    folded = constrain(TUNED, directions)
    ours, theirs = repair_gradients("salora", TUNED, folded)
    for name in ("loss", "safety_loss"):
        np.testing.assert_allclose(ours[2][name], theirs[2][name], rtol=1e-5)
    for name, pair in ours[0].items():
        along = jnp.einsum("lro,los->lrs", pair.lora_b, directions[name])
        assert np.abs(along).max() < 1e-5


def test_statistics_do_not_depend_on_the_microbatch():
    small = tiny.changed(PROBLEM, fisher_microbatch=5)  # 5, 5, 5, 5 and 4
    one = {"v_proj": TUNED["v_proj"]}
    squares = [mean_squares(problem, BASE, one) for problem in (PROBLEM, small)]
    np.testing.assert_allclose(vector(squares[0]), vector(squares[1]), rtol=1e-4)
    directions = MAKERS["salora"]().init(small, BASE, one, KEY)["directions"]["v_proj"]
    wanted = start("salora")[1]["directions"]["v_proj"]
    for ours, theirs in zip(dense(directions), dense(wanted), strict=True):
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)


def test_salora_refuses_a_rank_without_room_or_support():
    with pytest.raises(UserError, match="safety_rank: expected less than the 16"):
        salora(safety_rank=16).init(PROBLEM, BASE, FRESH, KEY)
    with pytest.raises(UserError, match="at most the 5 answer tokens"):
        salora(safety_rank=6, examples=1).init(PROBLEM, BASE, FRESH, KEY)
