"""Tiny random checkpoints of every family, written by PyTorch transformers.

After ``make parity``, ``python tests/parity/make_checkpoints.py [CASE ...]`` writes the
golden files anew. Importing this needs no PyTorch: the golden tests draw the same
weights.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent.parent / "golden"
NEW_TOKENS = 24
SHOWN = 16
"""Logits of the first so many tokens of the vocabulary are kept."""
VARIED = 6
"""Greedy text with fewer different tokens than this says too little."""

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    # So low that a window of a tiny model's frequencies is blended.
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.25, 1.5, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
TIED = {"tie_word_embeddings": True}
CASES = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama3-tied": {"model_type": "llama", "rope_parameters": LLAMA3, **TIED},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 500.0,
            "factor": 2.0,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **TIED},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 12, **TIED},
    "gemma": {
        "model_type": "gemma",
        "head_dim": 16,
        "num_key_value_heads": 1,
        **TIED,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        # Small enough to bite on logits of a tiny model.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        **TIED,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 5000.0,
                "factor": 4.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        **TIED,
    },
    "phi3": {
        "model_type": "phi3",
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "phi3-window": {"model_type": "phi3", "sliding_window": 6},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0], **TIED},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.5,
        "logits_scaling": 0.8,
    },
}
"""Windows are shorter than the sequences, head sizes differ from width / heads."""


def prompts(seed):
    """A long and two short ones."""
    source = np.random.RandomState(seed)
    return [[1, *source.randint(3, 64, size).tolist()] for size in (19, 6, 2)]


def seeded_weights(shapes, seed, model_type):
    """Weights drawn as integers, so that every platform has the same bits.

    Uniform in ±0.35 (deviation 0.2: logits so large that a wrong angle shows); norms
    within 0.3 of one, which Gemma stores as their distance from one. Gemma's embedding
    is halved: scaled and tied, it would otherwise repeat the last token for ever.
    """
    gemma = model_type.startswith("gemma")
    source = np.random.RandomState(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = source.randint(-127, 128, shape).astype(np.float32) / 127
        if "norm" in name:
            values = 0.3 * values + (0.0 if gemma else 1.0)
        else:
            values = (0.175 if gemma and "embed" in name else 0.35) * values
        weights[name] = values.astype(np.float32)
    return weights


def build(name, seed):
    """The PyTorch model of a case, and its weights by name."""
    import torch
    import transformers

    # One thread: a tiny product is over before a second one has woken.
    torch.set_num_threads(1)
    settings = {**SHARED, **CASES[name]}
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    state = model.state_dict()
    if settings["tie_word_embeddings"]:
        del state["lm_head.weight"]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    weights = seeded_weights(shapes, seed, settings["model_type"])
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    model.load_state_dict(tensors, strict=not settings["tie_word_embeddings"])
    return model, weights


def logits_of(model, ids):
    """Float32 logits ``[T, V]`` of one sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def greedy(model, ids, steps=NEW_TOKENS):
    """The most likely continuation, and the smallest lead of a chosen token."""
    import torch

    row = torch.tensor([ids])
    out = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=steps,
        do_sample=False,
    )[0].tolist()
    best = np.sort(logits_of(model, out)[len(ids) - 1 : -1], axis=-1)
    return out[len(ids) :], float((best[:, -1] - best[:, -2]).min())


def record(name, seed, folder):
    """What PyTorch says about a case, or None where a tie makes greedy text moot."""
    import torch
    import transformers

    model, weights = build(name, seed)
    rows = prompts(seed)
    texts = []
    for row in rows:
        text, lead = greedy(model, row)
        if lead < 1e-3 or len(set(text)) < VARIED:
            return None
        texts.append(text)
    model.save_pretrained(folder)
    shown = logits_of(model, rows[0])[:, :SHOWN]
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "config": json.loads((Path(folder) / "config.json").read_text()),
        "seed": seed,
        "tensors": {key: list(value.shape) for key, value in weights.items()},
        "prompts": rows,
        "greedy": texts,
        "logits": [[float(f"{x:.8g}") for x in row] for row in shown],
    }


def first_record(name, folder):
    """The record of the first seed whose greedy text is clear and varied."""
    return next(r for seed in range(200) if (r := record(name, seed, folder)))


def main(names):
    import tempfile

    import transformers

    transformers.utils.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = first_record(name, folder)
        text = json.dumps(found, indent=None, separators=(",", ":"), sort_keys=True)
        # One key a line: a change shows where it is.
        (GOLDEN / f"{name}.json").write_text(text.replace(',"', ',\n"') + "\n")
        print(f"{name}: seed {found['seed']}")


if __name__ == "__main__":
    main(sys.argv[1:])
