"""Which subspace: early tokens, contrast, kinds of projections, and held-out shares."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from methods_case import SETTINGS, STUDY, learned, program

from sbr_jax import UserError, from_factors
from sbr_jax.data.batches import first_tokens, take
from sbr_jax.methods import InertProjectionWarning, build
from sbr_jax.methods._projection import _warn_if_inert
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.methods.needs import needs
from sbr_jax.training.program import init_adapter
from sbr_jax.transforms import fisher_relaxation

ROW = "safeanchor-exact"


def start(study=STUDY, **options):
    """The state of a row on the start model, by the options of its method."""
    problem = program("plain").problem
    problem = dataclasses.replace(
        problem,
        calibration=study.calibration,
        calibration_controls=study.calibration_controls,
    )
    adapter = init_adapter(STUDY, SETTINGS, 0)
    options = {"max_rank": 6, "control_spectrum": False, **options}
    return build(ROW, **options).init(
        problem, STUDY.model.params, adapter, jax.random.key(0)
    )


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
@jax.grad
def gradients_of(adapter, tokens, mask):
    logits = STUDY.model.apply_fn(STUDY.model.params, adapter, tokens[None])[0]
    scores = jax.nn.log_softmax(logits[:-1])
    picked = jnp.take_along_axis(scores, tokens[1:, None], axis=1)[:, 0]
    return -jnp.sum(picked * mask[1:])


def gradients(dataset):
    """Per-example gradients of summed answer losses for B, ``{unit: [N, L, P]}``."""
    adapter = init_adapter(STUDY, SETTINGS, 0)
    found = gradients_of(adapter, *map(jnp.asarray, (dataset.tokens, dataset.mask)))
    return {
        name: np.concatenate(
            [reference.f64(x).reshape(*x.shape[:2], -1) for x in (p.lora_b, p.lora_a)],
            axis=2,
        )
        for name, p in found.items()
    }


def test_first_tokens_are_a_fisher_of_the_answers_beginnings():
    found = start(calibration_tokens=2, selectivity=False)
    cut = dataclasses.replace(STUDY, calibration=first_tokens(STUDY.calibration, 2))
    assert (cut.calibration.mask.sum(axis=1) == 2).all()
    same = start(cut, selectivity=False)
    jax.tree.map(np.testing.assert_array_equal, found["subspace"], same["subspace"])
    grads = gradients(cut.calibration)
    for name, trace in found["subspace"].trace.items():
        dense = np.mean(np.sum(grads[name] ** 2, axis=2), axis=0)
        np.testing.assert_allclose(trace, dense, rtol=1e-4)
    whole = start(selectivity=False)["subspace"].trace
    assert all((whole[name] != t).any() for name, t in found["subspace"].trace.items())


def test_shares_are_those_of_a_half_on_the_other_and_on_the_task():
    found = start(energy=0.5)["diagnostics"]
    calibration, benign = STUDY.calibration, STUDY.calibration_controls["benign"]
    first, second, task = (
        gradients(x)
        for x in (
            take(calibration, np.arange(0, len(calibration), 2)),
            take(calibration, np.arange(1, len(calibration), 2)),
            benign,
        )
    )
    for name in first:
        for layer in range(2):
            rows = first[name][:, layer]
            values, vectors = reference.eigen(rows.T @ rows)
            count = min(reference.published_rank(values, 0.5), 6)
            v = vectors[:, :count]
            shares = [
                np.sum((x[name][:, layer] @ v) ** 2) / np.sum(x[name][:, layer] ** 2)
                for x in (second, task)
            ]
            got = [found[k][name][layer] for k in ("held_out_share", "task_share")]
            np.testing.assert_allclose(got, shares, rtol=1e-3)
            np.testing.assert_allclose(
                found["selectivity"][name][layer], shares[0] / shares[1], rtol=1e-3
            )


def test_shares_and_subspaces_differentiate_one_function():
    model = STUDY.model.apply_fn
    loss = answer_loss(model, "sum")  # As shares ask for it, and then a Fisher.
    assert answer_loss(model, "sum", "empirical") is loss
    assert answer_loss(model, fisher="empirical", reduction="sum") is loss
    others = {answer_loss(model, "mean"), answer_loss(model, "sum", "sampled")}
    assert len(others - {loss}) == 2


def test_a_random_control_is_measured_as_it_is_projected():
    ours, control = (
        start(basis=basis)["diagnostics"]["held_out_share"]
        for basis in ("safety", "random")
    )
    assert all(ours[name].mean() > 2 * control[name].mean() for name in ours)


def test_shares_of_each_domain_are_in_the_record():
    first, *later = learned(ROW)[2]
    for found in (first, *later):
        assert found["selectivity"]["q_proj"].shape == (2,)
    assert (first["task_share"]["q_proj"] != later[0]["task_share"]["q_proj"]).any()


def test_contrast_finds_what_benign_answers_do_not_need():
    plain, against = (
        start(energy=0.5, contrast=contrast)["diagnostics"] for contrast in (None, 0.01)
    )
    # The controls share nothing with safety here but the manner of a random model.
    mean = [
        np.mean([x.mean() for x in jax.tree.leaves(found["task_share"])])
        for found in (plain, against)
    ]
    assert mean[1] < mean[0]


def test_contrast_wants_a_benign_control_and_says_so():
    bare = dataclasses.replace(STUDY, calibration_controls={})
    with pytest.raises(UserError, match=r"contrast=0.1: expected .*\['benign'\]"):
        start(bare, contrast=0.1)
    assert "benign" in needs(f"{ROW}:contrastive")
    assert "benign" not in needs(f"{ROW}:first-tokens")
    found = start(bare)["diagnostics"]
    assert "held_out_share" in found
    assert "selectivity" not in found


def test_each_kind_of_projection_is_compared_with_itself():
    sizes = {"q": [1.0, 3.0], "v": [100.0, 300.0]}
    rows = {
        name: jnp.sqrt(jnp.asarray(x))[None, :, None] * jnp.ones((1, 2, 1))
        for name, x in sizes.items()
    }
    s = from_factors(rows, max_rank=1, layer_axes=1)
    alpha = fisher_relaxation(s, 0.5, "kind")
    for name, x in sizes.items():
        wanted = np.maximum(0, 1 - 0.5 * np.array(x) / np.mean(x))
        np.testing.assert_allclose(alpha[name], wanted, rtol=1e-5)
    assert (fisher_relaxation(s, 0.5, "mean")["q"] > 0.98).all()
    none = from_factors(jax.tree.map(jnp.zeros_like, rows), max_rank=1, layer_axes=1)
    assert (fisher_relaxation(none, 0.5, "kind")["v"] == 1).all()


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        ({"q": [0.99, 0.97], "v": [0.96, 1.0]}, "at least 0.960 in every layer"),
        ({"q": [0.99, 0.97], "v": [0.0, 0.2]}, r"inert for q \(0.980\)"),
        ({"q": [0.9, 0.97], "v": [0.0, 0.2]}, None),
        ({"q": [0.0], "k": [1.0], "v": [1.0]}, r"k \(1.000\), v \(1.000\)"),
    ],
)
def test_kinds_that_are_inert_are_told(alpha, said):
    tree = {name: jnp.asarray(x) for name, x in alpha.items()}
    if said is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _warn_if_inert(tree)
        return
    with pytest.warns(InertProjectionWarning, match=said):
        _warn_if_inert(tree)
