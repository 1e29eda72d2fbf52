"""Data on the host: public sets, records, leak checks, chat templates, batches."""

from sbr_jax.data.batches import (
    TokenDataset,
    batch,
    concatenate,
    mixture,
    subset,
    take,
)
from sbr_jax.data.exchange import stop_tokens
from sbr_jax.data.records import Pair, Record
from sbr_jax.data.registry import DOMAINS, EVALSETS, SOURCES, load_evalset, load_source
from sbr_jax.data.template import fix_template
from sbr_jax.data.text import (
    encode_chat,
    encode_prompts,
    encode_text,
    encode_text_prompts,
)

__all__ = [
    "DOMAINS",
    "EVALSETS",
    "SOURCES",
    "Pair",
    "Record",
    "TokenDataset",
    "batch",
    "concatenate",
    "encode_chat",
    "encode_prompts",
    "encode_text",
    "encode_text_prompts",
    "fix_template",
    "load_evalset",
    "load_source",
    "mixture",
    "stop_tokens",
    "subset",
    "take",
]
