"""Eight simulated devices: the same numbers, where they should be."""

import jax
import numpy as np
import pytest
import tiny

from sbr_jax.data.batches import batch
from sbr_jax.training import sharding
from sbr_jax.training.program import init_adapter
from sbr_jax.typing import UserError

STUDY = tiny.study()


def three_steps(mesh):
    settings = tiny.config(mesh=mesh)
    found = tiny.program("safeanchor-exact", settings, STUDY, max_rank=6)
    key = jax.random.key(0)
    base = sharding.place_base(found.mesh, STUDY.model.params, STUDY.model.config)
    adapter = init_adapter(STUDY, settings, 0)
    adapter = sharding.place_state(found.mesh, adapter)
    state = found.method.init(found.problem, base, adapter, key)
    del state["diagnostics"]
    state = sharding.place_state(found.mesh, state)
    train = found.start(adapter, state)
    for step in range(3):
        data = batch(STUDY.domains["medical"].train, 8, 0, step)
        data = sharding.place_batch(found.mesh, data)
        train, metrics = found.step(base, train, state, data, key)
    return found, base, train, jax.device_get(metrics)


def test_eight_devices_give_one_devices_numbers():
    assert len(jax.devices()) == 8
    _, _, alone, expected = three_steps(None)
    found, base, train, metrics = three_steps("fsdp=4,tp=2")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
        jax.device_get(alone.adapter),
        jax.device_get(train.adapter),
    )
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5)
    # The state stays where it was put, so the step is compiled once.
    assert found.step._cache_size() == 1
    wanted = sharding.state_shardings(found.mesh, train)
    for leaf, place in zip(
        jax.tree.leaves(train), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    spread = {len(x.sharding.device_set) for x in jax.tree.leaves(base)}
    assert spread == {8}
    q_proj = base["layers"]["q_proj"]
    assert q_proj.addressable_shards[0].data.size == q_proj.size // 8


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=0", "fsdp=2,fsdp=2", "dp=2", "fsdp=two", "fsdp=2;tp=2"]
)
def test_bad_mesh_strings_are_refused(text):
    with pytest.raises(UserError, match="expected axis=size pairs"):
        sharding.make_mesh(text)


def test_too_many_devices_are_refused():
    with pytest.raises(UserError, match="needs 16 devices, this job has 8"):
        sharding.make_mesh("fsdp=16")
