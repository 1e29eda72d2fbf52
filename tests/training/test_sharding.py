"""Eight simulated devices: the same numbers, where they should be, and no more."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec
from tiers import few

from sbr_jax import models
from sbr_jax.data.batches import batch
from sbr_jax.data.layout import arrange, choose
from sbr_jax.subspace import Subspace
from sbr_jax.training import sharding
from sbr_jax.training.program import init_adapter
from sbr_jax.training.step import TrainState
from sbr_jax.typing import UserError

STUDY = tiny.study()
STEPS, BATCH, RANK = 20, 8, 5
OPTIONS = {"plain": {}, "safeanchor-exact": {"max_rank": RANK}}
OPTIONS["unified"] = OPTIONS["safeanchor-exact"]
ALL = "data=2,fsdp=2,tp=2"


@functools.cache
def prepared(variant, mesh, packing="no"):
    """A program on a mesh with what its steps take."""
    settings = tiny.config(mesh=mesh)
    found = tiny.program(variant, settings, STUDY, **OPTIONS[variant])
    key = jax.random.key(0)
    base = sharding.place_base(found.mesh, STUDY.model.params, STUDY.model.config)
    adapter = sharding.place_state(found.mesh, init_adapter(STUDY, settings, 0))
    state = dict(found.method.init(found.problem, base, adapter, key))
    state.pop("diagnostics", None)
    state = sharding.place_state(found.mesh, state)
    data = found.method.mix(found.problem, STUDY.domains["medical"].train, 0)
    rows = sharding.row_parts(found.mesh)
    layout = choose(data, BATCH, packing=packing, rows=rows)

    def draw(step):
        (laid,) = arrange([batch(data, BATCH, 0, step)], layout)
        return sharding.place_batch(found.mesh, laid)

    return found, base, adapter, state, draw, key


@functools.cache
def trained(variant, mesh, packing="no"):
    found, base, adapter, state, draw, key = prepared(variant, mesh, packing)
    train, seen = found.start(adapter, state), []
    for step in range(STEPS):
        train, metrics = found.step(base, train, state, draw(step), key)
        seen.append(metrics)
    return train, jax.device_get(seen)


def test_the_compiled_step_has_its_own_rows_and_gathers_no_basis(capfd, uncached):
    found, base, adapter, state, draw, key = prepared("safeanchor-exact", ALL)
    train = found.start(adapter, state)
    jax.clear_caches()
    compiled = found.step.lower(base, train, state, draw(0), key).compile()
    assert "nvoluntary" not in capfd.readouterr().err
    text = compiled.as_text()
    length, width = draw(0)["tokens"].shape[1], tiny.CONFIG.width
    assert f"f32[{BATCH // 4},{length},{width}]" in text
    assert f"f32[{BATCH},{length}," not in text
    told = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    shapes = [s for line in told for s in re.findall(r"\[([\d,]+)\]", line)]
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}
    basis = state["subspace"].basis["q_proj"]
    assert sizes
    assert basis.size not in sizes
    # Weights come a layer at a time.
    stacks = [x.size // 2 for x in jax.tree.leaves(base["layers"])]
    assert max(sizes) < max(stacks)


CASES = [
    ("plain", ALL, "yes"),
    ("safeanchor-exact", ALL, "no"),
    ("safeanchor-exact", "fsdp=8", "yes"),
    ("unified", ALL, "no"),
]


@pytest.mark.parametrize(("variant", "mesh", "packing"), few(CASES, 2))
def test_twenty_losses_are_those_of_one_device(variant, mesh, packing):
    """Also where rows are packed, and the one device's are not."""
    train, found = trained(variant, mesh, packing)
    _, alone = trained(variant, None)
    losses = [[step["loss"] for step in seen] for seen in (found, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
    for name in alone[0]:
        pair = [[step[name] for step in seen] for seen in (found, alone)]
        np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, err_msg=name)
    # The state stays where it was put, so the step is compiled once.
    program = prepared(variant, mesh, packing)[0]
    assert program.step._cache_size() <= (1 if packing == "no" else 3)
    wanted = sharding.state_shardings(program.mesh, train)
    for leaf, place in zip(
        jax.tree.leaves(train), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_weights_bases_states_and_rows_are_shared_and_the_rest_is_everywhere():
    _, base, adapter, state, draw, _ = prepared("safeanchor-exact", ALL)
    weight = base["layers"]["q_proj"]
    assert weight.addressable_shards[0].data.size == weight.size // 4
    basis = state["subspace"].basis["q_proj"]
    layers, size, columns = basis.shape
    assert {x.data.shape for x in basis.addressable_shards} == {
        (layers, size // 8, columns)
    }
    tokens = draw(0)["tokens"]
    assert tokens.addressable_shards[0].data.shape[0] == BATCH // 4
    anchor = dict(state["anchor"])
    states = anchor.pop("reference")
    assert states.addressable_shards[0].data.shape == (
        *states.shape[:2],
        states.shape[2] // 8,
    )
    rest = {**state, "anchor": anchor}
    del rest["subspace"]
    for leaf in jax.tree.leaves((adapter, rest)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.num_devices == 8


# --- ahead of time --------------------------------------------------------------------


def test_shapes_get_their_places_without_devices():
    mesh = AbstractMesh((4, 2, 2), sharding.AXES)
    adapter = jax.eval_shape(lambda: init_adapter(STUDY, tiny.config(), 0))
    found = tiny.program("safeanchor-exact", tiny.config(), STUDY, max_rank=RANK)
    opt_state = jax.eval_shape(found.optimizer.init, adapter)
    number: Any = jax.ShapeDtypeStruct((), np.int32)
    train = TrainState(adapter, opt_state, number)
    places = sharding.state_shardings(mesh, train)
    held = [
        x
        for x in jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, Subspace))
        if isinstance(x, Subspace)
    ]
    assert held[0].basis["q_proj"].spec == PartitionSpec(None, sharding.AXES, None)
    assert places.adapter["q_proj"].lora_a.spec == PartitionSpec()
    base = jax.eval_shape(lambda: STUDY.model.params)
    weights = sharding.base_shardings(mesh, base, STUDY.model.config)
    assert weights["layers"]["o_proj"].spec == PartitionSpec(None, "tp", "fsdp")
    rows = {"tokens": jax.ShapeDtypeStruct((16, 10), np.int32)}
    spread = sharding.batch_shardings(mesh, rows)
    assert spread["tokens"].spec[0] == ("data", "fsdp")
    given = sharding.shapes(rows, spread)
    assert given["tokens"].sharding == spread["tokens"]


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "fsdp=0", "fsdp=2,fsdp=2", "dp=2", "fsdp=2;tp=2"])
def test_bad_mesh_strings_are_refused(text):
    with pytest.raises(UserError, match="expected axis=size pairs"):
        sharding.make_mesh(text)


