"""What a family's files say: both spellings, silence, mistakes, and shards."""

import dataclasses
import json

import jax
import pytest
from families_case import NAMES, SMALL, golden, loaded, write

from sbr_jax import models
from sbr_jax.models import hf_config
from sbr_jax.models.config import RopeScaling
from sbr_jax.typing import UserError

RAW = {name: golden(name)["config"] for name in NAMES}
LONGROPE, YARN = (RAW[n]["rope_parameters"] for n in ("phi3", "qwen2-yarn"))


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
    gemma3 = silent("gemma3_text", num_hidden_layers=7)
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.window) == (
        1e6,
        1e4,
        4096,
    )
    assert gemma3.sliding == (True,) * 5 + (False, True)
    olmo3 = silent("olmo3", num_hidden_layers=5)
    assert (olmo3.rope_theta, olmo3.local_rope_theta) == (500000.0, None)
    assert olmo3.sliding == (True, True, True, False, True)
    assert silent("smollm3").rope_layers == (True, True, True, False)
    assert silent("phi3").context == 4096
    granite = silent("granite")
    assert (granite.attention_scale, granite.embedding_multiplier) == (1.0, 1.0)


def test_first_spellings_of_stretched_rope_mean_the_same():
    """As the hub's files of Phi-3, Gemma 3 and OLMo 3 say it."""
    old = {k: v for k, v in RAW["phi3"].items() if k != "rope_parameters"}
    lists = {k: v for k, v in LONGROPE.items() if k.endswith("_factor")}
    wanted = hf_config.from_dict(RAW["phi3"])
    for kind in ("su", "longrope"):
        raw = {**old, "rope_theta": 500.0, "rope_scaling": {"type": kind, **lists}}
        assert hf_config.from_dict(raw) == wanted
    assert wanted.context == 64
    # sqrt(1 + ln(128 / 64) / ln 64), by hand: sqrt(7 / 6).
    assert wanted.rope_scaling.attention == pytest.approx(1.0801234497)
    old = {k: v for k, v in RAW["gemma3"].items() if k != "rope_parameters"}
    raw = {
        **{k: v for k, v in old.items() if k != "layer_types"},
        **{"rope_theta": 5000.0, "rope_local_base_freq": 20.0},
        **{"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "sliding_window_pattern": 3,
    }
    assert hf_config.from_dict(raw) == hf_config.from_dict(RAW["gemma3"])
    old = {k: v for k, v in RAW["olmo3"].items() if k != "rope_parameters"}
    scaling = {k: v for k, v in YARN.items() if k != "rope_theta"}
    raw = {**old, "rope_theta": 500.0, "rope_scaling": scaling}
    assert hf_config.from_dict(raw) == hf_config.from_dict(RAW["olmo3"])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama2", {"attention_bias": True}, "attention_bias"),
        ("llama2", {"mlp_bias": True}, "mlp_bias"),
        ("llama2", {"rope_parameters": {"rope_type": "default", "odd": 1}}, "odd"),
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
        ("llama3", {"model_type": "olmo"}, "known are .*did you mean 'olmo"),
        ("llama3", {"model_type": "phi"}, "known are"),
        ("llama3", {"model_type": "gemma3"}, "did you mean 'gemma'"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama3", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
        (
            "phi3",
            {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}},
            "partial_rotary_factor=0.75",
        ),
        ("phi3", {"rope_parameters": {**LONGROPE, "short_factor": [1.0]}}, "4 short"),
        (
            "phi3",
            {"rope_parameters": {**LONGROPE, "long_factor": [0, 1, 1, 1]}},
            "long_factor",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "'long_factor'"),
        ("phi3", {"rope_parameters": {**LONGROPE, "factor": 2.0}}, "factor"),
        ("phi3", {"hidden_act": "relu2"}, "hidden_act"),
        ("qwen2-yarn", {"rope_parameters": {**YARN, "mscale": 0.7}}, "mscale"),
        ("qwen2-yarn", {"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
        (
            "qwen2-yarn",
            {"rope_parameters": {**YARN, "beta_fast": 0.1}},
            "low < high",
        ),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "full_attention"),
        ("gemma3", {"rope_parameters": {"full_attention": 7}}, "full_attention=7"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": YARN}},
            "sliding_attention .*'yarn'",
        ),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"sliding_window": 6}, "sliding_window"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "chunked"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [2, 0, 0, 0]}, "no_rope_layers"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window"),
        ("granite", {"attention_bias": True}, "attention_bias"),
        ("granite", {"num_local_experts": 8}, "num_local_experts"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier=0"),
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
        ("phi3-window", "mistral", r"missing .*gate_proj.*extra .*gate_up_proj"),
        ("qwen3", "olmo2", r"missing .*post_feedforward_layernorm"),
        ("olmo2", "llama", r"missing .*input_layernorm.*extra .*k_norm"),
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
        ({"rope_layers": (True, False)}, "one entry for each of 1"),
        ({"residual_multiplier": 0.0}, "residual_multiplier=0"),
        ({"rope_scaling": RopeScaling("longrope", 2.0, short=(1.0,))}, "4 short"),
        ({"rope_scaling": RopeScaling("yarn", 2.0), "rope_theta": 1.0}, "above 1"),
    ],
    ids=str,
)
def test_mistaken_settings_are_named(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SMALL, **change)
    with pytest.raises(UserError, match="'linear', 'llama3', 'yarn', 'longrope'"):
        RopeScaling("dynamic", 2.0)
    with pytest.raises(UserError, match="low < high"):
        RopeScaling("llama3", 2.0, 4.0, 1.0)


def test_equal_patterns_are_equal_settings():
    none = dataclasses.replace(SMALL, window=4, sliding=(False,))
    assert none == SMALL
    every = dataclasses.replace(SMALL, window=4)
    assert every == dataclasses.replace(SMALL, window=4, sliding=[True])
    assert hash(every) != hash(SMALL)
    assert not every.alternates
    assert dataclasses.replace(SMALL, rope_layers=[True]) == SMALL
    assert dataclasses.replace(SMALL, local_rope_theta=7.0) == SMALL
    alike = dataclasses.replace(every, local_rope_theta=every.rope_theta)
    assert alike == every


def test_what_is_wrong_with_shards_is_named(tmp_path):
    model = loaded("gemma2")
    models.save(tmp_path, model, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())["weight_map"]
    first, *_, last = sorted(set(listing.values()))
    place = listing["model.norm.weight"]
    swapped = {**listing, "model.norm.weight": first if place == last else last}
    index.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(UserError, match=r"disagree about model\.norm"):
        models.load(tmp_path)
    index.write_text(json.dumps({"weight_map": listing}))
    (tmp_path / last).unlink()
    with pytest.raises(UserError, match=f"{last}, which is missing"):
        models.load(tmp_path)
