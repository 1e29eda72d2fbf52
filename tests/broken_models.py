"""Broken model folders, made out of a good tiny one by a seeded list of damages."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG, GENERATION = "config.json", "generation_config.json"
WORDS, WORDS_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAME = "model.layers.0.self_attn.q_proj.weight"
SETTINGS, ADAPTER = "adapter_config.json", "adapter_model.safetensors"

REFUSED = "refused"
SAME = "same"
"""The damage changes nothing that a model is made of."""
OTHER = "other"
"""The damage happens to define another valid model."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    damage: Callable[[Path], None]
    verdict: str | None
    file: str = ""
    """What a refusal must name."""


def refused(file, damages):
    """Cases that name a file; its own name stands before theirs."""
    for what, damage in damages.items():
        yield Case(f"{file}: {what}", damage, REFUSED, file)


# --- config.json ----------------------------------------------------------------------

_NOT_A_SIZE = [
    *([], [4], {}, "16", "", True, 0, -1, 2.5, 16.0, math.nan, math.inf, 10**30)
]
_NOT_A_NUMBER = [[], [1.0], {}, "1e-5", None, True, math.nan, math.inf, -math.inf, -1]
_NOT_A_TOKEN = ["1", [[1]], [1.5], {}, 1.5, -7, 10**12, True, math.nan, ["</s>"]]
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
WRONG = {
    **{name: [*_NOT_A_SIZE, None, 10**9] for name in SIZES},
    "num_key_value_heads": [*_NOT_A_SIZE, 10**9, 3],
    "head_dim": [*_NOT_A_SIZE, 10**9, 3],
    "max_position_embeddings": [*_NOT_A_SIZE, None],
    "rms_norm_eps": [*_NOT_A_NUMBER, 1e300],
    "rope_theta": [*_NOT_A_NUMBER, 0, 1e300],
    "initializer_range": [*_NOT_A_NUMBER, 1e300],
    "tie_word_embeddings": ["false", "", 0, 1, None, [], {}, math.nan],
    "bos_token_id": [*_NOT_A_TOKEN, [], [1]],
    "pad_token_id": [*_NOT_A_TOKEN, [], [1]],
    "eos_token_id": _NOT_A_TOKEN,
    "model_type": [[], {}, None, 7, "", "lama", True],
    "hidden_act": [[], {}, None, 7, "relu"],
    "sliding_window": [[], "4096", 4096, True, math.nan],
    "layer_types": ["full_attention", [1, 2], 7, {}, [[], []], ["full_attention"]],
    "quantization_config": [{}, {"quant_method": "bitsandbytes"}, [], "nf4"],
    "rope_scaling": [
        *([], "linear", 7, False, {"rope_type": []}, {"rope_type": "linear"}),
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    "rope_parameters": [
        *([], "default", 7, "", {"rope_type": {}}),
        *({"rope_type": "default", "rope_theta": x} for x in _NOT_A_NUMBER),
        *({"rope_type": "linear", "factor": x} for x in (*_NOT_A_NUMBER, 0.5, 1e300)),
        *(
            {**LLAMA3, key: value}
            for key in ("low_freq_factor", "original_max_position_embeddings")
            for value in ([], "1", 0, -1, math.nan, math.inf)
        ),
    ],
}
"""Values that no field of a tiny llama's config.json may have."""


def edited(name, **changes):
    """Sets fields of a JSON file; ``...`` takes one out."""

    def damage(folder):
        raw = {**json.loads((folder / name).read_text()), **changes}
        raw = {key: value for key, value in raw.items() if value is not ...}
        (folder / name).write_text(json.dumps(raw))

    return damage


def wrong_fields():
    pairs = [(name, value) for name, values in WRONG.items() for value in values]
    pairs += [(name, ...) for name in (*SIZES, "model_type")]
    for name, value in pairs:
        damage = edited(CONFIG, **{name: value})
        yield Case(f"{name}={value!r:.40}", damage, REFUSED, CONFIG)


def valid_fields():
    """Changes of config.json that are no damage."""
    for changes, verdict in (
        ({"a_field_of_tomorrow": [[1]]}, SAME),
        ({"architectures": ...}, SAME),
        ({"head_dim": None}, SAME),
        ({"eos_token_id": []}, SAME),
        ({"pad_token_id": 78}, OTHER),
        ({"rope_theta": 5e5, "rope_parameters": ...}, OTHER),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, OTHER),
        ({"rms_norm_eps": 1e-3}, OTHER),
        ({"max_position_embeddings": 512}, OTHER),
    ):
        yield Case(f"{changes}", edited(CONFIG, **changes), verdict)


# --- whole files ----------------------------------------------------------------------

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remade(name, change):
    return lambda folder: (folder / name).write_bytes(
        change((folder / name).read_bytes())
    )