def test_meshes_take_all_devices_in_the_order_of_the_axes():
    with pytest.raises(UserError, match="needs 16 devices, this job has 8"):
        sharding.make_mesh("fsdp=16")
    with pytest.raises(UserError, match=r"2 of this job's 8 .* such as data=4,fsdp=2"):
        sharding.make_mesh("fsdp=2")
    with pytest.raises(UserError, match=r"3 of this job's 8 .* product is 8$"):
        sharding.make_mesh("tp=3")
    mesh = sharding.make_mesh("tp=2,data=4")
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tp": 2}
    assert set(mesh.devices.flat) == set(jax.devices())


WRONG = {
    "rows": ({"mesh": "data=3"}, {}, "data x fsdp = 3 divides, got 8: take"),
    "microbatches": ({"mesh": "fsdp=4", "accumulation": 4}, {}, "multiple of 16"),
    "query heads": ({"mesh": "tp=3"}, {"heads": 4, "kv_heads": 4}, "4 query and 4"),
    "key heads": ({"mesh": "tp=4"}, {"heads": 4, "kv_heads": 2}, r"tp=4.* 1, 2$"),
}


@pytest.mark.parametrize(("hardware", "model", "message"), WRONG.values(), ids=WRONG)
def test_what_a_mesh_does_not_divide_is_refused(hardware, model, message):
    config = tiny.config(**hardware)
    sizes = {"vocab_size": 8, "width": 16, "mlp_width": 8, "layers": 1, "heads": 2}
    shape = models.ModelConfig(**{**sizes, **model})
    with pytest.raises(UserError, match=message):
        sharding.check_mesh(config.hardware, config.training, shape)
