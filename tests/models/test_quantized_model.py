"""A quantised base computes what its dequantised twin does, and stays in codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params, tokens
from quantize_case import BLOCK, DEEP, coded, weight

from sbr_jax import losses, models
from sbr_jax.models import layers
from sbr_jax.models.quantize import dequantize, quantize

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
