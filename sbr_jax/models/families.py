"""Model families: their traits, settings and supported values.

To add a family, add an entry to ``FAMILIES``; if it computes something new, add a field
to ``ModelConfig`` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Raw = Mapping[str, Any]
"""The content of a ``config.json``."""

GELU = "gelu_pytorch_tanh"

COMMON: dict[str, tuple] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (None, False, True),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False, None),
    "position_embedding_type": (None, "rope"),
    "use_mrope": (None, False),
    "use_bidirectional_attention": (None, False),
}
"""Settings that change the mathematics, with the values that every family supports."""
_SILU = {"hidden_act": ("silu", "swish")}
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
"""Modules that hold several projections, with their outputs concatenated."""
# Early Gemma files say "gelu" but mean the tanh form; transformers reads them so too.
_TANH = {
    "hidden_act": ("gelu", GELU, None),
    "hidden_activation": (GELU, None),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Mapping from one ``model_type`` to ``ModelConfig``."""

    architecture: str
    allowed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    """Settings with the values that we support, besides the common ones."""
    free: tuple[str, ...] = ()
    """Common settings that this family reads itself, so they are not refused."""
    defaults: Raw = dataclasses.field(default_factory=dict)
    """Values that transformers assumes if the file is silent."""
    traits: Raw = dataclasses.field(default_factory=dict)
    """Fields of ``ModelConfig`` that are the same in the whole family."""
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further fields and the settings they come from."""
    slides: Callable[[int, Raw], bool] = lambda i, raw: False
    """True for a layer that slides, if the file has a window but no ``layer_types``."""
    layer_types: bool = False
    """Whether ``layer_types`` decides; otherwise it must agree with ``slides``."""
    turns: Callable[[int, Raw], bool] | None = None
    """True for a layer with RoPE if the file is silent; None: all layers have it."""
    local_rope: str | None = None
    """The setting that holds RoPE's base for sliding layers, which never stretch."""
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Modules of the file that hold several projections."""


def _last_layers(i: int, raw: Raw) -> bool:
    return bool(raw.get("use_sliding_window")) and i >= raw["max_window_layers"]


_QWEN: dict[str, Any] = {
    "allowed": _SILU,
    "free": ("sliding_window",),
    "slides": _last_layers,
    "layer_types": True,
}
_QWEN_DEFAULTS = {
    "use_sliding_window": False,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
_OLMO: dict[str, Any] = {
    "allowed": _SILU,
    "defaults": {"rms_norm_eps": 1e-5},
    "traits": {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_whole": True,
    },
}
_GEMMA_TRAITS = {
    "activation": "gelu_tanh",
    "unit_offset": True,
    "scaled_embedding": True,
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", allowed=_SILU),
    "mistral": Family(
        "MistralForCausalLM",
        allowed={**_SILU, "use_sliding_window": (None, True)},
        free=("sliding_window",),
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        slides=lambda i, raw: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        defaults=_QWEN_DEFAULTS,
        traits={"qkv_bias": True},
        **_QWEN,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        traits={"qk_norm": True},
        **_QWEN,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        allowed=_TANH,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        traits=_GEMMA_TRAITS,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        allowed={**_TANH, "use_sliding_window": (None, True)},
        free=("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        traits={**_GEMMA_TRAITS, "post_norms": True},
        numbers={
            "query_scalar": "query_pre_attn_scalar",
            "attention_cap": "attn_logit_softcapping",
            "logit_cap": "final_logit_softcapping",
        },
        slides=lambda i, raw: i % 2 == 0,
        layer_types=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        allowed={**_TANH, "use_sliding_window": (None, True)},
        free=("sliding_window",),
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
        traits={**_GEMMA_TRAITS, "post_norms": True, "qk_norm": True},
        numbers={"query_scalar": "query_pre_attn_scalar"},
        slides=lambda i, raw: (i + 1) % raw["sliding_window_pattern"] != 0,
        layer_types=True,
        local_rope="rope_local_base_freq",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        allowed=_SILU,
        free=("sliding_window",),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        slides=lambda i, raw: True,
        fused=FUSED,
    ),
    "olmo2": Family("Olmo2ForCausalLM", **_OLMO),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        **{
            **_OLMO,
            "defaults": {
                **_OLMO["defaults"],
                "sliding_window": 4096,
                "rope_theta": 500000.0,
            },
        },
        free=("sliding_window",),
        slides=lambda i, raw: (i + 1) % 4 != 0,
        layer_types=True,
        local_rope="rope_theta",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        allowed={**_SILU, "use_sliding_window": (None, False)},
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        layer_types=True,
        turns=lambda i, raw: (i + 1) % raw["no_rope_layer_interval"] != 0,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        allowed=_SILU,
        defaults={"attention_multiplier": 1.0},
        numbers={
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_multiplier": "attention_multiplier",
            "logit_divisor": "logits_scaling",
        },
    ),
}
"""Families by ``model_type``."""
