"""What a family's files say: both spellings, silence, mistakes, and shards."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from families_case import FILE, NAMES, SMALL, golden, loaded, write
from safetensors.numpy import load_file, save_file

from sbr_jax import models
from sbr_jax.models import hf_config
from sbr_jax.models.config import RopeScaling
from sbr_jax.typing import UserError

RAW = {name: golden(name)["config"] for name in NAMES}


def test_both_spellings_of_llama3_scaling_are_read():
    rope = dict(RAW["llama3"]["rope_parameters"])
    theta = rope.pop("rope_theta")
    old = {k: v for k, v in RAW["llama3"].items() if k != "rope_parameters"}
    wanted = hf_config.from_dict(RAW["llama3"])
    assert wanted.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    for key in ("rope_type", "type"):
        given = {k: v for k, v in rope.items() if k != "rope_type"} | {key: "llama3"}
        raw = {**old, "rope_theta": theta, "rope_scaling": given}
        assert hf_config.from_dict(raw) == wanted
    with pytest.raises(UserError, match="disagree"):
        hf_config.from_dict({**RAW["llama3"], "rope_scaling": {"type": "default"}})


def silent(kind, **settings):
    """A config.json of the first generation, which names only what is unusual."""
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    raw = {k: RAW["llama2"][k] for k in (*keep, "num_attention_heads")}
    return hf_config.from_dict({**raw, "model_type": kind, **settings})


def test_where_a_file_is_silent_the_family_decides():
    assert silent("mistral", num_key_value_heads=2).window == 4096
    gemma2 = silent("gemma2")
    assert gemma2.tied
    assert gemma2.sliding == (True, False, True, False)
    caps = gemma2.attention_cap, gemma2.logit_cap, gemma2.query_scalar
    assert caps == (50.0, 30.0, 256)
    heads = {"num_key_value_heads": 4}
    # The first files of Gemma say "gelu" and mean its tanh form.
    gemma = silent("gemma", hidden_act="gelu", hidden_activation=None, **heads)
    assert (gemma.activation, gemma.head_dim, gemma.tied) == ("gelu_tanh", 256, True)
    assert silent("qwen2", **heads).window is None
    assert not silent("qwen2", **heads).tied
    assert silent("qwen3", **heads).head_dim == 128


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "chunked"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"num_experts": 8}, "num_experts"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma", {"sliding_window": 6}, "sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3"}}, "high_freq_factor"),
        ("llama3", {"model_type": "gemma3_text"}, "known are"),
        (
            "gemma2",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_settings_are_refused_by_name(name, change, said):
    with pytest.raises(UserError, match=said):
        hf_config.from_dict({**RAW[name], **change})


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("qwen2", "llama", r"extra model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("llama2", "qwen2", r"missing model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("qwen3", "mistral", r"use_sliding_window"),
        ("qwen3", "qwen2", r"missing .*bias.*extra .*k_norm"),
        ("gemma2", "gemma", r"sliding_window|softcapping"),
        ("gemma", "llama", r"hidden_act"),
        ("gemma", "gemma2", r"missing .*pre_feedforward_layernorm"),
        ("mistral", "llama", r"sliding_window"),
    ],
)
def test_a_checkpoint_read_as_another_family_is_refused(tmp_path, name, kind, said):
    folder = write(tmp_path, name, model_type=kind)
    with pytest.raises(UserError, match=said):
        models.load(folder)


def test_settings_that_a_family_cannot_say_are_not_saved(tmp_path):
    config = dataclasses.replace(SMALL, qkv_bias=True, logit_cap=3.0)
    model = models.make_model(config, models.init_params(jax.random.key(0), config))
    with pytest.raises(UserError, match=r"qkv_bias=True, logit_cap=3\.0"):
        models.save(tmp_path, model)
    with pytest.raises(UserError, match="expected a model_type"):
        hf_config.to_dict(dataclasses.replace(SMALL, model_type="own"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 4, "sliding": (True, True)}, "one entry for each of 1"),
        ({"sliding": (True,)}, "expected a window"),
        ({"activation": "relu"}, "silu"),
        ({"query_scalar": 0}, "query_scalar=0"),
    ],
    ids=str,
)
def test_mistaken_settings_are_named(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SMALL, **change)
    with pytest.raises(UserError, match="'linear' or 'llama3'"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(UserError, match="low < high"):
        RopeScaling("llama3", 2.0, 4.0, 1.0)


def test_equal_patterns_are_equal_settings():
    none = dataclasses.replace(SMALL, window=4, sliding=(False,))
    assert none == SMALL
    every = dataclasses.replace(SMALL, window=4)
    assert every == dataclasses.replace(SMALL, window=4, sliding=[True])
    assert hash(every) != hash(SMALL)
    assert not every.alternates


def test_a_file_that_is_cut_short_is_one_clear_error(tmp_path):
    path = write(tmp_path, "qwen2") / FILE
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 40, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short") as caught:
            models.load(tmp_path)
        assert "\n" not in str(caught.value)


def shard(folder):
    """Spread the tensors over two files, the way transformers does."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    listing = {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        listing |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listing}))
    return index, listing


def test_shards_are_read_and_what_is_wrong_with_them_is_named(tmp_path):
    index, listing = shard(write(tmp_path, "gemma2"))
    params = models.load(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, params, loaded("gemma2").params)
    first, second = sorted(set(listing.values()))
    swapped = {**listing, "model.norm.weight": first}
    index.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(UserError, match=r"disagree about model\.norm"):
        models.load(tmp_path)
    for text, said in (("{}", "weight_map"), ("[]", "JSON object"), ("{", "JSON")):
        index.write_text(text)
        with pytest.raises(UserError, match=said):
            models.load(tmp_path)
    index.write_text(json.dumps({"weight_map": listing}))
    (tmp_path / second).unlink()
    with pytest.raises(UserError, match=f"{second}, which is missing"):
        models.load(tmp_path)
