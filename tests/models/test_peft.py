"""Adapters in PEFT's layout: there and back, with PEFT's names and numbers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params
from safetensors.numpy import load_file, save_file
from trees import same

from sbr_jax import models
from sbr_jax.models import peft
from sbr_jax.models.peft import load_peft, save_peft
from sbr_jax.typing import UserError

UNSET = (
    *("alora_invocation_tokens", "auto_mapping", "corda_config", "eva_config"),
    *("exclude_modules", "layer_replication", "layers_pattern", "megatron_config"),
    *("layers_to_transform", "modules_to_save", "revision", "trainable_token_indices"),
)
PEFTS = {
    **dict.fromkeys(UNSET),
    **{"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}},
    **{"base_model_name_or_path": "owner/name", "megatron_core": "megatron.core"},
    **{"bias": "none", "ensure_weight_tying": False, "fan_in_fan_out": False},
    **{"inference_mode": True, "init_lora_weights": True, "lora_alpha": 4, "r": 2},
    **{"lora_bias": False, "lora_dropout": 0.05, "qalora_group_size": 16},
    **{"peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM"},
    **{"target_modules": ["o_proj", "q_proj"], "use_dora": False, "use_rslora": False},
}
"""Settings as peft writes them."""


PREFIX = "base_model.model.model.layers."


def settings(folder, **changes):
    path = folder / peft.SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(folder, change):
    tensors = load_file(folder / peft.TENSORS)
    change(tensors)
    save_file(tensors, folder / peft.TENSORS)


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """An adapter of two projections, scale 2."""
    save_peft(tmp_path, CONFIG, adapter(targets="(q|o)_proj"))
    return tmp_path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("targets", [".*", "v_proj"])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, dtype, targets):
    pairs = jax.tree.map(lambda x: x.astype(dtype), adapter(targets=targets))
    model = models.make_model(CONFIG, params())
    save_peft(tmp_path / "new" / "one", model, pairs)
    found = load_peft(tmp_path / "new" / "one", CONFIG)
    assert list(found) == [name for name in models.TARGETS if name in pairs]
    same(found, pairs)


PHI3 = dataclasses.replace(CONFIG, model_type="phi3")
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.mark.parametrize("targets", [".*", "(q|v)_proj", "o_proj", "up_proj"])
def test_an_adapter_of_fused_modules_comes_back_bit_for_bit(tmp_path, targets):
    pairs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter(targets=targets))
    # New adapters have a B of zeros.
    for given in (pairs, {n: zeroed(pair) for n, pair in pairs.items()}):
        save_peft(tmp_path, PHI3, given)
        found = load_peft(tmp_path, PHI3)
        assert list(found) == [name for name in models.TARGETS if name in given]
        same(found, {**given})


def zeroed(pair):
    return dataclasses.replace(pair, lora_b=jnp.zeros_like(pair.lora_b))


def test_members_that_share_their_a_are_one_pair_of_the_same_rank(tmp_path):
    """As peft adapts such modules: there and back without a pattern of ranks."""
    pairs = adapter()
    for members in SHARED:
        first = pairs[members[0]].lora_a
        pairs |= {n: dataclasses.replace(pairs[n], lora_a=first) for n in members}
    save_peft(tmp_path, PHI3, pairs)
    raw = json.loads((tmp_path / peft.SETTINGS).read_text())
    assert raw["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (raw["r"], raw["rank_pattern"], raw["alpha_pattern"]) == (2, {}, {})
    shapes = {k: v.shape for k, v in load_file(tmp_path / peft.TENSORS).items()}
    assert shapes[f"{PREFIX}0.self_attn.qkv_proj.lora_A.weight"] == (2, 16)
    assert shapes[f"{PREFIX}0.self_attn.qkv_proj.lora_B.weight"] == (32, 2)
    same(load_peft(tmp_path, PHI3), {**pairs})


def test_a_fused_file_updates_the_fused_weight_by_the_parts(tmp_path):
    """A slow twin: α / r · B A of the module is the projections' updates stacked."""
    pairs = adapter(targets="(q|v|gate)_proj")
    save_peft(tmp_path, PHI3, pairs)
    raw, tensors = (
        json.loads((tmp_path / peft.SETTINGS).read_text()),
        load_file(tmp_path / peft.TENSORS),
    )
    places = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    for place, members in zip(places, SHARED, strict=True):
        name = place.split(".")[1]
        scale = raw["alpha_pattern"][name] / raw["rank_pattern"][name]
        for layer in range(CONFIG.layers):
            lora_a, lora_b = (
                tensors[f"{PREFIX}{layer}.{place}.lora_{x}.weight"] for x in "AB"
            )
            parts = [np.zeros(CONFIG.projection(n)[::-1]) for n in members]
            for i, member in enumerate(members):
                if member in pairs:
                    pair = pairs[member]
                    product = pair.lora_a[layer] @ pair.lora_b[layer]
                    parts[i] = pair.scale * np.float64(product).T
            # Products of numbers near one, in float32 on the side of the pairs.
            wanted = np.concatenate(parts)
            found = scale * np.float64(lora_b) @ lora_a
            np.testing.assert_allclose(found, wanted, atol=2e-6)


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


