"""A random model and made-up data sets that the preset `stories` can run on."""

import dataclasses
import json
from pathlib import Path

import checkpoints
import numpy as np
from tasks_case import words

from sbr_jax import models

WORDS = [f"w{i}" for i in range(60)]
MARK = "zebra"
"""A word of every calibration prompt: it must never reach the results."""


def tokenizer():
    return words([MARK, *WORDS])


def save_model(folder: Path) -> Path:
    """Write a random checkpoint with its tokenizer."""
    config = dataclasses.replace(checkpoints.CONFIG, vocab_size=len(WORDS) + 4)
    known = tokenizer()
    model = models.make_model(config, checkpoints.params(config), known)
    models.save(folder, model)
    return folder


def _text(rng, size):
    return " ".join(rng.choice(WORDS, size))


def save_data(folder: Path, rows: int = 60) -> Path:
    """Write small data sets in their owners' layouts."""
    rng = np.random.default_rng(0)
    pairs = [(_text(rng, 6), _text(rng, 4)) for _ in range(rows)]
    (folder / "gsm8k").mkdir(parents=True)
    lines = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(lines))
    for place, start in (
        ("alpaca/alpaca_5000.json", ""),
        ("safety_tuned_llamas/safety_only_data_Instructions.json", f"{MARK} "),
    ):
        (folder / place).parent.mkdir(exist_ok=True)
        found = [
            {
                "instruction": start + _text(rng, 6),
                "input": "",
                "output": _text(rng, 4),
            }
            for _ in range(rows)
        ]
        (folder / place).write_text(json.dumps(found))
    return folder
