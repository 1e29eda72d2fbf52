"""One table of transformations, one list of questions put to each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import few

from sbr_jax import (
    UserError,
    add_bypass,
    empty_subspace,
    from_factors,
    gradient_projection,
    project_onto_complement,
    read_subspace,
    relaxed,
    trust_region,
    update_projection,
)


def is_pair(node):
    return isinstance(node, dict) and "a" in node


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree(seed):
    return {
        "k": {"a": normal(seed, 2, 4, 2), "b": normal(seed + 1, 2, 2, 4)},
        "q": {"a": normal(seed + 2, 2, 4, 2), "b": normal(seed + 3, 2, 2, 6)},
    }


PARAMS, GRADS, BYPASS = tree(0), tree(10), tree(20)
S = from_factors(
    jax.tree.map(lambda *x: jnp.stack(x), tree(30), tree(40), tree(50)),
    max_rank=4,
    energy=1.0,
    unit=is_pair,
    layer_axes=1,
)

TRANSFORMATIONS = {
    "project_onto_complement": lambda s: project_onto_complement(s),
    "relaxed": lambda s: relaxed(project_onto_complement(s), 0.5),
    "add_bypass": lambda s: add_bypass(),
    "gradient_projection": lambda s: gradient_projection(s, optax.sgd(0.1)),
    "update_projection": lambda s: update_projection(s, 0.1),
    "update_projection, euclidean": lambda s: update_projection(
        s, 0.1, metric="euclidean"
    ),
    "trust_region": lambda s: trust_region(s, 1e-3),
}
STATEFUL = [name for name in TRANSFORMATIONS if name != "add_bypass"]
every = pytest.mark.parametrize("name", list(TRANSFORMATIONS))
# One of each kind of state; what is left is put together from these.
KINDS = ["project_onto_complement", "add_bypass", "update_projection", "trust_region"]
each_kind = pytest.mark.parametrize("name", few(TRANSFORMATIONS, KINDS))


def make(name, s=S):
    return TRANSFORMATIONS[name](s)


def close(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def differs(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(bool(jnp.any(jnp.abs(x - y) > 1e-4)) for x, y in pairs)


@every
def test_changes_the_result_at_all(name):
    tx = make(name)
    extra = {"bypass": BYPASS} if name == "add_bypass" else {}
    out, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)
    assert differs(out, GRADS)
    if name in STATEFUL:  # and because of the subspace
        none = empty_subspace(PARAMS, max_rank=4, unit=is_pair, layer_axes=1)
        free = make(name, none)
        other, _ = free.update(GRADS, free.init(PARAMS), PARAMS)
        assert differs(out, other)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_structure_shapes_and_dtypes(name, dtype):
    cast = lambda t: jax.tree.map(lambda x: x.astype(dtype), t)  # noqa: E731
    tx = make(name)
    state = tx.init(cast(PARAMS))
    out, new = tx.update(cast(GRADS), state, cast(PARAMS))
    like = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype.name), t)  # noqa: E731
    assert like(out) == like(cast(GRADS))
    assert like(new) == like(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@every
def test_a_missing_bypass_and_unknown_arguments_change_nothing(name):
    tx = make(name)
    zero = jax.tree.map(jnp.zeros_like, BYPASS)
    others = ({"bypass": None}, {"value": 1.0, "weather": "fair"}, {"bypass": zero})
    a, *found = (
        tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)[0] for extra in ({}, *others)
    )
    for b, atol in zip(found, (0, 0, 1e-6), strict=True):
        close(a, b, atol=atol)


@every
def test_traces_once_and_equals_eager(name):
    tx, count = make(name), {"n": 0}

    @jax.jit
    def step(g, state, params):
        count["n"] += 1
        return tx.update(g, state, params)

    state = fast = tx.init(PARAMS)
    for seed in (60, 70, 80):
        a, state = tx.update(tree(seed), state, PARAMS)
        b, fast = step(tree(seed), fast, PARAMS)
        close(a, b, atol=2e-6)
    assert count["n"] == 1


@every
def test_initialises_under_eval_shape(name):
    tx = make(name)
    shapes = jax.eval_shape(tx.init, PARAMS)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    real = tx.init(PARAMS)
    for state in (shapes, jax.eval_shape(tx.init, abstract)):
        assert jax.tree.structure(state) == jax.tree.structure(real)
        jax.tree.map(
            lambda x, y: np.testing.assert_equal(x.shape, y.shape), state, real
        )


@every
def test_works_in_a_chain(name):
    tx = optax.chain(optax.scale(2.0), make(name), optax.scale(-1.0))
    alone = make(name)
    out, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, bypass=BYPASS)
    twice = jax.tree.map(lambda g: 2.0 * g, GRADS)
    want, _ = alone.update(twice, alone.init(PARAMS), PARAMS, bypass=BYPASS)
    close(out, jax.tree.map(jnp.negative, want))


@every
@pytest.mark.parametrize("by_leaf", [False, True])
def test_masked_units_pass_untouched(name, by_leaf):
    mask = {"k": True, "q": False}
    if by_leaf:
        mask = {"k": {"a": True, "b": True}, "q": {"a": False, "b": False}}
    tx = optax.masked(make(name), mask)
    out, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, bypass=BYPASS)
    close(out["q"], GRADS["q"], atol=0)
    assert differs(out["k"], GRADS["k"])


@each_kind
def test_works_in_multi_steps(name):
    tx, alone = optax.MultiSteps(make(name), 2), make(name)
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # optax divides by an int32 count
        first, state = tx.update(GRADS, state, PARAMS)
        second, _ = tx.update(GRADS, state, PARAMS)
    close(first, jax.tree.map(jnp.zeros_like, GRADS), atol=0)
    want, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS)
    close(second, want, atol=2e-6)


@pytest.mark.parametrize("name", ["update_projection", "gradient_projection"])
def test_works_in_inject_hyperparams(name):
    if name == "update_projection":
        tx = optax.inject_hyperparams(update_projection)(S, learning_rate=0.1)
    else:

        def build(learning_rate):
            return gradient_projection(S, optax.sgd(learning_rate))

        tx = optax.inject_hyperparams(build)(learning_rate=0.1)
    state = tx.init(PARAMS)
    a, _ = tx.update(GRADS, state, PARAMS, bypass=BYPASS)
    alone = make(name)
    want, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS, bypass=BYPASS)
    close(
        a, want, atol=2e-5
    )  # hyper-parameters are float32 there: 1 − 0.999 is inexact
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    b, _ = tx.update(GRADS, state, PARAMS, bypass=BYPASS)
    close(b, jax.tree.map(lambda x: 2.0 * x, a))


@pytest.mark.parametrize("name", STATEFUL)
def test_state_owns_its_arrays(name):
    state = make(name).init(PARAMS)
    held, given = (jax.tree.leaves(s) for s in (read_subspace(state), S))
    for a, b in zip(held, given, strict=True):
        assert a is not b
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


@pytest.mark.parametrize("name", STATEFUL)
def test_wrong_parameters_are_refused_at_init(name):
    wrong = PARAMS | {"q": {"a": jnp.zeros((2, 4, 3)), "b": jnp.zeros((2, 3, 6))}}
    with pytest.raises(UserError, match=r"\['q'\].*compute the subspace on"):
        make(name).init(wrong)
    with pytest.raises(UserError, match=r"missing.*\['q'\]"):
        make(name).init({"k": PARAMS["k"]})


@each_kind
def test_keeps_the_sharding_of_the_layers(name):
    mesh = jax.make_mesh((2,), ("layers",), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec("layers"))
    put = lambda t: jax.device_put(t, spread)  # noqa: E731
    tx = make(name, jax.device_put(S, spread))
    out, state = jax.jit(tx.update)(
        put(GRADS), tx.init(put(PARAMS)), put(PARAMS), bypass=put(BYPASS)
    )
    for leaf in jax.tree.leaves(out):
        assert leaf.sharding.is_equivalent_to(spread, leaf.ndim)
    if name in STATEFUL:
        for leaf in jax.tree.leaves(read_subspace(state)):
            assert leaf.sharding.is_equivalent_to(spread, leaf.ndim)
    alone = make(name)
    want, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS, bypass=BYPASS)
    close(out, want, atol=2e-6)
