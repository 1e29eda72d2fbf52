"""The same parameters in another container are the same parameters."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sbr_jax import (
    UserError,
    add_bypass,
    empty_subspace,
    from_factors,
    gradient_projection,
    merge,
    overlap,
    project_onto,
    read_subspace,
    relaxed,
    replace_subspace,
    trust_region,
    update_projection,
)

SHAPES = {
    "enc": {"kernel": (3, 4), "bias": (4,)},
    "layers": [{"kernel": (4, 2)}, {"kernel": (2, 2)}],
}


def tree(seed, *lead):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


# --- containers -----------------------------------------------------------------------


class Named(NamedTuple):
    layers: tuple  # not the order of a dict's keys
    enc: dict


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """Attributes as children, functions as None: as Equinox filters a module."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def tree_flatten_with_keys(self):
        keys = tuple(self.__dict__)
        pairs = [(jax.tree_util.GetAttrKey(k), v) for k, v in self.__dict__.items()]
        return pairs, keys

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(**dict(zip(keys, children, strict=True)))


def module(x):
    layers = [Module(activation=None, kernel=y["kernel"]) for y in x["layers"]]
    return Module(layers=layers, enc=Module(**x["enc"]), name=None)


def frozen(x):
    return pytest.importorskip("flax").core.freeze(x)


def variables(x):
    nnx = pytest.importorskip("flax.nnx")
    places = x | {"layers": dict(enumerate(x["layers"]))}
    return nnx.State(jax.tree.map(nnx.Param, places))


def boxed(x):
    meta = pytest.importorskip("flax.core.meta")
    return jax.tree.map(lambda y: meta.Partitioned(y, (None,) * y.ndim), x)


CONTAINERS = {
    "dict": lambda x: x,
    "text keys": lambda x: x | {"layers": {"0": x["layers"][0], "1": x["layers"][1]}},
    "named tuple": lambda x: Named(tuple(x["layers"]), x["enc"]),
    "module": module,
    "FrozenDict": frozen,
    "nnx.State": variables,
    "nnx pure": lambda x: pytest.importorskip("flax.nnx").as_pure(variables(x)),
    "linen boxes": boxed,
}
every = pytest.mark.parametrize("name", CONTAINERS)
PARAMS, GRADS, BYPASS = tree(0), tree(1), tree(2)


def space(wrap=lambda x: x, seed=3):
    return from_factors(wrap(tree(seed, 3)), max_rank=2, energy=1.0)


def by_name(x):
    """Leaves by their path as text, whatever the containers."""
    flat = jax.tree_util.tree_leaves_with_path(x)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix(
            "/value"
        ): leaf
        for path, leaf in flat
    }


def same(a, b):
    a, b = by_name(a), by_name(b)
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


MAKERS = {
    "update": lambda s: update_projection(s, 1e-2, coefficients=0.25),
    "gradient": lambda s: gradient_projection(s, optax.sgd(0.1), coefficients=0.25),
    "trust": lambda s: trust_region(s, 1e-3),
}


@functools.cache
def plain_step(maker):
    tx = MAKERS[maker](space())
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, bypass=BYPASS)[0]


# All containers meet one recipe on both sides, the others one container of each kind.
PLACES = [("update", "subspace"), ("update", "parameters")]
STEPS = [(name, *place) for place in PLACES for name in CONTAINERS]
STEPS += [
    (name, maker, "parameters")
    for maker in ("gradient", "trust")
    for name in ("text keys", "module", "nnx.State", "linen boxes")
]


@pytest.mark.parametrize(("name", "maker", "where"), STEPS)
def test_a_step_does_not_depend_on_the_container(name, maker, where):
    wrap = CONTAINERS[name]
    same_as = lambda x: x  # noqa: E731
    s = space(same_as if where == "parameters" else wrap)
    put = same_as if where == "subspace" else wrap
    tx = MAKERS[maker](s)
    state = tx.init(put(PARAMS))
    step, new = tx.update(put(GRADS), state, put(PARAMS), bypass=put(BYPASS))
    want = plain_step(maker)
    assert jax.tree.structure(step) == jax.tree.structure(put(GRADS))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    same(step, want)


@every
def test_subspaces_of_the_same_parameters_go_together(name):
    wrap = CONTAINERS[name]
    a, b = space(), space(wrap, seed=4)
    same(merge(a, b, max_rank=4).basis, merge(a, space(seed=4), max_rank=4).basis)
    same(overlap(b, b), overlap(space(seed=4), space(seed=4)))
    state = update_projection(a, 1e-2).init(PARAMS)
    put = replace_subspace(state, b, 0.5)
    assert jax.tree.structure(put) == jax.tree.structure(state)
    same(read_subspace(put).basis, space(seed=4).basis)


