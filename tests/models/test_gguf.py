"""GGUF files: the same model as the folder's, or one line that says what is wrong."""

import dataclasses
import json
import math
import struct

import gguf_case as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SHARED, STORIES, needs_stories
from families_case import FILE, loaded, write
from gguf_case import ARRAY, BOOL, F32, HALF, I32, Q8, STRING, U32
from safetensors.numpy import load_file

from sbr_jax import models
from sbr_jax.models import gguf_tokenizer
from sbr_jax.models.config import RopeScaling
from sbr_jax.models.gguf_file import read_gguf
from sbr_jax.models.layers import rope_frequencies
from sbr_jax.training.sharding import make_mesh
from sbr_jax.typing import UserError

pytest.importorskip("gguf")

LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
CASES = {
    "llama2": {},
    "llama3-tied": {"rope_parameters": {"rope_theta": 500.0}},
    "llama-linear": {},
    "mistral-full": {"model_type": "llama"},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    # llama.cpp has the pattern and the base of sliding layers as constants.
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "layer_types": None,
        "sliding_window_pattern": 6,
        "rope_parameters": {"full_attention": LINEAR},
    },
    "phi3": {},
    "phi3-window": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": None},
    "granite": {},
}
"""Tiny models, with what a GGUF file cannot tell set to what it then means."""


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_same_model_as_the_folder(name, tmp_path):
    fields, tensors = made.parts(name, CASES[name])
    path = made.written(tmp_path / "model.gguf", fields, tensors)
    found = models.load(path)
    (tmp_path / "folder").mkdir()
    wanted = models.load(write(tmp_path / "folder", name, **CASES[name]))
    # Of the settings, a file carries none that only training reads, and stop tokens
    # come with its vocabulary.
    silent = {"init_scale": found.config.init_scale, "bos": found.config.bos}
    assert found.config == dataclasses.replace(wanted.config, **silent)
    shift = name.startswith("gemma")
    for (place, a), b in zip(
        jax.tree.leaves_with_path(found.params),
        jax.tree.leaves(wanted.params),
        strict=True,
    ):
        # Norms lost bits when the converter added one: half a unit at 1.3.
        atol = 2.0**-24 * 1.01 if shift and "norm" in str(place) else 0
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(place))


def test_it_is_read_in_halves_in_codes_and_over_devices(tmp_path):
    path = made.written(tmp_path / "model.gguf", *made.parts("llama2"))
    dense = loaded("llama2").params
    half = models.load(path, dtype=jnp.bfloat16).params
    jax.tree.map(lambda a, b: same(a, b.astype(jnp.bfloat16)), half, dense)
    codes = models.load(path, quantize="nf4").params
    jax.tree.map(same, codes, models.quantize(dense, "nf4"))
    jax.tree.map(same, models.load(path, mesh=make_mesh("fsdp=4,tp=2")).params, dense)


def same(one, two):
    np.testing.assert_array_equal(one, two)


def test_blocks_are_scale_times_code(tmp_path):
    fields, tensors = made.parts("llama2")
    wanted = {}
    for name, (_, shape, data) in tensors.items():
        values = np.frombuffer(data, np.float32).reshape(shape)
        if name.endswith("ffn_up.weight"):
            raw, wanted[name] = made.blocks(values)
            tensors[name] = Q8, shape, raw
        elif name.endswith("ffn_gate.weight"):
            wanted[name] = values.astype(np.float16).astype(np.float32)
            tensors[name] = HALF, shape, values.astype(np.float16).tobytes()
    found = models.load(made.written(tmp_path / "model.gguf", fields, tensors)).params
    for part in ("up", "gate"):
        for i, values in enumerate(found["layers"][f"{part}_proj"]):
            same(values.T, wanted[f"blk.{i}.ffn_{part}.weight"])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama_3_are_its_scaling(factor, tmp_path):
    scaling = RopeScaling("llama3", factor)
    fields, tensors = made.parts("llama2")
    fields["llama.rope.freq_base"] = F32, 500000.0
    plain, stretched = (rope_frequencies(8, 5e5, x) for x in (None, scaling))
    tensors["rope_freqs.weight"] = made.dense(plain / stretched)
    path = made.written(tmp_path / "model.gguf", fields, tensors)
    assert models.load(path).config.rope_scaling == scaling
    tensors["rope_freqs.weight"] = made.dense(np.arange(1, 5))
    with pytest.raises(UserError, match=r"rope_freqs\.weight in .*gguf"):
        models.load(made.written(path, fields, tensors))


# --- broken files: one line that names the file ---------------------------------------


