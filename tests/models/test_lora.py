"""Adapters: their start, their scale, their file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params, tokens
from trees import same

from sbr_jax import models
from sbr_jax.models import lora
from sbr_jax.models.layers import drop
from sbr_jax.typing import UserError

APPLY = jax.jit(models.make_apply_fn(CONFIG), static_argnames="dropout_rate")


def made(targets=".*", rank=2, alpha=4.0):
    key = jax.random.key(0)
    return models.init_adapter(key, CONFIG, rank=rank, alpha=alpha, targets=targets)


def test_a_fresh_adapter_equals_the_base_exactly():
    plain = APPLY(params(), None, tokens())
    np.testing.assert_array_equal(APPLY(params(), made(), tokens()), plain)


def test_the_start_is_uniform_and_each_projections_own():
    pair = made("down_proj", rank=64, alpha=1.0)["down_proj"]
    assert pair.lora_a.shape == (CONFIG.layers, CONFIG.mlp_width, 64)
    assert pair.lora_b.shape == (CONFIG.layers, 64, CONFIG.width)
    bound = CONFIG.mlp_width**-0.5
    assert 0.99 * bound < np.abs(pair.lora_a).max() <= bound
    assert not np.any(pair.lora_b)
    assert pair.scale == 1 / 64
    # Whichever others are adapted.
    assert list(made()) == list(models.TARGETS)
    same(made("v_proj")["v_proj"], made()["v_proj"])
    assert lora.select_targets("(k|v)_proj") == ("k_proj", "v_proj")


def test_b_comes_first_and_the_scale_is_static():
    pair = adapter()["q_proj"]
    leaves, structure = jax.tree.flatten(pair)
    same(leaves, [pair.lora_b, pair.lora_a])
    other = jax.tree.structure(models.LoraPair(pair.lora_b, pair.lora_a, 1.0))
    assert structure != other
    assert models.is_lora_pair(pair)
    assert not models.is_lora_pair({"lora_a": 1})


def test_what_does_not_fit_is_refused_by_name():
    for pattern in ("query", "q_pro", "("):
        named = "q_proj" * (pattern != "(")
        with pytest.raises(UserError, match=rf"targets=.*{named}"):
            made(pattern)
    pairs = adapter()
    pair = models.LoraPair(pairs["q_proj"].lora_b[:1], pairs["q_proj"].lora_a[:1], 1.0)
    for wrong in ({"q_proj": pair}, {"queries": pairs["q_proj"]}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            APPLY(params(), wrong, tokens())


def test_a_merged_adapter_gives_the_same_logits():
    base, pairs = params(), adapter()
    merged = models.merge_adapter(base, pairs)
    np.testing.assert_allclose(
        APPLY(merged, None, tokens()), APPLY(base, pairs, tokens()), atol=2e-4
    )
    same(models.merge_adapter(base, None), base)


def test_dropout_acts_on_the_adapters_branch_only_and_by_its_key():
    base, pairs, ids = params(), adapter(), tokens()
    plain = APPLY(base, pairs, ids)

    def run(pairs, seed, rate=0.5):
        key = None if seed is None else jax.random.key(seed)
        return APPLY(base, pairs, ids, dropout_key=key, dropout_rate=rate)

    np.testing.assert_array_equal(run(pairs, None), plain)
    np.testing.assert_array_equal(run(pairs, 0, 0.0), plain)
    np.testing.assert_array_equal(run(pairs, 0), run(pairs, 0))
    assert np.abs(run(pairs, 0) - run(pairs, 1)).max() > 1e-3
    np.testing.assert_array_equal(run(None, 0), APPLY(base, None, ids))
    y = drop(jnp.ones((400, 500)), jax.random.key(0), 0.3)
    # Five standard errors of 200,000 draws.
    assert abs(float(jnp.mean(y == 0)) - 0.3) < 5 * (0.21 / 2e5) ** 0.5
    assert abs(float(jnp.mean(y)) - 1.0) < 5 * (0.3 / 0.7 / 2e5) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, dtype):
    pairs = jax.tree.map(lambda x: x.astype(dtype), adapter())
    path = tmp_path / "new" / "adapter.safetensors"
    models.save_adapter(path, pairs)
    same({**models.load_adapter(path)}, pairs)


def test_files_that_are_no_adapters_are_refused(tmp_path):
    models.save(tmp_path, models.make_model(CONFIG, params()))
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name, said in (
        ("a", "found none"),
        ("b", "no safetensors"),
        ("model", "save_adapter"),
    ):
        with pytest.raises(UserError, match=said):
            models.load_adapter(tmp_path / f"{name}.safetensors")
