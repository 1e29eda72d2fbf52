"""Whole checkpoints that other programs are to load: shards, settings, templates."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_stories
from checkpoints import CONFIG, params
from safetensors.numpy import load_file
from trees import same

from sbr_jax import models
from sbr_jax.models import hf_config
from sbr_jax.typing import UserError

GOLDEN = [json.loads(p.read_text()) for p in Path(__file__).parents[1].glob("golden/*")]


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


# Said by one file only, where the other's values imply it.
IMPLIED = {"attention_factor", "partial_rotary_factor", "truncate"}


def leaves(name, value):
    """Every value that is not None, with the names that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (((name, *rest), x) for rest, x in leaves(key, inner))
    elif value is not None:
        yield (name,), value


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
        ours, theirs = (
            dict(leaves(name, c.get(name))) for c in (raw, golden["config"])
        )
        assert {n: ours[n] for n in ours.keys() & theirs} == {
            n: theirs[n] for n in ours.keys() & theirs
        }
        assert {n[-1] for n in ours.keys() ^ theirs} <= IMPLIED, name


def test_stop_tokens_and_the_chat_template_are_written(tmp_path):
    words = tiny_stories.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    own = {"eos_token_id": [2, 7], "vocab_size": len(words)}
    config = hf_config.from_dict({**hf_config.to_dict(CONFIG), **own})
    models.save(tmp_path, models.make_model(config, params(config), words))
    raw = json.loads((tmp_path / "generation_config.json").read_text())
    assert raw == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    again = models.load(tmp_path)
    assert again.config == config
    chat = [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == "w1w2"
