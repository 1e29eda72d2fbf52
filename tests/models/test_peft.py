"""Adapters in PEFT's layout: there and back, with PEFT's names and numbers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params, tokens
from peft_case import PREFIX, save_pair, settings
from safetensors.numpy import load_file
from trees import same

from sbr_jax import models
from sbr_jax.models import peft
from sbr_jax.models.peft import load_peft, save_peft

PEFTS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "owner/name",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 4,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["o_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Settings as peft writes them."""


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    return save_pair(tmp_path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("targets", [".*", "v_proj"])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, dtype, targets):
    pairs = jax.tree.map(lambda x: x.astype(dtype), adapter(targets=targets))
    model = models.make_model(CONFIG, params())
    save_peft(tmp_path / "new" / "one", model, pairs)
    found = load_peft(tmp_path / "new" / "one", CONFIG)
    assert list(found) == [name for name in models.TARGETS if name in pairs]
    same(found, pairs)


def test_names_shapes_and_numbers_are_pefts(folder):
    tensors, raw = (
        load_file(folder / peft.TENSORS),
        json.loads((folder / peft.SETTINGS).read_text()),
    )
    assert sorted(tensors) == [
        f"{PREFIX}{layer}.self_attn.{name}_proj.lora_{part}.weight"
        for layer in (0, 1)
        for name in "oq"
        for part in "AB"
    ]
    assert raw["target_modules"] == ["o_proj", "q_proj"]
    assert (raw["r"], raw["lora_alpha"]) == (2, 4)
    assert isinstance(raw["lora_alpha"], int)
    assert set(raw) <= set(PEFTS)
    for name, pair in adapter(targets="(q|o)_proj").items():
        for layer in range(CONFIG.layers):
            place = f"{PREFIX}{layer}.self_attn.{name}"
            lora_a, lora_b = (tensors[f"{place}.lora_{x}.weight"] for x in "AB")
            assert lora_a.shape == (2, 16)
            assert lora_b.shape == (16, 2)
            # PEFT's update of an [out, in] weight, in float64.
            theirs = raw["lora_alpha"] / raw["r"] * np.float64(lora_b) @ lora_a
            ours = np.float64(pair.scale) * (
                np.float64(pair.lora_a[layer]) @ np.float64(pair.lora_b[layer])
            )
            # Rounding of doubles.
            np.testing.assert_allclose(theirs.T, ours, atol=1e-12)


def test_merging_the_files_tensors_is_merging_the_adapter(tmp_path):
    """A slow twin that knows PyTorch's layout only."""
    pairs, base = adapter(), params()
    model = models.make_model(CONFIG, base)
    models.save(tmp_path / "base", model)
    save_peft(tmp_path / "peft", CONFIG, pairs)
    merged = models.make_model(CONFIG, models.merge_adapter(base, pairs))
    models.save(tmp_path / "merged", merged)
    wanted = load_file(tmp_path / "base" / "model.safetensors")
    start = {name: value.copy() for name, value in wanted.items()}
    update = load_file(tmp_path / "peft" / peft.TENSORS)
    for name in [x for x in update if ".lora_A." in x]:
        place = name.removeprefix("base_model.model.").replace("lora_A.", "")
        wanted[place] += 2.0 * update[name.replace("lora_A", "lora_B")] @ update[name]
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        # Sums of two products of numbers near one, in float32.
        np.testing.assert_allclose(value, wanted[name], atol=2e-6, err_msg=name)
        assert np.any(value != start[name]) == ("_proj" in name)


def test_a_loaded_adapter_gives_the_same_logits_and_is_not_the_base(folder):
    apply_fn, base = jax.jit(models.make_apply_fn(CONFIG)), params()
    wanted = apply_fn(base, adapter(targets="(q|o)_proj"), tokens())
    found = apply_fn(base, load_peft(folder, CONFIG), tokens())
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found - apply_fn(base, None, tokens())).max() > 0.1


def test_the_scale_is_alpha_over_r_or_over_its_root(folder):
    assert load_peft(folder, CONFIG)["q_proj"].scale == 2.0
    settings(folder, lora_alpha=3.0)
    assert load_peft(folder, CONFIG)["q_proj"].scale == 1.5
    settings(folder, use_rslora=True)
    assert load_peft(folder, CONFIG)["q_proj"].scale == 3.0 / math.sqrt(2)


def test_alpha_gives_every_scale_back():
    for rank in range(1, 70):
        for alpha in (1, 16, 32, 0.1, 7.3, 1e-3, math.pi):
            found = peft._alpha(alpha / rank, rank)
            assert found / rank == alpha / rank
            assert alpha != int(alpha) or found == alpha


@pytest.mark.parametrize(
    "modules",
    [
        "all-linear",
        r".*\.(q|o)_proj",
        ["q_proj", "o_proj"],
        ["self_attn.q_proj", "query_key_value"],
    ],
)
def test_what_is_adapted_is_taken_from_the_tensors(folder, modules):
    settings(folder, **{**PEFTS, "target_modules": modules})
    same(load_peft(folder, CONFIG), {**adapter(targets="(q|o)_proj")})
