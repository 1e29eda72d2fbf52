"""Checkpoints: bit for bit there and back, and every mismatch named."""

import collections
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, STORIES, needs_stories, params
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file
from trees import same

from sbr_jax import models
from sbr_jax.models import weights
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


def test_a_dtype_can_be_asked_for(folder):
    loaded = models.load(folder, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}


def test_a_mesh_reads_the_same_weights_in_slices(folder):
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    spread = models.load(folder, mesh=mesh).params
    same(spread, models.load(folder).params)
    weight = spread["layers"]["down_proj"]
    assert weight.addressable_shards[0].data.shape == (2, 10, 4)


def counted(monkeypatch):
    """Bytes that are read of each tensor from now on."""
    read = collections.Counter()
    real = weights.Checkpoint.slice

    def noted(self, name):
        handle = real(self, name)

        class Handle:
            def __getattr__(self, attribute):
                return getattr(handle, attribute)

            def __getitem__(self, index):
                found = handle[index]
                read[name] += found.nbytes
                return found

        return Handle()

    monkeypatch.setattr(weights.Checkpoint, "slice", noted)
    return read


def test_a_part_that_several_devices_hold_is_read_once(folder, monkeypatch):
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tp"), axis_types=(AxisType.Auto,) * 3)
    read = counted(monkeypatch)
    models.load(folder, mesh=mesh)
    tensors = load_file(folder / "model.safetensors")
    assert read == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_a_missing_tensor_is_named(folder):
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"missing model\.layers\.1\.mlp\.up_proj"):
        models.load(folder)


def test_an_extra_tensor_is_named(folder):
    edit(folder, lambda t: t.update({"model.odd": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match=r"extra model\.odd"):
        models.load(folder)


def test_a_bias_is_not_dropped_in_silence(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(folder, lambda t: t.update({name: np.zeros(16, np.float32)}))
    with pytest.raises(UserError, match=r"q_proj\.bias"):
        models.load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(folder, lambda t: t.update({name: np.zeros((16, 8), np.float32)}))
    with pytest.raises(UserError, match=r"k_proj.*\(16, 8\), expected \(8, 16\)"):
        models.load(folder)


def test_all_problems_are_told_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["odd"] = np.zeros(1, np.float32)

    edit(folder, change)
    with pytest.raises(UserError, match=r"missing model\.norm.*extra odd"):
        models.load(folder)


def test_layers_of_different_dtypes_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].astype(np.float16)}))
    with pytest.raises(UserError, match="differ in dtype"):
        models.load(folder)


def test_a_tied_head_may_be_stored_again_but_only_if_equal(folder):
    def again(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit(folder, again)
    same(models.load(folder).params, params())
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        models.load(folder)


def test_stored_rope_frequencies_are_let_pass(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({name: np.zeros(2, np.float32)}))
    same(models.load(folder).params, params())


def shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    listing = {name: file for file, part in files.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    return index, listing


def test_shards_are_read_by_their_index(folder):
    shards(folder)
    same(models.load(folder).params, params())


def test_a_missing_shard_and_a_wrong_index_are_named(folder):
    index, listing = shards(folder)
    listing["ghost"] = "a.safetensors"
    index.write_text(json.dumps({"weight_map": listing}))
    with pytest.raises(UserError, match="ghost"):
        models.load(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        models.load(folder)


def test_a_pickle_is_never_opened(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"expected model\.safetensors"):
        models.load(folder)


def test_damaged_files_are_a_users_error(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no safetensors file"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        models.load(folder)
