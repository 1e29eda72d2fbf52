"""Adapters in PEFT's layout, and folders that other programs are to load."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stories
from checkpoints import CONFIG, adapter, params, tokens
from safetensors.numpy import load_file, save_file

from sbr_jax import models
from sbr_jax.models import hf_config, peft
from sbr_jax.models.peft import load_peft, save_peft
from sbr_jax.typing import UserError

PREFIX = "base_model.model.model.layers."
GOLDEN = [json.loads(p.read_text()) for p in Path(__file__).parent.glob("golden/*")]
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


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """An adapter of two projections, scale 2."""
    save_peft(tmp_path, CONFIG, adapter(targets="(q|o)_proj"))
    return tmp_path


def settings(folder, **changes):
    path = folder / peft.SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(folder, change):
    tensors = load_file(folder / peft.TENSORS)
    change(tensors)
    save_file(tensors, folder / peft.TENSORS)


# --- there and back -------------------------------------------------------------------


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


# --- what is refused ------------------------------------------------------------------


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


def test_a_config_without_its_numbers_is_refused(folder):
    for wrong in (
        {"r": None},
        {"r": 0},
        {"r": True},
        {"lora_alpha": "16"},
        {"lora_alpha": math.inf},
    ):
        settings(folder, **{"r": 2, "lora_alpha": 4, **wrong})
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            load_peft(folder, CONFIG)
    (folder / peft.SETTINGS).write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(UserError, match="peft_type missing"):
        load_peft(folder, CONFIG)


def test_a_pickle_is_never_opened(folder):
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        load_peft(folder, CONFIG)


def test_damaged_or_absent_files_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_peft(tmp_path / "nothing", CONFIG)
    whole = (folder / peft.TENSORS).read_bytes()
    (folder / peft.TENSORS).write_bytes(whole[:-8])
    with pytest.raises(UserError, match="cut short"):
        load_peft(folder, CONFIG)
    (folder / peft.TENSORS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*found none"):
        load_peft(folder, CONFIG)
    (folder / peft.SETTINGS).write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
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


# --- whole checkpoints ----------------------------------------------------------------


def test_shards_stay_below_the_limit_and_come_back(tmp_path):
    model = models.make_model(CONFIG, params())
    models.save(tmp_path / "one", model)
    models.save(tmp_path / "many", model, max_shard_bytes=4000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors"
        for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    sizes = []
    for path in files:
        part = load_file(path)
        assert {index["weight_map"][name] for name in part} == {path.name}
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole.pop(name))
        sizes.append(sum(value.nbytes for value in part.values()))
    assert not whole
    assert max(sizes) <= 4000
    assert index["metadata"]["total_size"] == sum(sizes)
    same(models.load(tmp_path / "many").params, model.params)
    models.save(tmp_path / "each", model, max_shard_bytes=1)
    each = list((tmp_path / "each").glob("*.safetensors"))
    assert len(each) == len(index["weight_map"])
    with pytest.raises(UserError, match="at least 1"):
        models.save(tmp_path / "none", model, max_shard_bytes=0)


def test_no_weights_of_before_stay_in_the_folder(tmp_path):
    model = models.make_model(CONFIG, params())
    other = models.make_model(CONFIG, jax.tree.map(lambda x: x + 1, model.params))
    (tmp_path / "model-notes.txt").write_text("mine")
    for one, two in ((None, 4000), (4000, 9000), (9000, None)):
        models.save(tmp_path, model, max_shard_bytes=one)
        models.save(tmp_path, other, max_shard_bytes=two)
        same(models.load(tmp_path).params, other.params)
        names = {path.name for path in tmp_path.glob("*.safetensors*")}
        index = "model.safetensors.index.json"
        assert (index in names) == (two is not None)
        assert ("model.safetensors" in names) == (two is None)
        if two is not None:
            listed = json.loads((tmp_path / index).read_text())["weight_map"]
            assert names == {*listed.values(), index}
    assert (tmp_path / "model-notes.txt").exists()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["config"]["model_type"])
def test_configurations_are_written_in_both_spellings_of_transformers(golden):
    config = hf_config.from_dict(golden["config"])
    raw = hf_config.to_dict(config, "bfloat16")
    old = {k: v for k, v in raw.items() if k not in ("rope_parameters", "dtype")}
    new = {k: v for k, v in raw.items() if not k.startswith(("rope_s", "rope_t"))}
    assert "rope_parameters" in new
    assert "rope_theta" in old
    assert hf_config.from_dict(old) == hf_config.from_dict(new) == config
    assert raw["architectures"] == golden["config"]["architectures"]
    assert old["torch_dtype"] == raw["dtype"] == "bfloat16"
    # What changes the mathematics is said as PyTorch's own file says it.
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "rope_parameters",
        "tie_word_embeddings",
    ):
        if name in golden["config"]:
            assert raw[name] == golden["config"][name], name


def test_stop_tokens_and_the_chat_template_are_written(tmp_path):
    words = tiny_stories.tokenizer(tmp_path)
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = hf_config.from_dict({**hf_config.to_dict(CONFIG), "eos_token_id": [2, 7]})
    models.save(tmp_path, models.make_model(config, params(), words))
    raw = json.loads((tmp_path / "generation_config.json").read_text())
    assert raw == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    again = models.load(tmp_path)
    assert again.config == config
    chat = [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == "w1w2"