# --- folders that mean another update, are damaged, or do not fit ---------------------


def test_settings_that_mean_another_update_are_refused_by_name(folder):
    right = json.loads((folder / peft.SETTINGS).read_text())
    for name, value in (
        ("task_type", "SEQ_CLS"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
        ("a_setting_of_tomorrow", 1),
    ):
        (folder / peft.SETTINGS).write_text(json.dumps({**right, name: value}))
        with pytest.raises(UserError, match=f"{name}="):
            load_peft(folder, CONFIG)
    (folder / peft.SETTINGS).write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(UserError, match="peft_type missing"):
        load_peft(folder, CONFIG)


def test_patterns_and_parts_that_no_fused_module_has_are_refused(tmp_path):
    save_peft(tmp_path, PHI3, adapter(targets="(q|o)_proj"))
    right = json.loads((tmp_path / peft.SETTINGS).read_text())
    for changes, said in (
        ({"rank_pattern": {"qkv_proj": 5}}, "rank_pattern="),
        ({"rank_pattern": {"qkv_proj": "6"}}, "rank_pattern="),
        ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 4}}, "rank_patt"),
        ({"rank_pattern": {}}, "alpha_pattern="),
        ({"rank_pattern": [3]}, "rank_pattern="),
        ({"alpha_pattern": {"qkv_proj": "12"}}, "alpha_pattern="),
        ({"alpha_pattern": {}}, "rank_pattern="),
    ):
        settings(tmp_path, **{**right, **changes})
        with pytest.raises(UserError, match=said):
            load_peft(tmp_path, PHI3)
    settings(tmp_path, **right)
    name = f"{PREFIX}1.self_attn.qkv_proj.lora_B.weight"
    edit(tmp_path, lambda t: t[name].fill(1.0))
    with pytest.raises(UserError, match="not side by side"):
        load_peft(tmp_path, PHI3)


def test_absent_files_are_refused_and_a_pickle_is_never_opened(folder, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_peft(tmp_path / "nothing", CONFIG)
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        load_peft(folder, CONFIG)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*found none"):
        load_peft(folder, CONFIG)


def test_every_tensor_has_a_place_and_every_place_a_tensor(folder):
    def change(tensors):
        del tensors[f"{PREFIX}1.self_attn.q_proj.lora_B.weight"]
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 16), "f")
        name = f"{PREFIX}0.self_attn.o_proj.lora_A.weight"
        tensors[name] = tensors[name].T.copy()

    edit(folder, change)
    with pytest.raises(UserError) as error:
        load_peft(folder, CONFIG)
    for said in (
        f"missing {PREFIX}1.self_attn.q_proj.lora_B.weight",
        "extra base_model.model.lm_head.lora_A.weight",
        f"{PREFIX}0.self_attn.o_proj.lora_A.weight has shape (16, 2), expected (2, 16)",
    ):
        assert said in str(error.value)


def test_a_projection_that_the_list_names_must_be_there(folder):
    def change(tensors):
        for name in [x for x in tensors if ".q_proj." in x]:
            del tensors[name]

    edit(folder, change)
    with pytest.raises(UserError, match=r"missing .*0\.self_attn\.q_proj\.lora_A"):
        load_peft(folder, CONFIG)
    settings(folder, target_modules="all-linear")
    assert list(load_peft(folder, CONFIG)) == ["o_proj"]
    edit(folder, dict.clear)
    with pytest.raises(UserError, match="there are none"):
        load_peft(folder, CONFIG)


def test_a_rank_other_than_the_settings_and_another_model_are_refused(folder):
    settings(folder, r=4)
    with pytest.raises(UserError, match=r"has shape \(2, 16\), expected \(4, 16\)"):
        load_peft(folder, CONFIG)
    settings(folder, r=2)
    deeper = dataclasses.replace(CONFIG, layers=3)
    with pytest.raises(UserError, match=r"3 layers: missing .*layers\.2"):
        load_peft(folder, deeper)


def test_tensors_of_several_dtypes_need_one_to_be_named(folder):
    name = f"{PREFIX}1.self_attn.q_proj.lora_B.weight"
    edit(folder, lambda t: t.update({name: t[name].astype(np.float16)}))
    with pytest.raises(UserError, match=r"float16, float32; pass dtype="):
        load_peft(folder, CONFIG)
    found = load_peft(folder, CONFIG, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_what_peft_could_not_hold_is_not_written(tmp_path):
    pairs = adapter(targets="(q|k)_proj")
    pair = pairs["q_proj"]
    other = models.LoraPair(pair.lora_b, pair.lora_a, 1.0)
    for wrong, said in (
        ({}, "at least one projection"),
        ({"queries": pair}, "'queries'"),
        ({"q_proj": pairs["k_proj"]}, r"q_proj\.lora_b of shape \(2, 2, 16\)"),
        ({**pairs, "q_proj": other}, "q_proj: 2 and 1"),
        ({**adapter(targets="v_proj", rank=3), **pairs}, "v_proj: 3 and 1.3"),
    ):
        with pytest.raises(UserError, match=said):
            save_peft(tmp_path / "out", CONFIG, wrong)
    assert not (tmp_path / "out").exists()
