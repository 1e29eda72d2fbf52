"""Fisher subspaces on eight simulated devices: one device's, and nothing gathered."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs_case import compiled

from sbr_jax import (
    Subspace,
    discarded_energy,
    fisher_subspace,
    from_factors,
    gradient_projection,
    merge,
    overlap,
    principal_angles,
    replace_subspace,
)
from sbr_jax._mesh import AXES, splitting
from sbr_jax.subspace import sketch, spectrum, units
from sbr_jax.subspace.factors import unit_eigenpairs

LAYERS, IN, OUT, K, N = 3, 6, 10, 4, 21
MESHES = {"fsdp": (1, 8, 1), "all": (2, 2, 2)}


def mesh(name):
    devices = np.array(jax.devices()).reshape(MESHES[name])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def loss(params, example, key=None):
    """A two-layer net's, of one example; P is 96 for the unit and 7 for the bias."""
    x, y = example
    for layer in range(LAYERS):
        hidden = jnp.tanh(x @ params["net"]["a"][layer])
        x = x + jnp.tanh(hidden @ params["net"]["b"][layer]) + params["bias"][layer][:6]
    noise = 0.0 if key is None else jax.random.normal(key, y.shape)
    return jnp.sum((x - y + noise) ** 2)


def case():
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    params = {
        "net": {
            "a": normal(keys[0], (LAYERS, IN, 8)),
            "b": 0.3 * normal(keys[1], (LAYERS, 8, IN)),
        },
        "bias": 0.1 * normal(keys[2], (LAYERS, 7)),
    }
    # Few directions stand out, so that a subspace is well told from the rest.
    strong = normal(keys[3], (N, 3)) @ (5.0 * jnp.eye(3, IN))
    x = np.asarray(strong + 0.1 * normal(keys[4], (N, IN)))
    y = np.asarray(normal(jax.random.key(9), (N, IN)))
    return params, [(x[:8], y[:8]), (x[8:13], y[8:13]), (x[13:], y[13:])]


UNIT = {"unit": lambda node: isinstance(node, dict) and "a" in node, "layer_axes": 1}


@functools.cache
def estimate(name=None, sampled=False):
    params, batches = case()
    if name is not None:
        params = jax.device_put(params, NamedSharding(mesh(name), P()))
    options = {"fisher": "sampled", "key": jax.random.key(3)} if sampled else {}
    return fisher_subspace(
        loss,
        params,
        batches,
        max_rank=K,
        energy=0.99,
        microbatch=5,
        buffer_rank=12,
        **UNIT,
        **options,
    )


def projectors(subspace: Subspace):
    found = jax.device_get(subspace.basis)
    return jax.tree.map(lambda v: v @ np.swapaxes(v, -1, -2), found)


def close(a, b, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance),
        jax.device_get(a),
        jax.device_get(b),
    )


def test_a_mesh_gives_one_devices_subspace():
    found, alone = estimate("all"), estimate()
    close(projectors(found), projectors(alone), atol=1e-5)
    close(found.eigenvalues, alone.eigenvalues, rtol=1e-4, atol=1e-5)
    close(found.trace, alone.trace, rtol=1e-5)
    basis = found.basis["net"]
    # Each device has an eighth of the parameters; 7 of a bias are not to be split.
    assert {x.data.shape for x in basis.addressable_shards} == {(LAYERS, 12, K)}
    assert found.basis["bias"].sharding.is_fully_replicated
    assert found.eigenvalues["net"].sharding.is_fully_replicated


@pytest.mark.thorough
def test_drawn_labels_do_not_depend_on_the_mesh():
    found, alone = estimate("all", sampled=True), estimate(sampled=True)
    close(projectors(found), projectors(alone), atol=1e-5)
    close(found.trace, alone.trace, rtol=1e-5)


def other(like):
    """Another subspace of the same parameters, split like the first."""
    params, _ = case()
    factors = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(7), (5, *x.shape)), params
    )
    found = from_factors(factors, max_rank=K, energy=0.99, **UNIT)
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), found, like)


