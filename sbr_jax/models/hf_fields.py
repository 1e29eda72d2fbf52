"""Types and ranges of the fields of a Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
from typing import Any

from sbr_jax.models.config import FIELDS, ROPE_FIELDS
from sbr_jax.models.fields import Field


def _of(field: Field, **changes: Any) -> Field:
    return dataclasses.replace(field, **changes)


_SIZE = _of(FIELDS["head_dim"], low=1, none=True, default=None)
_THETA = _of(FIELDS["rope_theta"], default=10000.0)
_ROPE = Field(dict, none=True, default=None)
_ORIGINAL = _of(ROPE_FIELDS["original"], none=True, default=None)

EOS = _of(FIELDS["eos"], lists="or", none=True, default=None)
"""One stop token or several, here and in ``generation_config.json``."""

CONFIG: dict[str, Field] = {
    "vocab_size": FIELDS["vocab_size"],
    "hidden_size": FIELDS["width"],
    "intermediate_size": FIELDS["mlp_width"],
    "num_hidden_layers": FIELDS["layers"],
    "num_attention_heads": FIELDS["heads"],
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "rms_norm_eps": _of(FIELDS["norm_eps"], default=1e-6),
    "tie_word_embeddings": _of(FIELDS["tied"], default=False),
    "max_position_embeddings": _of(FIELDS["context"], default=2048),
    "initializer_range": _of(FIELDS["init_scale"], default=0.02),
    "bos_token_id": _of(FIELDS["bos"], default=None),
    "eos_token_id": EOS,
    "pad_token_id": _of(FIELDS["pad"], default=None),
    "rope_theta": _THETA,
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "original_max_position_embeddings": _ORIGINAL,
    "sliding_window": _of(FIELDS["window"], default=None),
    # Without this switch a window is used.
    "use_sliding_window": Field(bool, none=True, default=True),
    "max_window_layers": Field(int, 0, 10**6, default=0),
    "layer_types": Field(str, lists="only", none=True, default=None),
    "query_pre_attn_scalar": _of(FIELDS["query_scalar"], none=False, default=None),
    "attn_logit_softcapping": _of(FIELDS["attention_cap"], default=None),
    "final_logit_softcapping": _of(FIELDS["logit_cap"], default=None),
    "sliding_window_pattern": Field(int, 1, 10**6, default=6),
    "rope_local_base_freq": _of(FIELDS["local_rope_theta"], none=False, default=1e4),
    "no_rope_layers": Field(int, 0, 1, lists="only", none=True, default=None),
    "no_rope_layer_interval": Field(int, 1, 10**6, default=4),
    "embedding_multiplier": _of(FIELDS["embedding_multiplier"], default=1.0),
    "residual_multiplier": _of(FIELDS["residual_multiplier"], default=1.0),
    "attention_multiplier": _of(FIELDS["attention_multiplier"], default=None),
    "logits_scaling": _of(FIELDS["logit_divisor"], default=1.0),
}
"""Fields that every family reads; a family's own defaults override these."""

ROPE: dict[str, Field] = {
    "rope_type": Field(str, default=None),
    "type": Field(str, default=None),
    "rope_theta": _of(_THETA, default=None),
    "factor": _of(ROPE_FIELDS["factor"], default=None),
    "low_freq_factor": _of(ROPE_FIELDS["low"], default=None),
    "high_freq_factor": _of(ROPE_FIELDS["high"], default=None),
    "original_max_position_embeddings": _ORIGINAL,
    "beta_fast": _of(ROPE_FIELDS["high"], none=True, default=None),
    "beta_slow": _of(ROPE_FIELDS["low"], none=True, default=None),
    "attention_factor": _of(ROPE_FIELDS["attention"], none=True, default=None),
    "short_factor": _of(ROPE_FIELDS["short"], default=None),
    "long_factor": _of(ROPE_FIELDS["long"], default=None),
}
"""Fields of one dictionary of RoPE settings."""

ROPE_KINDS = {"full_attention": _ROPE, "sliding_attention": _ROPE}
"""Fields of a dictionary of RoPE settings by kind of layer."""
