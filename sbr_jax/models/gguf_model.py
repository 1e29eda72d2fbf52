"""Presents a GGUF file as the settings and tensors of a Hugging Face folder.

Each architecture is an entry of ``ARCHITECTURES``: a family, the settings it states,
and what its converter does to the weights. Rows of queries and keys that were laid out
for interleaved RoPE are put back in order, and Gemma's norms become distances from one
again. A setting without a meaning here is refused by name.

References:
  llama.cpp, conversion/: what each architecture writes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sbr_jax.models.config import ModelConfig, RopeScaling
from sbr_jax.models.gguf_file import GgufFile, Tensor, read_gguf
from sbr_jax.models.hf_config import from_dict
from sbr_jax.models.layers import rope_frequencies
from sbr_jax.models.weights import Checkpoint
from sbr_jax.typing import UserError

_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_EMPTY = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.finetuned": False}
"""Settings that change nothing at these values."""
_READ = ("attention.value_length", "rope.dimension_count", "rope.scaling.type")
_READ += ("rope.scaling.factor",)
"""Settings that the code below reads itself."""
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BOTH_SIDES = {**_BEHIND, "ffn_norm": "pre_feedforward_layernorm"}
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_FACTORS = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files of one ``general.architecture`` are written."""

    family: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further settings, with their names in ``config.json``."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors of a layer whose names differ from the usual ones."""
    interleaved: bool = False
    """Whether the rows of queries and keys are laid out for interleaved RoPE."""
    shift: float = 0.0
    """The number that the converter added to norms."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", shift=1.0),
    "gemma2": Architecture(
        "gemma2",
        {
            **_WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _BOTH_SIDES,
        shift=1.0,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {**_WINDOW, "rope.freq_base_swa": "rope_local_base_freq"},
        _BOTH_SIDES,
        shift=1.0,
    ),
    "phi3": Architecture(
        "phi3",
        {
            **_WINDOW,
            "rope.scaling.original_context_length": "original_max_position_embeddings",
            "rope.scaling.attn_factor": "attention_factor",
        },
        {"ffn_up": "mlp.gate_up_proj"},
    ),
    "granite": Architecture(
        "granite",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        interleaved=True,
    ),
    "olmo2": Architecture("olmo2", names=_BEHIND),
    "smollm3": Architecture("smollm3", interleaved=True),
}
"""Architectures by their name in the file."""


def open_gguf(path: pathlib.Path) -> tuple[GgufFile, ModelConfig, GgufCheckpoint]:
    """Opens a file: its settings, and its tensors under Hugging Face's names.

    Raises:
      UserError: for a damaged file, an unknown architecture, and settings that are
        missing, wrong or not supported.
    """
    file = read_gguf(path)
    kind = file.fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"unknown architecture {kind!r:.60} in {path}: known are "
            f"{', '.join(sorted(ARCHITECTURES))}; convert the file to a folder first"
        )
    known = ARCHITECTURES[kind]
    config = from_dict(_raw_config(file, kind, known), str(path))
    return file, config, GgufCheckpoint(file, known, config)


def _raw_config(file: GgufFile, kind: str, known: Architecture) -> dict[str, Any]:
    """The ``config.json`` content that corresponds to the file's settings."""
    prefix = f"{kind}."
    given = {
        name.removeprefix(prefix): value
        for name, value in file.fields.items()
        if name.startswith(prefix)
    }
    table = {**_SETTINGS, **known.settings}
    odd = sorted(
        name
        for name, value in given.items()
        if name not in table
        and name not in _READ
        and (name not in _EMPTY or value != _EMPTY[name])
    )
    if odd:
        raise UserError(
            f"unsupported settings in {file.path}: "
            f"{', '.join(f'{prefix}{n}={given[n]!r:.40}' for n in odd[:5])}; running "
            "without them would compute another model"
        )
    raw = {hf: given[name] for name, hf in table.items() if name in given}
    tokens = file.fields.get("tokenizer.ggml.tokens")
    raw.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else 0)
    raw |= {
        "model_type": known.family,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # A file without windows has no such setting, or zero.
        "sliding_window": raw.get("sliding_window") or None,
        **_token_ids(file),
    }
    _check_heads(file, raw, given)
    return raw | _rope(file, raw, given) | _query_scalar(raw, known)


def _token_ids(file: GgufFile) -> dict[str, Any]:
    fields = file.fields
    stops = [fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
    ids = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": list(dict.fromkeys(x for x in stops if x is not None)),
    }
    return {name: value for name, value in ids.items() if value is not None}