def test_merges_and_angles_of_split_bases_are_those_of_whole_ones():
    pairs = [[found, other(found)] for found in (estimate("all"), estimate())]
    merged = [merge(*pair, max_rank=2 * K, energy=1.0) for pair in pairs]
    close(*map(projectors, merged), atol=2e-5)
    kept = [merge(*pair, max_rank=2 * K, protected=pair[0]) for pair in pairs]
    close(*map(projectors, kept), atol=2e-5)
    shared = merged[0].basis["net"].addressable_shards[0].data
    assert shared.shape == (LAYERS, 12, 2 * K)
    for measure in (principal_angles, overlap):
        close(*(measure(*pair) for pair in pairs), atol=2e-5)
    close(
        *(discarded_energy(p[0], m) for p, m in zip(pairs, merged, strict=True)),
        atol=2e-5,
    )


def test_a_second_call_on_a_mesh_compiles_nothing():
    """A run asks after each domain, and a refresh replaces every few steps."""
    found = estimate("all")
    params, _ = case()
    state = gradient_projection(found, optax.sgd(0.1)).init(params)
    whole = NamedSharding(mesh("all"), P())
    state = jax.device_put(state, whole)
    calls = [
        lambda: principal_angles(found, found),
        lambda: overlap(found, found),
        lambda: discarded_energy(found, found),
        lambda: replace_subspace(state, found),
    ]
    for call in calls:
        call()
        with compiled() as again:
            jax.block_until_ready(call())
        assert again == []


# --- the compiled text ----------------------------------------------------------------

ROWS, PARAMETERS = 40, 96


def gathered(text):
    """Shapes of what all devices are told, by all-gather or all-reduce."""
    told = re.findall(r"= (.*?) all-(?:gather|reduce|to-all)(?:-start)?\(", text)
    shapes = [s for line in told for s in re.findall(r"\[([\d,]+)\]", line)]
    return {tuple(map(int, shape.split(","))) for shape in shapes}


def texts(name):
    """Compiled programs of a unit's rows on a mesh, and the shape of those."""
    grid = mesh(name)
    split = splitting(PARAMETERS, grid)
    assert split is not None
    params, _ = case()
    mark = units.fingerprint({"net": params["net"]}, **UNIT)
    whole = NamedSharding(grid, P())

    def shape(dims, *spec, dtype=jnp.float32):
        place = NamedSharding(grid, P(*spec)) if spec else whole
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    rows = shape((LAYERS, ROWS, PARAMETERS), None, None, split.axes)
    examples = ("data", "fsdp")
    leaves = [(16, *x.shape) for x in (params["net"]["a"], params["net"]["b"])]
    part = dict(zip("ab", (shape(dims, examples) for dims in leaves), strict=True))
    number = shape((), dtype=jnp.int32)
    each: Any = shape((LAYERS,))
    total = spectrum.Scaled(each, each)
    yield sketch.write.lower([rows], [part], number, number, mark=mark, mesh=grid)
    yield sketch.cut.lower(rows, keep=20, split=split)
    yield unit_eigenpairs.lower(
        rows, total, shape(()), columns=K, energy=0.9, split=split
    )


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_no_device_is_told_all_rows_or_all_of_a_basis(name, capfd, uncached):
    # An eighth of the rows, and this device's examples with all their parameters.
    own = (
        LAYERS * PARAMETERS * 4 * (ROWS // 8 + 16 // MESHES[name][0] // MESHES[name][1])
    )
    for lowered in texts(name):
        compiled = lowered.compile()
        sizes = {int(np.prod(dims)) for dims in gathered(compiled.as_text())}
        assert sizes, "the devices have something to tell"
        # Grams [L, R, R] are; rows [L, R, P] and bases [L, P, K] are not.
        assert max(sizes) < min(LAYERS * ROWS * PARAMETERS, 2 * LAYERS * ROWS * ROWS)
        assert LAYERS * PARAMETERS * K not in sizes
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.argument_size_in_bytes < own + 500
    assert "nvoluntary" not in capfd.readouterr().err
