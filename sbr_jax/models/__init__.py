"""Language models: loading, adapters, generation. Nobody outside sees Flax."""

from sbr_jax.models.codes import QuantisedWeight, as_dense, is_quantised
from sbr_jax.models.config import TARGETS, Hardware, ModelConfig
from sbr_jax.models.generate import generate
from sbr_jax.models.likelihood import token_log_probs
from sbr_jax.models.loading import Model, load, make_model, save
from sbr_jax.models.lora import (
    LoraPair,
    init_adapter,
    is_lora_pair,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sbr_jax.models.peft import load_peft, save_peft
from sbr_jax.models.prefix import make_extend_fn
from sbr_jax.models.quantize import (
    dequantize,
    quantize,
    require_dense,
    weight_bytes,
)
from sbr_jax.models.sharding import (
    adapter_partition_specs,
    named_shardings,
    partition_specs,
)
from sbr_jax.models.tokenizer import load_tokenizer
from sbr_jax.models.transformer import init_params, make_apply_fn

__all__ = [
    "TARGETS",
    "Hardware",
    "LoraPair",
    "Model",
    "ModelConfig",
    "QuantisedWeight",
    "adapter_partition_specs",
    "as_dense",
    "dequantize",
    "generate",
    "init_adapter",
    "init_params",
    "is_lora_pair",
    "is_quantised",
    "load",
    "load_adapter",
    "load_peft",
    "load_tokenizer",
    "make_apply_fn",
    "make_extend_fn",
    "make_model",
    "merge_adapter",
    "named_shardings",
    "partition_specs",
    "quantize",
    "require_dense",
    "save",
    "save_adapter",
    "save_peft",
    "token_log_probs",
    "weight_bytes",
]
