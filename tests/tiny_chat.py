"""A random chat model and made-up data sets that the presets of chat models run on."""

import dataclasses
import json
from pathlib import Path

import checkpoints
import numpy as np
import tiny_data
import tiny_rows
from tiny_data import as_json, as_lines, as_table, put

from sbr_jax import models

WORDS = [f"w{i}" for i in range(60)]
LABELS = ["A", "B", "C", "D", "yes", "no", "safe", "unsafe", "ok", ".", ":", "?"]
MARK = "zebra"
"""A word of every prompt that is harmful or measured: it must not reach the results."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    " <user> {{ m['content'] }} <assistant>{% else %}"
    " {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
    names = [*special, MARK, *LABELS, *WORDS]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=template,
    )


CONFIG = dataclasses.replace(
    checkpoints.CONFIG, vocab_size=len(WORDS) + len(LABELS) + 6, context=96
)


def changed(**sizes):
    """The model's configuration with other sizes."""
    return dataclasses.replace(CONFIG, **sizes)


def save_model(folder: Path, template=TEMPLATE, config=CONFIG) -> Path:
    """Write a random checkpoint with its tokenizer."""
    params = checkpoints.params(config)
    models.save(folder, models.make_model(config, params, tokenizer(template)))
    return folder


class Words:
    """Texts that no other text of the same instance repeats."""

    def __init__(self, seed):
        self.rng, self.count = np.random.default_rng(seed), 0

    def __call__(self, size=6):
        self.count += 1
        return " ".join([f"x{self.count}", *self.rng.choice(WORDS, size)])


def instructions(text, rows, start=""):
    return [
        {"instruction": start + text(), "input": "", "output": text(3)}
        for _ in range(rows)
    ]


def save_data(folder: Path, rows: int = 24) -> Path:
    """Write every data set of the presets, each prompt once."""
    tiny_data.evalsets(folder)
    text = Words(0)
    harm = f"{MARK} "
    put(folder / "alpaca/alpaca_5000.json", as_json(instructions(text, rows)))
    for name in ("new_codealpaca", "code_alpaca_2k"):
        path = folder / f"codealpaca/{name}.json"
        put(path, as_json(instructions(text, rows // 2)))
    stars = folder / "safety_tuned_llamas/safety_only_data_Instructions.json"
    put(stars, as_json(instructions(text, rows, harm)))
    for split, count in (("train", rows), ("test", rows // 2)):
        path = folder / f"medqa/phrases_no_exclude_{split}.jsonl"
        put(path, as_lines([medqa(text, i) for i in range(count)]))
    medmcqa = [
        {"question": text(), "cop": i % 4 + 1} | {f"op{c}": text(1) for c in "abcd"}
        for i in range(rows)
    ]
    put(folder / "medmcqa/dev.json", as_lines(medmcqa))
    root = folder / "legalbench"
    put(root / "tasks/toy/base_prompt.txt", "Is it?\n\nQ: {{text}}\nA:")
    legal = [
        {"index": i, "answer": ("yes", "no")[i % 2], "text": text()}
        for i in range(rows)
    ]
    put(root / "tasks/toy/train.tsv", as_table(legal, delimiter="\t"))
    put(
        root / "test/toy.tsv",
        as_table(
            [{"text": text(), "label": ("yes", "no")[i % 2]} for i in range(rows)],
            delimiter="\t",
        ),
    )
    unsafe = [conversation(harm + text(), text(3)) for _ in range(rows)]
    put(folder / "beavertails/beavertails_unsafe_qa_525.json", as_json(unsafe))
    asked = {"Harm": {"Kind": [harm + text() for _ in range(rows)]}}
    put(folder / "catqa/catqa_english.json", as_json(asked))
    rows = [behaviour(harm + text(), i) for i in range(6)]
    root = folder / "harmbench"
    put(root / "harmbench_behaviors_text_all.csv", as_table(rows))
    targets = {row["BehaviorID"]: "Sure" for row in rows}
    put(root / "harmbench_targets_text.json", as_json(targets))
    return folder


SIZES = {
    "train": 12,
    "held_out": 4,
    "calibration": 6,
    "safety_mix": 4,
    "harmful": 4,
    "probe": 4,
    "max_length": 48,
    "max_new_tokens": 8,
    "benchmarks": ("harmbench", "xstest"),
}
"""Options of a study that is small enough for these data."""


def overlap(folder: Path, count=3) -> int:
    """Put HarmBench prompts, spelt otherwise, among the calibration pairs."""
    path = folder / "data/harmbench/harmbench_behaviors_text_all.csv"
    shared = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
    rows = [
        {"instruction": f"{text.upper()}!", "input": "", "output": "no"}
        for text in shared[:count]
    ]
    path = folder / "data/safety_tuned_llamas/safety_only_data_Instructions.json"
    put(path, as_json(rows + json.loads(path.read_text())))
    return len(rows)


def medqa(text, number):
    options = {letter: text(1) for letter in "ABCD"}
    right = "ABCD"[number % 4]
    return {
        "question": text(),
        "answer": options[right],
        "options": options,
        "answer_idx": right,
    }


def conversation(prompt, answer):
    return {
        "conversations": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


def behaviour(prompt, number):
    return {
        **tiny_rows.BEHAVIOURS[0],
        "Behavior": prompt,
        "BehaviorID": f"praise_standard_{number}",
    }
