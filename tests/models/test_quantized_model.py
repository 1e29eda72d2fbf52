"""A quantised base computes what its twin does, stays in codes, and is read as such."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params, tokens
from jax.sharding import PartitionSpec as P
from quantize_case import BLOCK, DEEP, coded, weight
from trees import same

from sbr_jax import losses, models
from sbr_jax.models import layers, weights
from sbr_jax.models.codes import KINDS
from sbr_jax.models.quantize import dequantize, quantize
from sbr_jax.training.sharding import make_mesh

PAIRS, IDS = adapter(), tokens()
BATCH = {"tokens": IDS, "mask": jnp.ones(IDS.shape)}


def example_loss(pairs, example, base):
    logits = models.make_apply_fn(CONFIG)(base, pairs, example["tokens"][None])
    mask = example["mask"][None]
    return losses.token_cross_entropy(logits, example["tokens"][None], mask)[0]


@jax.jit
def everything(base, pairs):
    apply_fn = models.make_apply_fn(CONFIG)
    logits, hidden, seen = apply_fn(base, pairs, IDS, return_hidden=True, capture=True)
    each = jax.vmap(jax.grad(example_loss), (None, 0, None))(pairs, BATCH, base)
    return {"logits": logits, "hidden": hidden, "seen": seen, "gradients": each}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_is_its_dequantised_twin(kind):
    base = coded(kind)
    found, wanted = everything(base, PAIRS), everything(dequantize(base), PAIRS)
    plain = everything(params(), PAIRS)["logits"]
    # Float32 products of at most 20 terms, fused differently by the compiler.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        found,
        wanted,
    )
    assert float(jnp.abs(found["logits"] - plain).max()) > 1e-3
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(found["gradients"]))


def test_another_base_of_the_same_kind_compiles_nothing():
    everything(coded("nf4"), PAIRS)
    before = everything._cache_size()
    other = quantize(params(), "nf4", block=BLOCK)
    everything(jax.tree.map(lambda x: x, other), PAIRS)
    assert everything._cache_size() == before


def test_half_precision_meets_strict_promotion():
    base = quantize(params(dtype=jnp.bfloat16), "nf4", block=BLOCK)
    x = weight(5, 16, jnp.bfloat16)
    y = layers.project(x, base["layers"]["q_proj"][0])
    assert y.dtype == jnp.bfloat16
    wanted = x @ dequantize(base)["layers"]["q_proj"][0]
    np.testing.assert_array_equal(y.astype(jnp.float32), wanted.astype(jnp.float32))


# --- memory -----------------------------------------------------------------------


def temporary_bytes(base):
    # A function of its own, as a jitted one would not notice a patched layer.
    hardware = models.Hardware(unroll=1)
    apply_fn = functools.partial(models.make_apply_fn.__wrapped__(DEEP, hardware))

    def loss_fn(pairs, base, ids):
        logits = apply_fn(base, pairs, ids)
        return jnp.mean(losses.token_cross_entropy(logits, ids, jnp.ones(ids.shape)))

    pairs = models.init_adapter(jax.random.key(0), DEEP, rank=2, alpha=4.0)
    ids = jnp.zeros((1, 4), jnp.int32)
    compiled = jax.jit(jax.grad(loss_fn)).lower(pairs, base, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_backward_pass_keeps_no_dense_weights(monkeypatch):
    base = params(DEEP)
    codes = quantize(base, "nf4")
    dense = sum(base["layers"][name].nbytes for name in models.TARGETS)
    plain = temporary_bytes(base)
    # One layer of eight is dense at a time, and its largest weights twice.
    assert temporary_bytes(codes) - plain < 0.3 * dense
    monkeypatch.setattr(
        layers, "_decode_and_multiply", lambda x, w: x @ w.dense(x.dtype)
    )
    assert temporary_bytes(codes) - plain > 0.9 * dense


# --- files and meshes -----------------------------------------------------------------

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
