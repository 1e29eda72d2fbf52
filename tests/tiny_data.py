"""Small files in the published layout of every public set, and where the real are."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_rows as rows
from checkpoints import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside us")


def put(path, text):
    """Write a text file, gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def fake_hub(monkeypatch, served):
    """Put a hub in place that serves the given rows; returns what it is asked for."""
    asked = []

    def load_dataset(path, config=None, *, data_dir=None, split=None):
        asked.append((path, config, data_dir, split))
        if isinstance(served, Exception):
            raise served
        return list(served)

    failures = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    package = SimpleNamespace(load_dataset=load_dataset, exceptions=failures)
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", failures)
    return asked


def as_json(value):
    return json.dumps(value)


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_table(rows, delimiter=",", header=True):
    """A table of dictionaries with one set of keys."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


WRITERS = {
    ".json": as_json,
    ".jsonl": as_lines,
    ".csv": as_table,
    ".tsv": lambda rows: as_table(rows, delimiter="\t"),
}


def save(folder, files):
    """Write values by their file's ending, and texts as they are."""
    for name, value in files.items():
        ending = Path(name.removesuffix(".gz")).suffix
        text = value if isinstance(value, str) else WRITERS[ending](value)
        put(folder / name, text)
    return folder


LEGALBENCH = {
    "legalbench/tasks/toy/base_prompt.txt": "Is it?\n\nQ: a\nA: no\n\nQ: {{text}}\nA:",
    "legalbench/tasks/toy/train.tsv": "index\tanswer\ttext\n0\tyes\tb\\1\n",
    "legalbench/test/toy.tsv.gz": "label\ttext\nno\tc\n",
    "legalbench/tasks/bare/base_prompt.txt": "{{text}}",
    "legalbench/tasks/bare/train.tsv": "index\ttext\tanswer\n",
    "legalbench/test/bare.tsv.gz": "text\tanswer\nd\tmaybe\n",
}
MEDQA = {
    f"medqa/phrases_no_exclude_{split}.jsonl": rows.MEDQA
    for split in ("train", "dev", "test")
}
STARS = "safety_tuned_llamas/safety_only_data_Instructions.json"
SOURCES = {
    STARS: rows.INSTRUCTIONS,
    "alpaca/alpaca_5000.json.gz": rows.INSTRUCTIONS,
    "alpaca/alpaca_data.json": rows.INSTRUCTIONS,
    "codealpaca/new_codealpaca.json": rows.INSTRUCTIONS[:1],
    "codealpaca/code_alpaca_2k.json.gz": rows.INSTRUCTIONS[1:],
    "codealpaca/code_alpaca_20k.json": rows.INSTRUCTIONS,
    "gsm8k/train.jsonl.gz": rows.GSM8K,
    "gsm8k/test.jsonl": rows.GSM8K[1:],
    "medmcqa/dev.json.gz": as_lines(rows.MEDMCQA),
    "medmcqa/train.json": as_lines(rows.MEDMCQA),
    **MEDQA,
    **{
        f"beavertails/round0/{size}/{split}.jsonl.gz": rows.BEAVERTAILS
        for size in ("30k", "330k")
        for split in ("train", "test")
    },
    "beavertails/beavertails_unsafe_qa_525.json": rows.CONVERSATIONS,
    "beavertails/beavertails_unsafe_test_100.json": rows.CONVERSATIONS,
    "hh_rlhf/harmless-base-test.jsonl.gz": rows.DIALOGUES,
    "hh_rlhf/harmless-base/train.jsonl": rows.DIALOGUES,
    **LEGALBENCH,
}
ASKED = {"instructions": ["May I?", "And?"], "inputs": []}
XSTEST_MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
EVALSETS = {
    "harmbench/harmbench_behaviors_text_all.csv": rows.BEHAVIOURS,
    "harmbench/harmbench_behaviors_text_test.csv": rows.BEHAVIOURS[:2],
    "harmbench/harmbench_behaviors_text_val.csv.gz": rows.BEHAVIOURS[2:],
    "harmbench/harmbench_targets_text.json": {
        row["BehaviorID"]: "Sure, it is" for row in rows.BEHAVIOURS
    },
    "advbench/harmful_behaviors.csv": rows.GOALS,
    "jailbreakbench/jbb_behaviors_harmful.csv": rows.JBB,
    "jailbreakbench/jbb_behaviors_harmful_and_benign_200.json": rows.JBB_BOTH,
    "jailbreakbench/artifact_pair_black_box_toy.json.gz": rows.ARTIFACT,
    **{
        f"alpaca/harmless_instructions_{split}.json.gz": rows.HARMLESS
        for split in ("train", "val", "test")
    },
    **MEDQA,
    "legalbench/tasks/pick/base_prompt.txt": "Is it?\n\nQ: {{text}}\nA:",
    "legalbench/test/pick.tsv.gz": rows.LABELS,
    "catqa/catqa_english.json": rows.CATQA,
    "xstest/xstest_prompts.csv": rows.XSTEST,
    **{
        f"xstest/xstest_v2_completions_{model}_labelled.csv.gz": rows.COMPLETIONS
        for model in XSTEST_MODELS
    },
    "wildguard/wildguard_test.jsonl": rows.WILDGUARD,
    "beavertails/beavertails_30k_test_prompts.json.gz": rows.PROMPTS,
    "beavertails/beavertails_eval_prompts_250.json": [{"instruction": "May I?"}],
    **{
        f"safety_tuned_llamas/{name}.json": ASKED
        for name in ("I-CoNa", "I-Controversial", "I-MaliciousInstructions", "I-Alpaca")
    },
    "safety_tuned_llamas/Q-Harm.json": ASKED,
    "truthfulqa/TruthfulQA.csv": "\ufeff" + as_table(rows.TRUTHFUL),
    "truthfulqa/TruthfulQA_v0.csv.gz": "\ufeff" + as_table(rows.TRUTHFUL),
    "truthfulqa/mc_task.json": rows.TASKS,
    "truthfulqa/mc_task_v0.json.gz": rows.TASKS,
    **{
        f"mmlu/{split}/{subject}_{split}.csv": as_table(rows.MMLU, header=False)
        for split in ("dev", "test", "val")
        for subject in ("sums", "more_sums")
    },
    **{
        f"bbq/{category}{'.regenerated' * (category == 'SES')}.jsonl.gz": rows.BBQ
        for category in rows.BBQ_CATEGORIES
    },
    "humaneval/HumanEval.jsonl.gz": rows.HUMANEVAL,
    "mtbench/question.jsonl": rows.MTBENCH,
}


def sources(folder: Path) -> Path:
    """Write every training and calibration set."""
    return save(folder, SOURCES)


def evalsets(folder: Path) -> Path:
    """Write every evaluation set."""
    return save(folder, EVALSETS)
