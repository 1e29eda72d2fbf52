"""Folders in PEFT's layout that mean another update, are damaged, or do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter
from peft_case import PREFIX, save_pair, settings
from safetensors.numpy import load_file, save_file

from sbr_jax import models
from sbr_jax.models import peft
from sbr_jax.models.peft import load_peft, save_peft
from sbr_jax.typing import UserError


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    return save_pair(tmp_path)


def edit(folder, change):
    tensors = load_file(folder / peft.TENSORS)
    change(tensors)
    save_file(tensors, folder / peft.TENSORS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "IA3"),
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
    ],
)
def test_settings_that_mean_another_update_are_refused_by_name(folder, name, value):
    settings(folder, **{name: value})
    with pytest.raises(UserError, match=f"{name}="):
        load_peft(folder, CONFIG)


PHI3 = dataclasses.replace(CONFIG, model_type="phi3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"qkv_proj": 5}}, "rank_pattern="),
        ({"rank_pattern": {"qkv_proj": "6"}}, "rank_pattern="),
        ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 4}}, "rank_patt"),
        ({"rank_pattern": {}}, "alpha_pattern="),
        ({"rank_pattern": [3]}, "rank_pattern="),
        ({"alpha_pattern": {"qkv_proj": "12"}}, "alpha_pattern="),
        ({"alpha_pattern": {}}, "rank_pattern="),
    ],
    ids=str,
)
def test_patterns_other_than_those_of_fused_modules_are_refused(
    tmp_path, changes, said
):
    save_peft(tmp_path, PHI3, adapter(targets="(q|o)_proj"))
    settings(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        load_peft(tmp_path, PHI3)


def test_parts_of_a_fused_module_that_are_mixed_are_refused(tmp_path):
    save_peft(tmp_path, PHI3, adapter(targets="(q|o)_proj"))
    name = f"{PREFIX}1.self_attn.qkv_proj.lora_B.weight"
    edit(tmp_path, lambda t: t[name].fill(1.0))
    with pytest.raises(UserError, match="not side by side"):
        load_peft(tmp_path, PHI3)


def test_a_config_without_its_kind_is_refused(folder):
    (folder / peft.SETTINGS).write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(UserError, match="peft_type missing"):
        load_peft(folder, CONFIG)


def test_a_pickle_is_never_opened(folder):
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        load_peft(folder, CONFIG)


def test_absent_files_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_peft(tmp_path / "nothing", CONFIG)
    (folder / peft.TENSORS).unlink()
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
