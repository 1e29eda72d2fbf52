"""A new subspace in a running optimizer; bypasses that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms_case import PARAMS, S, space, tree

from sbr_jax import (
    UserError,
    add_bypass,
    empty_subspace,
    fisher_relaxation,
    gradient_projection,
    project_onto_complement,
    read_subspace,
    replace_subspace,
    update_projection,
)


def test_replacing_finds_the_subspace_anywhere():
    with jax.numpy_dtype_promotion("standard"):
        nested = optax.inject_hyperparams(
            lambda learning_rate: optax.MultiSteps(
                optax.chain(
                    optax.masked(
                        gradient_projection(S, optax.adam(learning_rate)),
                        {"v": True, "w": True},
                    )
                ),
                2,
            ).gradient_transformation()
        )(learning_rate=0.1)
        state = nested.init(PARAMS)
    other = space(12)
    new = jax.jit(replace_subspace)(state, other, {"v": 0.5, "w": 0.25})
    assert jax.tree.structure(new) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, read_subspace(new), other)
    relaxed_state = new.inner_state.inner_opt_state[0].inner_state[0]
    assert relaxed_state.coefficients["w"].tolist() == [0.25] * 3
    assert read_subspace(state).trace["v"][0] == S.trace["v"][0]  # pure
    again = replace_subspace(new, other)  # None keeps the coefficients
    kept = again.inner_state.inner_opt_state[0].inner_state[0].coefficients
    assert kept["v"].tolist() == [0.5] * 3


def test_replacing_does_not_trace_again():
    count = {"n": 0}
    tx = gradient_projection(S, optax.sgd(1.0))

    @jax.jit
    def step(g, state):
        count["n"] += 1
        return tx.update(g, state, PARAMS)

    _, state = step(tree(600), tx.init(PARAMS))
    for seed, alpha in ((13, None), (14, 0.5), (15, fisher_relaxation(S, 0.1))):
        state = replace_subspace(state, space(seed, rows=seed - 12), alpha)
        _, state = step(tree(601), state)
    state = replace_subspace(state, empty_subspace(PARAMS, max_rank=4, layer_axes=1))
    step(tree(602), state)
    assert count["n"] == 1


def test_donating_the_state_leaves_the_users_subspace_alone():
    s = space(17)
    tx = gradient_projection(s, optax.sgd(1.0), coefficients=fisher_relaxation(s))
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(tree(0), tx.init(PARAMS))
    other = space(18)
    _, state = step(tree(1), replace_subspace(state, other))
    for x in jax.tree.leaves((s, other)):
        assert not x.is_deleted()
    tx.init(PARAMS)  # and can be used again


def test_replacing_what_is_not_there_or_does_not_fit_is_an_error():
    bare = optax.sgd(0.1).init(PARAMS)
    with pytest.raises(UserError, match="holds a subspace"):
        replace_subspace(bare, S)
    with pytest.raises(UserError, match="holds a subspace"):
        read_subspace(bare)
    state = update_projection(S, 1e-2).init(PARAMS)
    wide = empty_subspace(PARAMS, max_rank=5, layer_axes=1)
    with pytest.raises(UserError, match=r"\(3, 20, 4\) at \['v'\], got \(3, 20, 5\)"):
        replace_subspace(state, wide)
    flat = empty_subspace(PARAMS, max_rank=4)
    with pytest.raises(UserError, match="same parameters"):
        replace_subspace(state, flat)
    with pytest.raises(UserError, match=r"relaxed\(...\)"):
        replace_subspace(project_onto_complement(S).init(PARAMS), S, 0.5)
    with pytest.raises(UserError, match=r"coefficient of shape \(3,\) at \['w'\]"):
        replace_subspace(state, S, {"v": 0.0, "w": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"one entry for each of the units"):
        replace_subspace(state, S, {"v": 0.0})
    with pytest.raises(UserError, match=r"expected parameters.*\['v'\]"):
        update_projection(S, 1e-2).init({"v": jnp.zeros(3), "w": PARAMS["w"]})


def test_bypass_ignores_masked_units_and_casts():
    tx = add_bypass()
    u = {"v": optax.MaskedNode(), "w": jnp.ones(2, jnp.bfloat16)}
    out, _ = tx.update(u, tx.init(u), bypass={"v": jnp.ones(3), "w": jnp.ones(2)})
    assert out["w"].dtype == jnp.bfloat16
    assert out["w"].tolist() == [2.0, 2.0]
    assert isinstance(out["v"], optax.MaskedNode)


@pytest.mark.parametrize(
    "bypass",
    [
        {"v": jnp.zeros(3)},
        {"v": jnp.zeros(3), "w": jnp.zeros(()), "x": jnp.zeros(1)},
        {"v": jnp.zeros(3), "w": jnp.zeros(())},
        {"v": jnp.zeros(3), "w": {"x": jnp.zeros(2)}},
    ],
)
def test_a_bypass_that_does_not_fit_is_refused_by_every_recipe(bypass):
    params = {"v": jnp.ones(3), "w": jnp.ones(2)}
    s = empty_subspace(params, max_rank=1)
    for tx in (
        add_bypass(),
        gradient_projection(s, optax.sgd(0.1)),
        update_projection(s, 0.1),
    ):
        with pytest.raises(UserError, match="bypass: expected"):
            tx.update(params, tx.init(params), params, bypass=bypass)
