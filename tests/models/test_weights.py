"""Checkpoints: bit for bit there and back, and every mismatch named."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, STORIES, counting, needs_stories, params
from safetensors.numpy import load_file, save_file
from trees import same

from sbr_jax import models
from sbr_jax.training.sharding import make_mesh
from sbr_jax.typing import UserError


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    models.save(tmp_path, models.make_model(CONFIG, params()))
    return tmp_path


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_come_back_bit_for_bit(tmp_path, tied, dtype):
    config = dataclasses.replace(CONFIG, tied=tied)
    model = models.make_model(config, params(config, dtype))
    models.save(tmp_path, model)
    found = models.load(tmp_path)
    same(found.params, model.params)
    assert found.config == config
    assert found.tokenizer is None
    assert found.apply_fn is model.apply_fn


@needs_stories
def test_the_trained_checkpoint_survives_a_round_trip(tmp_path):
    model = models.load(STORIES / "hf")
    models.save(tmp_path, model)
    again = models.load(tmp_path)
    same(again.params, model.params)
    assert again.config == model.config
    text = "Once upon a time"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    one = load_file(STORIES / "hf" / "model.safetensors")
    two = load_file(tmp_path / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])


def test_a_mesh_reads_the_same_weights_in_slices(folder):
    spread = models.load(folder, mesh=make_mesh("fsdp=4,tp=2")).params
    same(spread, models.load(folder).params)
    low = models.load(folder, dtype=jnp.bfloat16).params
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    weight = spread["layers"]["down_proj"]
    assert weight.addressable_shards[0].data.shape == (2, 10, 4)


def test_a_part_that_several_devices_hold_is_read_once(folder, monkeypatch):
    read = counting(monkeypatch)
    models.load(folder, mesh=make_mesh("data=2,fsdp=2,tp=2"))
    tensors = load_file(folder / "model.safetensors")
    assert read == {name: tensor.nbytes for name, tensor in tensors.items()}


UP, KEYS = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
BIAS, NORM = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(odd=t.pop(NORM)), r"missing model\.norm.*extra odd"),
        (lambda t: t.update({BIAS: np.zeros(16, np.float32)}), r"extra .*q_proj\.bias"),
        (
            lambda t: t.update({KEYS: np.zeros((16, 8), np.float32)}),
            r"k_proj.*\(16, 8\), expected \(8, 16\)",
        ),
        (lambda t: t.update({UP: t[UP].astype(np.float16)}), "differ in dtype"),
        (lambda t: t.update({HEAD: 1 + t[EMBED]}), r"lm_head\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, said):
    edit(folder, change)
    with pytest.raises(UserError, match=said):
        models.load(folder)


def test_a_pickle_is_never_opened(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"expected model\.safetensors"):
        models.load(folder)