def as_folder(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def as_loop(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def no_json(name):
    """What every file of JSON may turn into."""
    return {
        "empty": written(name, b""),
        "not UTF-8": written(name, b'{"model_type": "\xff\xfe"}'),
        "deep": written(name, DEEP),
        "list": written(name, b"[]"),
        "folder": as_folder(name),
        "loop": as_loop(name),
    }


def files():
    for name in (CONFIG, WORDS, WORDS_CONFIG):
        yield from refused(name, no_json(name))
        yield from refused(
            name,
            {
                "cut": remade(name, lambda b: b[: len(b) // 2]),
                # transformers reads these files too, and knows no byte-order mark.
                "BOM": remade(name, lambda b: b"\xef\xbb\xbf" + b),
            },
        )
    yield from refused(GENERATION, no_json(GENERATION))
    for name, ids in (
        (GENERATION, {"eos_token_id": 1.5}),
        (GENERATION, {"eos_token_id": ["</s>"]}),
        (GENERATION, {"eos_token_id": 78}),
        (GENERATION, {"eos_token_id": [2, 9999]}),
        (CONFIG, {"eos_token_id": [2, 78]}),
        (CONFIG, {"bos_token_id": 10**6}),
    ):
        yield from refused(name, {f"{ids}": edited(name, **ids)})
    yield Case("generation gone", gone(GENERATION), SAME)
    yield Case("generation odd", edited(GENERATION, temperature=[["hot"]]), SAME)
    yield Case("config gone", gone(CONFIG), REFUSED, CONFIG)
    yield Case("tokenizer gone", gone(WORDS), REFUSED, "tokenizer")


# --- tokenizer ------------------------------------------------------------------------


def tokenizer_part(change):
    def damage(folder):
        raw = json.loads((folder / WORDS).read_text())
        change(raw)
        (folder / WORDS).write_text(json.dumps(raw))

    return damage


def word_ids(**ids):
    return lambda raw: raw["model"]["vocab"].update(ids)


def added_token(name, *, special=True):
    """A token that is moved behind the last one of the model, or put there."""

    def change(raw):
        vocab = raw["model"]["vocab"]
        if name in vocab:
            vocab["another"] = vocab.pop(name)
        kept = [token for token in raw["added_tokens"] if token["content"] != name]
        token = {**kept[0], "id": 78, "content": name, "special": special}
        raw["added_tokens"] = [*kept, token]

    return change


def _padded_beyond(folder):
    tokenizer_part(added_token("<pad>"))(folder)
    edited(WORDS_CONFIG, pad_token="<pad>")(folder)


def tokenizers():
    changes = {
        "of tomorrow": lambda raw: raw["model"].update(type="Quantum"),
        "no model": lambda raw: raw.pop("model"),
        "pre-tokenizer": lambda raw: raw.update(pre_tokenizer={"type": "Hologram"}),
        "vocab list": lambda raw: raw["model"].update(vocab=[1, 2]),
        "vocab fraction": lambda raw: raw["model"].update(vocab={"a": 0.5}),
        "added odd": lambda raw: raw.update(added_tokens=[{"id": "x"}]),
        "version": lambda raw: raw.update(version=[]),
        "no words": lambda raw: raw["model"]["vocab"].clear(),
        "another unknown word": lambda raw: raw["model"].update(unk_token="<none>"),
        "the first id beyond the model's": word_ids(w1=78),
        "two words of one id": word_ids(w1=30, w2=30),
        "a word of a control token's id": word_ids(w1=2),
        "an added word beyond": added_token("plus", special=False),
        "an added token beyond that the template writes": added_token("<assistant>"),
        "a stop token beyond": added_token("</s>"),
    }
    yield from refused(WORDS, {k: tokenizer_part(v) for k, v in changes.items()})
    # Many chat models have one more token for padding, which is masked.
    yield Case("padding beyond", _padded_beyond, OTHER)
    for changes in (
        {"tokenizer_class": []},
        {"bos_token": ["<s>"]},
        {"bos_token": {"content": 7}},
        {"eos_token": {}},
        {"model_max_length": "long"},
        {"added_tokens_decoder": {"x": "y"}},
        {"extra_special_tokens": 7},
        {"clean_up_tokenization_spaces": []},
        {"padding_side": "up"},
    ):
        damage = edited(WORDS_CONFIG, **changes)
        yield from refused(WORDS_CONFIG, {f"{changes}": damage})
    for changes in ({"chat_template": 7}, {"additional_special_tokens": 7}):
        # The template's own file wins; transformers does not read the other.
        yield Case(f"{changes}", edited(WORDS_CONFIG, **changes), SAME)
    for template in (7, {"default": 7}, [{"name": "a"}]):

        def damage(folder, template=template):
            edited(WORDS_CONFIG, chat_template=template)(folder)
            (folder / TEMPLATE).unlink()

        yield from refused(WORDS_CONFIG, {f"only chat_template={template}": damage})
    damages = {"not UTF-8": written(TEMPLATE, b"\xff\xfe{{")}
    yield from refused(TEMPLATE, {**damages, "folder": as_folder(TEMPLATE)})


# --- weights --------------------------------------------------------------------------


def tensors(change, name=SINGLE):
    def damage(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)

    return damage


def value(number, place=NAME):
    """Puts one number into a tensor."""

    def change(found):
        found[place] = found[place].copy()
        found[place].flat[3] = number

    return change


def cast(dtype):
    return lambda t: t.update({k: v.astype(dtype) for k, v in t.items()})


def headed(change):
    """Rewrites the header of a safetensors file, the data left as they are."""

    def damage(folder):
        whole = (folder / SINGLE).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        raw = json.loads(whole[8 : 8 + size])
        text = change(raw)
        text = json.dumps(raw).encode() if text is None else text
        start = len(text).to_bytes(8, "little")
        (folder / SINGLE).write_bytes(start + text + whole[8 + size :])

    return damage


def weights(rng):
    changes = {
        "infinite": value(-math.inf, EMBED),
        "integers": cast(np.int8),
        "one integer": lambda t: t.update({NAME: t[NAME].astype(np.int32)}),
        "one of zeros and ones": lambda t: t.update({NAME: t[NAME] > 0}),
        "mixed": lambda t: t.update({NAME: t[NAME].astype(np.float16)}),
        "extra": lambda t: t.update({f"{NAME}.absmax": np.zeros(3, np.float32)}),
        "nf4": lambda t: t.update({NAME: np.zeros((128, 1), np.uint8)}),
        "scalar": lambda t: t.update({NAME: np.zeros((), np.float32)}),
        "nothing": dict.clear,
        "another head": lambda t: t.update({HEAD: t[EMBED] + 1}),
        "an integer head": lambda t: t.update({HEAD: t[EMBED].astype(np.int32)}),
    }
    yield from refused(SINGLE, {k: tensors(v) for k, v in changes.items()})
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, "f4")}
    yield Case("frequencies", tensors(lambda t: t.update(frequencies)), SAME)
    yield Case("head again", tensors(lambda t: t.update({HEAD: t[EMBED].copy()})), SAME)
    yield from refused(
        SINGLE,
        {
            "empty": written(SINGLE, b""),
            "text": written(SINGLE, b"version https://git-lfs.github.com/spec/v1\n"),
            "folder": as_folder(SINGLE),
            "loop": as_loop(SINGLE),
            "gone": gone(SINGLE),
            "long header": remade(SINGLE, lambda b: b"\xff" * 8 + b[8:]),
            "header of 80 MB": remade(
                SINGLE, lambda b: (8 * 10**7).to_bytes(8, "little")
            ),
            "header deep": headed(lambda raw: DEEP),
            "header list": headed(lambda raw: b"[]"),
            "header not UTF-8": headed(lambda raw: b'{"\xff": 1}'),
            "dtype I32": headed(lambda raw: raw[NAME].update(dtype="I32")),
            "dtype unknown": headed(lambda raw: raw[NAME].update(dtype="NF4")),
            "dtype F8": headed(lambda raw: raw[NAME].update(dtype="F8_E4M3")),
            "shape": headed(lambda raw: raw[NAME].update(shape=[4, 64])),
            "shape negative": headed(lambda raw: raw[NAME].update(shape=[-16, -16])),
            "shape huge": headed(lambda raw: raw[NAME].update(shape=[2**40, 2**40])),
            "offsets": headed(lambda raw: raw[NAME].update(data_offsets=[0, 10**12])),
            "offsets overlap": headed(
                lambda raw: raw[NAME].update(data_offsets=raw[EMBED]["data_offsets"])
            ),
        },
    )
    for share in rng.uniform(0, 1, 4):
        damage = remade(SINGLE, lambda b, share=share: b[: int(share * len(b))])
        yield from refused(SINGLE, {f"cut at {share:.3f}": damage})
    for place, bit in zip(rng.integers(0, 1500, 6), rng.integers(0, 8, 6), strict=True):

        def flip(b, place=int(place), bit=int(bit)):
            return b[:place] + bytes([b[place] ^ (1 << bit)]) + b[place + 1 :]

        yield Case(f"bit {bit} of byte {place}", remade(SINGLE, flip), None)


# --- shards ---------------------------------------------------------------------------


def sharded(folder):
    """Spreads the weights over two files and an index."""
    found = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    listing = {}
    for part, file in enumerate(("a.safetensors", "b.safetensors")):
        names = sorted(found)[part::2]
        save_file({name: found[name] for name in names}, folder / file)
        listing |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listing}))