def setting(name, *value):
    def change(fields, tensors):
        fields[name] = value
        if not value:
            del fields[name]

    return change


def tensor(name, change):
    def damage(fields, tensors):
        tensors[name] = change(*tensors[name])

    return damage


def numbers(value):
    def change(kind, shape, data):
        return kind, shape, struct.pack("<f", value) + data[4:]

    return change


def twice(fields, tensors):
    tensors["blk.0.attn_q.bias"] = made.dense(np.zeros(32))


UP = "blk.0.ffn_up.weight"
GGML = "tokenizer.ggml."
CHANGES = {
    "unknown architecture": (setting("general.architecture", STRING, "rwkv"), "rwkv"),
    "no architecture": (setting("general.architecture"), "architecture"),
    "architecture a number": (setting("general.architecture", U32, 7), "architect"),
    "a setting missing": (setting("llama.block_count"), "num_hidden_layers"),
    "a setting of a type": (setting("llama.block_count", STRING, "4"), "num_hidden"),
    "too many layers": (setting("llama.block_count", U32, 2**31), "num_hidden"),
    "one layer more": (
        setting("llama.block_count", U32, 5),
        r"missing model\.layers\.4",
    ),
    "one layer less": (setting("llama.block_count", U32, 3), r"extra model\.layers\.3"),
    "experts": (setting("llama.expert_count", U32, 8), "expert_count=8"),
    "unknown setting": (setting("llama.attention.alibi", F32, 8.0), "attention.alibi"),
    "partial rotary": (
        setting("llama.rope.dimension_count", U32, 4),
        "dimension_count",
    ),
    "yarn": (setting("llama.rope.scaling.type", STRING, "yarn"), "'yarn'"),
    "alignment 0": (setting("general.alignment", U32, 0), "alignment"),
    "alignment 24": (setting("general.alignment", U32, 24), "alignment"),
    "alignment a text": (setting("general.alignment", STRING, "32"), "alignment"),
    "tensor missing": (lambda f, t: t.pop(UP), r"missing model\.layers\.0\.mlp\.up"),
    "tensor extra": (twice, r"extra model\.layers\.0\.self_attn\.q_proj\.bias"),
    "tensor of no layer": (lambda f, t: t.update(x=made.dense([1.0])), "extra x"),
    "shape": (tensor(UP, lambda k, s, d: (k, s[::-1], d)), r"expected \(48, 32\)"),
    "no dimension": (tensor(UP, lambda k, s, d: (k, (), d)), "dimensions"),
    "five dimensions": (tensor(UP, lambda k, s, d: (k, (1, 1, 1, *s), d)), "dimens"),
    "an empty one": (tensor(UP, lambda k, s, d: (k, (0, 32), b"")), "whole blocks"),
    "half a block": (tensor(UP, lambda k, s, d: (Q8, (48, 31), d)), "whole blocks"),
    "beyond": (tensor(UP, lambda k, s, d: (k, (2**40, 2**40), d)), "beyond"),
    "unknown type": (tensor(UP, lambda k, s, d: (999, s, d)), "type 999"),
    "whole numbers": (tensor(UP, lambda k, s, d: (26, s, d)), "type 26"),
    "NaN": (tensor(UP, numbers(math.nan)), "not finite"),
    "infinite": (tensor("output_norm.weight", numbers(math.inf)), "not finite"),
    "unknown vocabulary": (setting(f"{GGML}model", STRING, "t5"), "'t5'"),
    "no tokens": (setting(f"{GGML}tokens"), "vocab_size=0"),
    "tokens numbers": (setting(f"{GGML}tokens", ARRAY, (U32, [1] * 64)), "tokens"),
    "kinds short": (setting(f"{GGML}token_type", ARRAY, (I32, [1])), "64 entries"),
    "no scores": (setting(f"{GGML}scores"), "scores"),
    "start beyond": (setting(f"{GGML}bos_token_id", U32, 64), "bos_token_id=64"),
    "padding beyond": (setting(f"{GGML}padding_token_id", U32, 99), "padding_token"),
    "unknown beyond": (setting(f"{GGML}unknown_token_id", U32, 99), "unknown_token"),
    "stop a text": (setting(f"{GGML}eos_token_id", STRING, "2"), "eos_token_id"),
    "template a number": (setting("tokenizer.chat_template", U32, 7), "chat_template"),
    "merge of one": (setting(f"{GGML}merges", ARRAY, (STRING, ["ab"])), "two parts"),
    "merge of none": (setting(f"{GGML}merges", ARRAY, (STRING, ["a q"])), "tokenizer"),
    "a word twice": (setting(f"{GGML}tokens", ARRAY, (STRING, ["a"] * 64)), "twice"),
    "not UTF-8": (setting("general.name", STRING, b"\xff\xfe"), "UTF-8"),
    "lists in lists": (
        setting("general.x", ARRAY, (ARRAY, [(U32, [1])])),
        "type 9 in a list",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_wrong_file_is_refused_in_one_line(change, said, tmp_path):
    fields, tensors = made.parts("llama2")
    change(fields, tensors)
    refused(made.written(tmp_path / "model.gguf", fields, tensors), said)


def refused(path, said):
    with pytest.raises(UserError, match=said) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def huge(kind, inner=b""):
    """A file of one setting that tells of 2^60 things."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + made.text("general.name")
    return start + struct.pack("<I", kind) + inner + struct.pack("<Q", 2**60)


BYTES = {
    "nothing": (b"", "gguf"),
    "four bytes": (b"GGUF", "whole"),
    "another format": (b"PK\x03\x04" + bytes(40), "GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 2 or 3, got 1"),
    "version of the other end": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
    "2^60 settings": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "settings"),
    "a text of 2^60": (huge(STRING), "whole"),
    "2^60 texts": (huge(ARRAY, struct.pack("<I", STRING)), "whole"),
    "2^60 numbers": (huge(ARRAY, struct.pack("<I", BOOL)), "whole"),
    "an unknown type": (huge(77), "type 77"),
    "a name of 2^60": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60) + bytes(20),
        "name",
    ),
}


@pytest.mark.parametrize(("content", "said"), BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_file_are_refused_at_once(content, said, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, said)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = made.written(tmp_path / "model.gguf", *made.parts("llama2"))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in (*rng.integers(4, len(whole) - 32, 20).tolist(), len(whole) - 32):
        path.write_bytes(whole[:size])
        refused(path, "whole")


def test_a_name_twice_is_refused(tmp_path):
    fields, tensors = made.parts("llama2")
    path = made.written(tmp_path / "model.gguf", fields, tensors)
    first, second = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
    path.write_bytes(path.read_bytes().replace(second, first))
    refused(path, "twice")


def test_a_path_that_is_no_file_is_refused(tmp_path):
    refused(tmp_path / "none.gguf", "cannot read")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "cannot read")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    path = made.written(tmp_path / "model.gguf", *made.parts("llama2"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'sbr_jax\[gguf\]'"):
        models.load(path)


# --- the tokenizer --------------------------------------------------------------------


def test_special_tokens_and_the_template_come_along(tmp_path):
    fields, tensors = made.parts("llama2")
    fields["tokenizer.chat_template"] = STRING, "{{ messages[0]['content'] }}<|user|>"
    fields[f"{GGML}eos_token_id"] = U32, 2
    fields[f"{GGML}eot_token_id"] = U32, 8
    model = models.load(made.written(tmp_path / "model.gguf", fields, tensors))
    words = model.tokenizer
    assert (words.bos_token, words.eos_token, words.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert (model.config.bos, model.config.eos, model.config.pad) == (1, (2, 8), 0)
    chat = words.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "a<|user|>"
    # With a start token, as SentencePiece files have it where they are silent.
    assert words.encode("ab<|user|>") == [1, 6, 5, 8]
    assert words.encode("A", add_special_tokens=False) == [3, 9]
    assert words.decode([3, 7, 9]) == "abA"
    fields[f"{GGML}add_bos_token"] = BOOL, False
    fields[f"{GGML}add_space_prefix"] = BOOL, False
    model = models.load(made.written(tmp_path / "model.gguf", fields, tensors))
    assert model.tokenizer.encode("ab") == [7]
    fields[f"{GGML}model"] = STRING, "none"
    model = models.load(made.written(tmp_path / "model.gguf", fields, tensors))
    assert model.tokenizer is None


CUTS = {
    "gpt-2": ["It", "'s", "Ġ2024", "!!", "ĠA"],
    "olmo": ["It", "'s", "Ġ2024", "!!", "ĠA"],
    "smollm": ["It", "'s", "Ġ", "2", "0", "2", "4", "!!", "ĠA"],
    "refact": ["It", "'s", "Ġ", "2", "0", "2", "4", "!!", "ĠA"],
    "qwen2": ["It", "'s", "Ġ", "2", "0", "2", "4", "!!", "ĠA"],
    "llama-bpe": ["It", "'s", "Ġ", "202", "4", "!!", "ĠA"],
    "dbrx": ["It", "'s", "Ġ", "202", "4", "!!", "ĠA"],
}
"""How each rule cuts ``It's 2024!! A``, by hand."""


def byte_level(fields, tokens, merges, rule):
    fields |= {
        f"{GGML}model": (STRING, "gpt2"),
        f"{GGML}pre": (STRING, rule),
        f"{GGML}tokens": (ARRAY, (STRING, tokens)),
        f"{GGML}token_type": (ARRAY, (I32, [1] * len(tokens))),
        f"{GGML}merges": (ARRAY, (STRING, merges)),
    }


@pytest.mark.parametrize("rule", CUTS)
def test_a_rule_cuts_as_its_name_says(rule, tmp_path):
    fields, tensors = made.parts("llama2")
    byte_level(fields, [chr(33 + i) for i in range(64)], [], rule)
    words = models.load(made.written(tmp_path / "m.gguf", fields, tensors)).tokenizer
    cut = words.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 2024!! A")
    assert [piece for piece, _ in cut] == CUTS[rule]


def test_another_rule_is_refused(tmp_path):
    fields, tensors = made.parts("llama2")
    byte_level(fields, [chr(33 + i) for i in range(64)], [], "tekken")
    refused(made.written(tmp_path / "m.gguf", fields, tensors), "'tekken'.*known are")


GPT2 = SHARED / "checkpoints" / "gpt2_tokenizer" / "tokenizer.json"
TEXT = "Once upon a time, there were 12 naïve cats…\n\n\t They'd 3.14 🙂 of them!  "


@pytest.mark.skipif(not GPT2.is_file(), reason="GPT-2's tokenizer is not here")
def test_gpt_2s_tokenizer_comes_through(tmp_path):
    from tokenizers import Tokenizer

    raw = json.loads(GPT2.read_text())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    merges = [x if isinstance(x, str) else " ".join(x) for x in raw["merges"]]
    fields = {}
    byte_level(fields, tokens, merges, "gpt-2")
    config = dataclasses.replace(loaded("llama2").config, vocab_size=len(tokens))
    file = read_gguf(made.written(tmp_path / "m.gguf", fields, {}))
    found = gguf_tokenizer.read_tokenizer(file, config)
    wanted = Tokenizer.from_file(str(GPT2)).encode(TEXT, add_special_tokens=False).ids
    assert found.encode(TEXT) == wanted
    assert found.decode(wanted) == TEXT


@needs_stories
def test_a_trained_model_and_its_sentencepiece_vocabulary_come_through(tmp_path):
    folder = STORIES / "hf"
    wanted = models.load(folder)
    raw = json.loads((folder / "config.json").read_text())
    words = wanted.tokenizer.get_vocab()
    tokens = sorted(words, key=words.get)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    ranks = {"".join(pair): -float(i) for i, pair in reversed(list(enumerate(merges)))}
    ends = {"<unk>": 2, "<s>": 3, "</s>": 3}
    kinds = [6 if t.startswith("<0x") else ends.get(t, 1) for t in tokens]
    fields, tensors = {"general.architecture": (STRING, "llama")}, {}
    for key, (name, what) in made.SETTINGS.items():
        if raw.get(key) is not None:
            fields[f"llama.{name}"] = what, raw[key]
    fields |= {
        f"{GGML}model": (STRING, "llama"),
        f"{GGML}tokens": (ARRAY, (STRING, tokens)),
        f"{GGML}token_type": (ARRAY, (I32, kinds)),
        f"{GGML}scores": (ARRAY, (F32, [ranks.get(t, -1e6) for t in tokens])),
        f"{GGML}bos_token_id": (U32, 1),
        f"{GGML}eos_token_id": (U32, 2),
    }
    models.save(tmp_path / "folder", wanted)
    for place, values in load_file(tmp_path / "folder" / FILE).items():
        short, heads = made.ggml_name(place, "llama"), 0
        if "attn_q." in short or "attn_k." in short:
            key = "num_attention_heads" if "attn_q" in short else "num_key_value_heads"
            heads = raw[key]
        if heads:
            paired = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = paired.reshape(values.shape)
        tensors[short] = made.dense(values)
    found = models.load(made.written(tmp_path / "m.gguf", fields, tensors))
    jax.tree.map(same, found.params, wanted.params)
    text = "Once upon a time, Lily's dog ran 12 times."
    assert found.tokenizer.encode(text) == wanted.tokenizer.encode(text)
    ids = found.tokenizer.encode(text)
    assert found.tokenizer.decode(ids) == wanted.tokenizer.decode(ids)
