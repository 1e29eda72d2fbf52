"""Codes made while a checkpoint is loaded, and codes in slices on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, params
from jax.sharding import PartitionSpec as P
from quantize_case import DEEP
from trees import same

from sbr_jax import models
from sbr_jax.models import layers, weights
from sbr_jax.models.codes import KINDS
from sbr_jax.models.quantize import quantize
from sbr_jax.training.sharding import make_mesh

MESH = make_mesh("fsdp=4,tp=2")


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.save(folder, models.make_model(CONFIG, params()))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_loading_into_codes_equals_quantising_what_was_loaded(folder, kind):
    found = models.load(folder, quantize=kind, dtype=jnp.bfloat16)
    wanted = quantize(models.load(folder, dtype=jnp.bfloat16), kind)
    same(found.params, wanted.params)
    assert found.apply_fn is wanted.apply_fn


def test_one_matrix_is_dense_at_a_time_while_loading(folder, monkeypatch):
    before = [x.shape for x in jax.live_arrays()]
    alive, real = [], weights.encode

    def counting(matrix, kind):
        now = [x.shape for x in jax.live_arrays()]
        alive.append(now.count(matrix.shape) - before.count(matrix.shape))
        return real(matrix, kind)

    monkeypatch.setattr(weights, "encode", counting)
    models.load(folder, quantize="nf4")
    assert alive == [1] * (7 * CONFIG.layers)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_mesh_gives_the_same_codes_in_slices(folder, kind):
    spread = models.load(folder, quantize=kind, mesh=MESH).params
    plain = models.load(folder, quantize=kind).params
    same(spread, plain)
    up = spread["layers"]["up_proj"]
    assert up.codes.addressable_shards[0].data.shape[-1] == 10
    if kind == "int8":
        assert up.codes.sharding.spec == P(None, "fsdp", "tp")
        assert up.scales.sharding.spec == P(None, None, "tp")
    else:  # One block of 64 holds all 16 inputs.
        assert up.codes.sharding.spec == P(None, None, "tp")


def test_blocks_do_not_straddle_shards():
    spec = models.partition_specs(DEEP)["layers"]["q_proj"]

    def codes(block):
        weight = quantize(params(DEEP), block=block)["layers"]["q_proj"]
        return weight, models.named_shardings(spec, weight, MESH)

    weight, kept = codes(16)
    assert kept.codes.spec == kept.scales.spec == P(None, "fsdp", "tp")
    # Two blocks do not divide by four, although their 32 bytes would.
    _, dropped = codes(32)
    assert dropped.codes.spec == dropped.scales.spec == P(None, None, "tp")
    placed = jax.device_put(weight, kept)
    same(placed, weight)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(
        jax.jit(layers.project)(x, placed[0]), x @ weight[0].dense(), atol=1e-5
    )