def indexed(change, *, keep=False):
    """Shards, and a change of what their index says."""

    def damage(folder):
        whole = (folder / SINGLE).read_bytes()
        sharded(folder)
        raw = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(raw["weight_map"]) or raw))
        if keep:
            (folder / SINGLE).write_bytes(whole)

    return damage


def _stale(folder):
    """Shards of an older model beside the single file."""
    whole = (folder / SINGLE).read_bytes()
    tensors(lambda t: t.update({k: v + 1 for k, v in t.items()}))(folder)
    sharded(folder)
    (folder / SINGLE).write_bytes(whole)


def _twice(folder):
    sharded(folder)
    one, two = (load_file(folder / f"{x}.safetensors") for x in "ab")
    name = sorted(two)[0]
    save_file({**one, name: two[name] + 1}, folder / "a.safetensors")


ROTARY = {"model.layers.0.self_attn.rotary_emb.inv_freq": "a.safetensors"}


def shards():
    for what, damage in {
        "shards": sharded,
        "a tied head": indexed(lambda m: m.update({HEAD: "b.safetensors"})),
        "rotary frequencies": indexed(lambda m: m.update(ROTARY)),
        "shards of before": _stale,
        "index of before": indexed(lambda m: {"weight_map": {}}, keep=True),
        "index without its shards": written(INDEX, b"{}"),
    }.items():
        yield Case(what, damage, SAME)
    yield Case("a tensor in two shards", _twice, REFUSED, "a.safetensors")
    changes = {
        "integers": lambda m: {"weight_map": dict.fromkeys(m, 7)},
        "lists": lambda m: {"weight_map": {name: [file] for name, file in m.items()}},
        "list": lambda m: {"weight_map": list(m)},
        "empty": lambda m: {"weight_map": {}},
        "no map": lambda m: {"metadata": {}},
        "a ghost": lambda m: m.update(ghost="a.safetensors"),
        "a missing shard": lambda m: m.update({NAME: "c.safetensors"}),
        "the other shard": lambda m: m.update(
            {NAME: "a.safetensors", EMBED: "b.safetensors"}
        ),
        "a row left out": lambda m: m.pop(NAME) and None,
        "outside": lambda m: m.update({NAME: "../model/b.safetensors"}),
        "absolute": lambda m: m.update({NAME: "/etc/passwd"}),
        "empty name": lambda m: m.update({NAME: ""}),
        "long name": lambda m: m.update({NAME: "b" * 5000 + ".safetensors"}),
        "zero byte": lambda m: m.update({NAME: "b\0.safetensors"}),
        "no safetensors": lambda m: m.update({NAME: "config.json"}),
        "a pickle": lambda m: m.update({NAME: "pytorch_model.bin"}),
    }
    yield from refused(INDEX, {k: indexed(v) for k, v in changes.items()})
    for what in ("empty", "deep", "not UTF-8", "list"):

        def damage(folder, what=what):
            sharded(folder)
            no_json(INDEX)[what](folder)

        yield from refused(INDEX, {f"{what} file": damage})