def _check_heads(file: GgufFile, raw: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses heads that RoPE rotates in part, or whose values differ in size."""
    heads, width = raw.get("num_attention_heads"), raw.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return  # The check of all fields names it, wrong or missing.
    size = raw.get("head_dim", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if given.get(name, size) != size:
            raise UserError(
                f"unsupported {name}={given[name]!r:.40} in {file.path}: expected "
                f"{size}, the size of a head"
            )


def _query_scalar(raw: Mapping[str, Any], known: Architecture) -> dict[str, Any]:
    """Divisor of Gemma 2's and 3's scores, for which the file has no setting.

    It is the size of a head, except in the largest model of each.
    """
    largest = {"gemma2": 46, "gemma3_text": 62}.get(known.family)
    if largest is None:
        return {}
    if raw.get("num_hidden_layers") == largest:
        return {
            "query_pre_attn_scalar": raw["hidden_size"] / raw["num_attention_heads"]
        }
    return {"query_pre_attn_scalar": raw.get("head_dim", 256)}


def _rope(
    file: GgufFile, raw: dict[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The scaling of RoPE, from settings or from the tensors that hold its divisors."""
    attention = raw.pop("attention_factor", None)
    kind = given.get("rope.scaling.type", "none")
    factor = given.get("rope.scaling.factor", 1.0)
    if _SHORT in file.tensors or _LONG in file.tensors:
        lists = {
            name: [float(x) for x in file.tensors[place].dense().ravel()]
            for name, place in (("short_factor", _SHORT), ("long_factor", _LONG))
            if place in file.tensors
        }
        more = {} if attention is None else {"attention_factor": attention}
        return {"rope_scaling": {"rope_type": "longrope", **lists, **more}}
    if _FACTORS in file.tensors:
        return {"rope_scaling": _llama3(file, raw)}
    if kind not in ("none", "linear"):
        raise UserError(
            f"unsupported rope.scaling.type {kind!r:.40} in {file.path}: expected "
            "'none' or 'linear'; convert the file to a folder first"
        )
    if kind == "none" or factor == 1.0:
        return {}
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _llama3(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, recognised by the file's divisor of each frequency."""
    found = file.tensors[_FACTORS].dense().ravel()
    theta = float(raw.get("rope_theta", 10000.0))
    plain = np.asarray(rope_frequencies(2 * found.size, theta))
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor)
        wanted = plain / np.asarray(rope_frequencies(2 * found.size, theta, scaling))
        if np.allclose(found, wanted, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original,
            }
    raise UserError(
        f"unsupported {_FACTORS} in {file.path}: expected the divisors of Llama 3.1 or "
        "3.2; convert the file to a folder first"
    )


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file under Hugging Face's names, decoded when read."""

    def __init__(self, file: GgufFile, known: Architecture, config: ModelConfig):
        self.main = self.config = file.path
        self.listing, self.hint = None, ""
        apart = {_FACTORS, _SHORT, _LONG}
        self._tensors = {
            _hf_name(name, known): _Slice(tensor, *_change(name, known, config))
            for name, tensor in file.tensors.items()
            if name not in apart
        }
        self.places = dict.fromkeys(self._tensors, file.path)

    def slice(self, name: str) -> _Slice:
        """A lazy handle of a tensor, for its shape and its parts."""
        return self._tensors[name]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A tensor that is decoded when one of its parts is read."""

    tensor: Tensor
    heads: int
    """Heads of interleaved rows; 0 if the rows are in order."""
    shift: float

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        values = self.tensor.dense()
        if self.heads:
            paired = values.reshape(self.heads, -1, 2, *values.shape[1:])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        return (values - np.float32(self.shift) if self.shift else values)[index]


def _change(name: str, known: Architecture, config: ModelConfig) -> tuple[int, float]:
    """The heads whose rows must be put in order, and the number to subtract."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    return (
        heads.get(part, 0) if known.interleaved else 0,
        known.shift if part.endswith("norm") else 0.0,
    )


def _hf_name(name: str, known: Architecture) -> str:
    """The name in a Hugging Face folder, or the given name if there is none."""
    table = {**_NAMES, **known.names}
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, end = found.groups()
        return f"model.layers.{layer}.{table[part]}.{end}" if part in table else name
    part, _, end = name.rpartition(".")
    return f"{_WHOLE[part]}.{end}" if part in _WHOLE else name
