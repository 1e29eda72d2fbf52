"""A tree with projections in codes: its layout, its bytes, and who refuses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params
from quantize_case import BLOCK, coded, nbytes
from trees import same

from sbr_jax import models
from sbr_jax.attacks.ablation import ablate_direction
from sbr_jax.methods.base import Problem
from sbr_jax.methods.lox import lox
from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.models.codes import KINDS, encode
from sbr_jax.models.quantize import dequantize, quantize, require_dense, weight_bytes
from sbr_jax.typing import UserError

BIASED = dataclasses.replace(
    CONFIG, tied=False, qkv_bias=True, qk_norm=True, head_dim=6, model_type="qwen2"
)
PAIRS = adapter()


# --- the tree ---------------------------------------------------------------------


def test_only_the_projections_asked_for_are_in_codes():
    base = params()
    found = quantize(base, "int8", targets="(q|up)_proj")
    assert {k for k, v in found["layers"].items() if not isinstance(v, jax.Array)} == {
        "q_proj",
        "up_proj",
    }
    assert all(found[name] is base[name] for name in ("embed", "final_norm"))
    model = quantize(models.make_model(CONFIG, base), "int8", targets="(q|up)_proj")
    same(model.params, found)
    same(dequantize(model).params, dequantize(found))
    back = dequantize(found)
    assert jax.tree.structure(back) == jax.tree.structure(base)
    assert back["layers"]["k_proj"] is base["layers"]["k_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_coded_one_by_one(kind):
    stack, base = coded(kind)["layers"]["down_proj"], params()["layers"]["down_proj"]
    assert stack.shape == base.shape
    same(stack[1], encode(base[1], kind, BLOCK))
    _, scanned = jax.lax.scan(lambda c, w: (c, w.dense()), 0, stack)
    np.testing.assert_array_equal(scanned, stack.dense())
    shapes = jax.eval_shape(lambda x: quantize(x, kind, block=BLOCK), params())
    same(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), coded(kind)),
    )


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["llama", "qwen"])
@pytest.mark.parametrize("kind", [None, "nf4-double"])
def test_bytes_are_known_beforehand(config, kind):
    base = params(config, jnp.bfloat16)
    base = base if kind is None else quantize(base, kind)
    assert weight_bytes(config, jnp.bfloat16, kind) == nbytes(base)


def test_seven_billion_weights_fit():
    llama = models.ModelConfig(
        vocab_size=32000, width=4096, mlp_width=11008, layers=32, heads=32, tied=False
    )
    assert weight_bytes(llama) == 2 * 6_738_415_616
    assert 4.1e9 < weight_bytes(llama, quantize="nf4") < 4.2e9


# --- who computes with base weights -----------------------------------------------


def test_merging_and_ablation_decode_what_they_edit():
    base, dense = coded("nf4"), dequantize(coded("nf4"))
    pairs = {"q_proj": PAIRS["q_proj"]}
    found = models.merge_adapter(base, pairs)
    wanted = models.merge_adapter(dense, pairs)
    same(found["layers"]["q_proj"], wanted["layers"]["q_proj"])
    assert found["layers"]["k_proj"] is base["layers"]["k_proj"]
    direction = jax.random.normal(jax.random.key(4), (CONFIG.width,))
    found = ablate_direction(base, direction)
    same(dequantize(found), ablate_direction(dense, direction))


def test_whoever_needs_dense_weights_refuses_codes(tmp_path):
    base, key = coded("nf4"), jax.random.key(0)
    problem = Problem(None, None, unaligned=params())
    for name, hook in (("lox", lox().prepare), ("safe-lora", safe_lora().init)):
        with pytest.raises(UserError, match=f"{name}: .*nf4 codes.*quantize="):
            hook(problem, base, PAIRS, key)
    with pytest.raises(UserError, match=r"save: expected dense.*q_proj.*dequantize"):
        models.save(tmp_path, models.make_model(CONFIG, base))
    assert not list(tmp_path.iterdir())
    require_dense(params(), "nobody")
    with pytest.raises(UserError, match=r"somebody: .*nf4 codes in down_proj"):
        require_dense(base, "somebody")
    with pytest.raises(UserError, match="quantize: expected dense weights, got nf4"):
        quantize(base, "int8")


def test_bad_settings_are_refused_before_anything_is_read():
    for change, message in (
        ({"kind": "int4"}, "expected one of nf4, nf4-double, int8, got 'int4'"),
        ({"block": 7}, "expected an even number of inputs, got 7"),
        ({"targets": "head"}, "matches no projection"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(params(), **change)
    with pytest.raises(UserError, match="expected one of nf4"):
        models.load("/nowhere/at/all", quantize="fp4")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_named(kind):
    base = params()
    stack = base["layers"]["k_proj"].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(UserError, match="k_proj holds a weight that is not finite"):
        quantize({**base, "layers": {**base["layers"], "k_proj": stack}}, kind)
