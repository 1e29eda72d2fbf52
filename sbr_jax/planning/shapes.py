"""Shapes of well-known models, and of any `config.json`.

Only the settings that decide sizes are given: a plan reads no weights or tokenizer.
"""

from pathlib import Path
from typing import Any

from sbr_jax import errors
from sbr_jax.files import read_object
from sbr_jax.models import hf_config
from sbr_jax.models.config import ModelConfig


def _shape(
    kind: str,
    layers: int,
    width: int,
    mlp: int,
    heads: tuple[int, int],
    vocabulary: int,
    context: int,
    **more: Any,
) -> dict[str, Any]:
    """A configuration; the heads are those of queries and of keys."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES = {
    "llama2-7b": _shape("llama", 32, 4096, 11008, (32, 32), 32000, 4096),
    "llama2-13b": _shape("llama", 40, 5120, 13824, (40, 40), 32000, 4096),
    "llama2-70b": _shape("llama", 80, 8192, 28672, (64, 8), 32000, 4096),
    "llama3-8b": _shape("llama", 32, 4096, 14336, (32, 8), 128256, 8192),
    "llama3-70b": _shape("llama", 80, 8192, 28672, (64, 8), 128256, 8192),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, (32, 8), 32768, 32768),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, (28, 4), 152064, 32768),
    "qwen2.5-32b": _shape("qwen2", 64, 5120, 27648, (40, 8), 152064, 32768),
    "gemma2-9b": _shape(
        "gemma2",
        42,
        3584,
        14336,
        (16, 8),
        256000,
        8192,
        head_dim=256,
        tie_word_embeddings=True,
    ),
}
"""Configurations by name, as in the models' own files."""


def read_shape(model: str) -> ModelConfig:
    """The settings of a model, by name or from a file or folder.

    Args:
        model: a key of `SHAPES`, a `config.json`, or a folder that holds one.

    >>> read_shape("llama3-8b").kv_heads
    8
    """
    if model in SHAPES:
        return hf_config.from_dict(SHAPES[model], model)
    path = Path(model)
    if path.is_dir():
        return hf_config.read(path)
    if path.is_file():
        return hf_config.from_dict(read_object(path), str(path))
    raise errors.unknown("model", model, [*SHAPES, "a config.json"])
