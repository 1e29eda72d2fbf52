"""GGUF files written by hand, out of the tiny models that PyTorch's numbers are for.

A second writer of the format and of what llama.cpp's converter does to weights: nothing
here is taken from the code that reads.
"""

import struct

import numpy as np
from families_case import golden
from parity.make_checkpoints import seeded_weights

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
FORMS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
DENSE, HALF, Q8 = 0, 1, 8
"""Types of tensors: float32, float16, Q8_0."""

SETTINGS = {
    "max_position_embeddings": ("context_length", U32),
    "hidden_size": ("embedding_length", U32),
    "num_hidden_layers": ("block_count", U32),
    "intermediate_size": ("feed_forward_length", U32),
    "num_attention_heads": ("attention.head_count", U32),
    "num_key_value_heads": ("attention.head_count_kv", U32),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", F32),
    "head_dim": ("attention.key_length", U32),
    "rope_theta": ("rope.freq_base", F32),
    "sliding_window": ("attention.sliding_window", U32),
    "attn_logit_softcapping": ("attn_logit_softcapping", F32),
    "final_logit_softcapping": ("final_logit_softcapping", F32),
    "attention_multiplier": ("attention.scale", F32),
    "embedding_multiplier": ("embedding_scale", F32),
    "residual_multiplier": ("residual_scale", F32),
    "logits_scaling": ("logit_scale", F32),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", U32),
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
INTERLEAVED = ("llama", "granite", "smollm3")
WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "<|user|>", "<0x41>"]
KINDS = [2, 3, 3, 1, 1, 1, 1, 1, 4, 6]


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def packed(kind, value):
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        head = struct.pack("<IQ", inner, len(items))
        return head + b"".join(packed(inner, x) for x in items)
    return struct.pack(FORMS[kind], value)


def blocks(values):
    """Q8_0: of every 32 values one scale in float16 and 32 whole numbers."""
    groups = values.reshape(-1, 32)
    scale = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.rint(groups / scale.astype(np.float32)).astype(np.int8)
    rows = (s.tobytes() + c.tobytes() for s, c in zip(scale, codes, strict=True))
    dense = scale.astype(np.float32) * codes.astype(np.float32)
    return b"".join(rows), dense.reshape(values.shape)


def written(path, fields, tensors, *, version=3, magic=b"GGUF", align=32, counts=None):
    """A file of ``{name: (type, value)}`` and ``{name: (type, shape, bytes)}``.

    Shapes are in NumPy's order.
    """
    counts = counts or (len(tensors), len(fields))
    out = magic + struct.pack("<IQQ", version, *counts)
    for name, (kind, value) in fields.items():
        out += text(name) + struct.pack("<I", kind) + packed(kind, value)
    place = 0
    for name, (kind, shape, data) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += text(name) + dims + struct.pack("<IQ", kind, place)
        place += -(-len(data) // align) * align
    out += bytes(-len(out) % align)
    for _, _, data in tensors.values():
        out += data + bytes(-len(data) % align)
    path.write_bytes(out)
    return path


def vocabulary(size):
    """Settings of a SentencePiece vocabulary of so many tokens."""
    words = WORDS + [f"[PAD{i}]" for i in range(len(WORDS), size)]
    kinds = KINDS + [5] * (size - len(WORDS))
    scores = [-float(i) for i in range(size)]
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, words)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, kinds)),
        "tokenizer.ggml.scores": (ARRAY, (F32, scores)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.padding_token_id": (U32, 0),
    }


def parts(name, changes=None):
    """Settings and tensors of a tiny model, as llama.cpp's converter writes them."""
    found = golden(name)
    raw = {**found["config"], **(changes or {})}
    family = raw["model_type"]
    kind = ARCHITECTURES.get(family, family)
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    raw["rope_theta"] = rope.get("rope_theta", 10000.0)
    fields = {"general.architecture": (STRING, kind)}
    for key, (setting, what) in SETTINGS.items():
        if raw.get(key) is not None:
            fields[f"{kind}.{setting}"] = (what, raw[key])
    tensors = {}
    if rope.get("rope_type") == "linear":
        fields[f"{kind}.rope.scaling.type"] = (STRING, "linear")
        fields[f"{kind}.rope.scaling.factor"] = (F32, rope["factor"])
    for part in ("short", "long"):
        if values := rope.get(f"{part}_factor"):
            tensors[f"rope_factors_{part}.weight"] = dense(np.float32(values))
    fields |= vocabulary(raw["vocab_size"])
    weights = seeded_weights(found["tensors"], found["seed"], family)
    for place, values in weights.items():
        short = ggml_name(place, family)
        if family in INTERLEAVED and short.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            heads = raw["num_attention_heads"]
            heads = raw["num_key_value_heads"] if "attn_k" in short else heads
            values = values.reshape(heads, 2, -1, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(weights[place].shape)
        if family.startswith("gemma") and "norm" in place:
            values = values + np.float32(1)
        tensors[short] = dense(values)
    return fields, tensors


def dense(values):
    values = np.ascontiguousarray(values, np.float32)
    return DENSE, values.shape, values.tobytes()


def ggml_name(place, family):
    """The name of a tensor in a file of the family."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    stem, end = place.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{whole.get(stem, 'output')}.{end}"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    behind = family in ("gemma2", "gemma3_text", "olmo2")
    after = "post_attention_norm" if behind else "ffn_norm"
    short = {**NAMES, "post_attention_layernorm": after}[inner]
    return f"blk.{layer}.{short}.{end}"
