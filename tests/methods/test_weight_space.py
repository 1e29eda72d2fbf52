"""Defences in weight space: all of them, the direction of alignment, LoX and AsFT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import vector
from weight_space_case import (
    BASE,
    FRESH,
    KEY,
    MODEL,
    PROBLEM,
    STUDY,
    TUNED,
    dense,
    dense_c,
    equal,
    gradient,
    layers_of,
    method,
    paper_update,
)

from sbr_jax import models
from sbr_jax.attacks import ablate_direction
from sbr_jax.data.batches import TokenDataset
from sbr_jax.methods._alignment_direction import (
    Alignment,
    alignments,
    inner_product,
    project,
)
from sbr_jax.methods.antidote import _square_sums, antidote
from sbr_jax.methods.asft import outside
from sbr_jax.methods.lox import lox, truncate
from sbr_jax.methods.o_lora import overlap
from sbr_jax.methods.safe_delta import _outer_sums
from sbr_jax.methods.salora import _gram_part, constrain
from sbr_jax.typing import UserError


@pytest.mark.parametrize("row", ["safe-lora", "asft", "lox"])
def test_weights_before_alignment_are_asked_for(row):
    def begin(problem):
        base = method(row).prepare(problem, BASE, FRESH, KEY)
        return method(row).init(problem, base, FRESH, KEY)

    changed = functools.partial(dataclasses.replace, PROBLEM)
    with pytest.raises(UserError, match=f"{row}: .*before alignment"):
        begin(changed(unaligned=None))
    with pytest.raises(UserError, match="got equal ones"):
        begin(changed(unaligned=BASE))
    layers = STUDY.unaligned["layers"]
    small = {**layers, "q_proj": layers["q_proj"][:, :, :8]}
    with pytest.raises(UserError, match=r"q_proj.*expected shape \(2, 16, 16\)"):
        begin(changed(unaligned={"layers": small}))


def test_antidote_asks_for_harmful_data():
    nothing = TokenDataset(STUDY.harmful.tokens, np.zeros_like(STUDY.harmful.mask))
    for harmful in (None, nothing):
        problem = dataclasses.replace(PROBLEM, harmful=harmful)
        with pytest.raises(UserError, match=r"antidote: .*`harmful`"):
            antidote().init(problem, BASE, FRESH, KEY)


# --- the direction of alignment -----------------------------------------------------


def test_c_is_the_papers_and_no_projector():
    found = alignments(PROBLEM, BASE, TUNED, "test")
    for name, layer in layers_of(TUNED):
        c = dense_c(name, layer)
        ours = project(TUNED[name].lora_b, found[name])[layer]
        theirs = c @ dense(TUNED[name].lora_b[layer]).T  # C B, [out, r]
        np.testing.assert_allclose(dense(ours).T, theirs, rtol=1e-4, atol=1e-5)
        assert np.abs(c @ c - c).max() > 0.01
    np.testing.assert_allclose(found["q_proj"].norm[0] ** 2, _square("q_proj", 0), 1e-4)


def _square(name, layer):
    change = dense(BASE["layers"][name][layer])
    return np.sum((change - dense(STUDY.unaligned["layers"][name][layer])) ** 2)


def test_c_is_the_identity_where_alignment_changed_nothing():
    layers = STUDY.unaligned["layers"]
    still = layers["q_proj"].at[0].set(BASE["layers"]["q_proj"][0])
    unaligned = {"layers": {**layers, "q_proj": still}}
    problem = dataclasses.replace(PROBLEM, unaligned=unaligned)
    found = alignments(problem, BASE, TUNED, "test")["q_proj"]
    rows = TUNED["q_proj"].lora_b
    np.testing.assert_array_equal(project(rows, found)[0], rows[0])
    assert jnp.abs(project(rows, found)[1] - rows[1]).max() > 0.01
    # And its gradient is finite: 0 / 0 hides behind no `where`.
    slope = jax.grad(lambda x: jnp.sum(project(x, found)))(rows)
    np.testing.assert_array_equal(slope[0], jnp.ones_like(rows[0]))


def test_weights_before_alignment_may_lie_on_the_host():
    host = jax.tree.map(np.asarray, STUDY.unaligned)
    problem = dataclasses.replace(PROBLEM, unaligned=host)
    equal(
        alignments(problem, BASE, TUNED, "test"),
        alignments(PROBLEM, BASE, TUNED, "test"),
    )


# --- LoX ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "strength"), [(0, 1.0), (1, 0.5), (99, 1.0)])
def test_lox_is_the_truncated_extrapolation(rank, strength):
    prepared = lox(rank=rank, strength=strength).prepare(PROBLEM, BASE, FRESH, KEY)
    for name in models.TARGETS:
        for layer in range(MODEL.config.layers):
            weight = dense(BASE["layers"][name][layer])
            change = weight - dense(STUDY.unaligned["layers"][name][layer])
            u, s, v = np.linalg.svd(change, full_matrices=False)
            keep = len(s) if rank == 0 else rank
            step = (u[:, :keep] * s[:keep]) @ v[:keep]
            np.testing.assert_allclose(
                prepared["layers"][name][layer],
                weight + strength * step,
                rtol=1e-4,
                atol=1e-5,
            )
    for name in ("input_norm", "mlp_norm"):
        assert prepared["layers"][name] is BASE["layers"][name]


def test_lox_keeps_the_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    found = lox(rank=1).prepare(PROBLEM, half, FRESH, KEY)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))


# --- AsFT ---------------------------------------------------------------------------


def dense_penalty(adapter):
    total = 0.0
    for name, layer in layers_of(adapter):
        update = paper_update(name, layer, adapter)
        total += np.linalg.norm(update - dense_c(name, layer) @ update) ** 2
    return total


def test_asft_penalty_is_the_papers():
    found = alignments(PROBLEM, BASE, TUNED, "test")
    np.testing.assert_allclose(outside(TUNED, found), dense_penalty(TUNED), rtol=1e-4)
    np.testing.assert_allclose(
        gradient("asft", TUNED)[2]["penalty"], dense_penalty(TUNED), rtol=1e-4
    )


def test_asft_adds_lambda_times_the_gradient_of_the_penalty():
    difference = vector(gradient("asft", TUNED)[0]) - vector(
        gradient("plain", TUNED)[0]
    )

    def along(size):
        return dense_penalty(jax.tree.map(lambda x: x + size, TUNED))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    # A central difference of a quartic: an error of the order of the step squared.
    np.testing.assert_allclose(difference.sum(), slope, rtol=1e-2)
    assert np.abs(difference).max() > 1e-2


# --- digits -------------------------------------------------------------------------


def seen(base, adapter, tokens, capture):
    """A model of nothing but the inputs of one projection."""
    return None, {"inputs": {"q_proj": jnp.ones((2, *tokens.shape, 16))}}


def products(jaxpr):
    """The precision of every matrix product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