def test_layers_and_joint_units_follow_the_names():
    pair = {"q": {"b": jnp.ones((3, 2, 4)), "a": jnp.ones((3, 4, 2))}}
    flipped = {"q": Module(b=pair["q"]["b"], a=2.0 * pair["q"]["a"])}
    rows = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), (2, *x.shape)), pair
    )
    s = from_factors(
        rows, max_rank=2, unit=lambda n: isinstance(n, dict) and "a" in n, layer_axes=1
    )
    out = project_onto(flipped, s)
    want = project_onto({"q": {"a": flipped["q"].a, "b": flipped["q"].b}}, s)
    assert isinstance(out["q"], Module)
    same(out, want)


def test_haiku_names_hold_slashes():
    names = {"net/~/linear": {"w": jnp.ones((2, 3))}, "net": {"w": jnp.ones(4)}}
    s = empty_subspace(names, max_rank=1)
    step = project_onto(names, s)
    assert jax.tree.structure(step) == jax.tree.structure(names)
    with pytest.raises(UserError, match="unexpected"):
        project_onto({"net": {"~": {"linear": {"w": jnp.ones((2, 3))}}, "w": 1.0}}, s)


def test_what_differs_is_named():
    s = space()
    lost = module(PARAMS)
    del lost.enc.bias
    with pytest.raises(UserError, match=r"missing: \[\"\['enc'\]\['bias'\]\"\]"):
        project_onto(lost, s)
    more = module(PARAMS)
    more.enc.scale = jnp.ones(4)
    with pytest.raises(UserError, match=r"unexpected: \['.enc.scale'\].*partition"):
        project_onto(more, s)
    other = module(PARAMS)
    other.enc.bias = jnp.ones(5)
    with pytest.raises(UserError, match=r"\(\(4,\),\) at \['enc'\]\['bias'\], got .*5"):
        project_onto(other, s)
    with pytest.raises(UserError, match=r"same parameters.*\['enc'\]\['bias'\]"):
        merge(s, empty_subspace(other, max_rank=2), max_rank=2)


# --- parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dict", "module"])
def test_partition_takes_the_subspace_of_a_part(name):
    wrap = CONTAINERS[name]
    part = from_factors({"enc": tree(3, 3)["enc"]}, max_rank=2, energy=1.0)
    tx = optax.partition(
        {"safe": update_projection(part, 1e-2), "free": optax.sgd(1.0)},
        lambda x: jax.tree_util.tree_map_with_path(
            lambda path, _: "safe" if "enc" in jax.tree_util.keystr(path) else "free", x
        ),
    )
    state = tx.init(wrap(PARAMS))
    step, _ = tx.update(wrap(GRADS), state, wrap(PARAMS))
    found = by_name(step)
    np.testing.assert_array_equal(
        found["layers/0/kernel"], -GRADS["layers"][0]["kernel"]
    )
    own = {"enc": {k: found[f"enc/{k}"] for k in ("kernel", "bias")}}
    inside = float(optax.tree.norm(project_onto(own, part)))
    assert inside <= 1e-5 * float(optax.tree.norm(own))


def test_masked_takes_the_subspace_of_a_part():
    part = from_factors({"enc": tree(3, 3)["enc"]}, max_rank=2, energy=1.0)
    mask = {"enc": True, "layers": False}
    for make in MAKERS.values():
        tx = optax.masked(make(part), mask)
        step, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        same(step["layers"], GRADS["layers"])
        assert (step["enc"]["bias"] != GRADS["enc"]["bias"]).any()


# --- bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        *(("dict", maker) for maker in [*MAKERS, "relaxed", "bypass"]),
        ("FrozenDict", "update"),
        ("linen boxes", "update"),
    ],
)
def test_a_state_survives_flax_serialization(name, maker):
    serialization = pytest.importorskip("flax.serialization")
    wrap = CONTAINERS[name]
    makers = MAKERS | {
        "relaxed": lambda s: relaxed(gradient_projection(s, optax.sgd(0.1)), 0.5),
        "bypass": lambda s: optax.chain(add_bypass(), update_projection(s, 1e-2)),
    }
    tx = makers[maker](space())
    state = tx.init(wrap(PARAMS))
    _, state = tx.update(wrap(GRADS), state, wrap(PARAMS))
    fresh = makers[maker](empty_subspace(PARAMS, max_rank=2)).init(wrap(PARAMS))
    back = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    again, _ = tx.update(wrap(GRADS), back, wrap(PARAMS))
    want, _ = tx.update(wrap(GRADS), state, wrap(PARAMS))
    same(again, want)


def test_bytes_of_another_cap_are_refused():
    serialization = pytest.importorskip("flax.serialization")
    s, wide = space(), empty_subspace(PARAMS, max_rank=3)
    with pytest.raises(UserError, match="max_rank"):
        serialization.from_bytes(wide, serialization.to_bytes(s))