# --- adapters -------------------------------------------------------------------------


def adapters():
    """Of a folder in PEFT's layout."""
    yield from refused(SETTINGS, {**no_json(SETTINGS), "gone": gone(SETTINGS)})
    for name, values in {
        "r": [*_NOT_A_SIZE, None],
        "lora_alpha": [*_NOT_A_NUMBER[:-1], 1e300],
        "use_rslora": ["false", 1, [], {}],
        "target_modules": [7, {}, [7], [["q_proj"]], True],
        "peft_type": [[], None, 7, "IA3"],
        "bias": [[], 7, "all"],
        "fan_in_fan_out": ["no", 1],
    }.items():
        for wrong in values:
            damage = edited(SETTINGS, **{name: wrong})
            yield Case(f"{name}={wrong!r:.20}", damage, REFUSED, f"{name}=")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes = {
        "nan": value(math.nan, name),
        "integers": cast(np.int8),
        "no tensors": dict.clear,
        "missing": lambda t: t.pop(name),
        "scalar": lambda t: t.update({name: np.zeros((), np.float32)}),
        "shape": lambda t: t.update({name: t[name].T.copy()}),
    }
    yield from refused(ADAPTER, {k: tensors(v, ADAPTER) for k, v in changes.items()})
    yield from refused(
        ADAPTER,
        {
            "empty": written(ADAPTER, b""),
            "folder": as_folder(ADAPTER),
            "loop": as_loop(ADAPTER),
            "gone": gone(ADAPTER),
            "cut": remade(ADAPTER, lambda b: b[:-9]),
            "header deep": written(ADAPTER, len(DEEP).to_bytes(8, "little") + DEEP),
        },
    )
    yield Case("dropout", edited(SETTINGS, lora_dropout=0.5), SAME)
    yield Case("alpha", edited(SETTINGS, lora_alpha=8), OTHER)