TOKENS, REAL = jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4))
DIRECTION = Alignment(jnp.ones((2, 16, 16)), jnp.ones(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda pair: project(pair.lora_b, DIRECTION),
        lambda pair: inner_product(pair.lora_a, pair.lora_b, pair.lora_b),
        lambda pair: constrain({"q_proj": pair}, {"q_proj": jnp.ones((2, 16, 3))}),
        lambda pair: _gram_part(seen, BASE, TOKENS, REAL, "q_proj"),
        lambda pair: _outer_sums(seen, ("q_proj",), BASE, TOKENS, REAL),
        lambda pair: _square_sums(seen, BASE, {"q_proj": pair}, TOKENS, REAL),
        lambda pair: truncate(pair.lora_a[0], 1),
        lambda pair: overlap({"q_proj": pair}, {"q_proj": pair}),
        lambda pair: models.merge_adapter(BASE, {"q_proj": pair}),
        lambda pair: ablate_direction(BASE, pair.lora_b[0, 0]),
    ],
)
def test_edits_of_weights_multiply_in_float32_on_accelerators(function):
    """Their default, of 8 to 11 bits, leaves up to a thousandth of what goes."""
    found = list(products(jax.make_jaxpr(function)(TUNED["q_proj"]).jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert found
    assert set(found) == {(highest, highest)}
