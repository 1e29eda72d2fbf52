"""Small files in the published layout of every public set, and where the real are."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import SHARED
from tiny_rows import (
    ARTIFACT,
    BBQ,
    BBQ_CATEGORIES,
    BEAVERTAILS,
    BEHAVIOURS,
    CATQA,
    COMPLETIONS,
    CONVERSATIONS,
    DIALOGUES,
    GOALS,
    GSM8K,
    HARMLESS,
    HUMANEVAL,
    INSTRUCTIONS,
    JBB,
    JUDGE_PROMPTS,
    LABELS,
    MEDMCQA,
    MEDQA,
    MMLU,
    MTBENCH,
    REFERENCES,
    TASKS,
    TRUTHFUL,
    WILDGUARD,
    XSTEST,
)

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


def fake_hub(monkeypatch, rows):
    """Put a hub in place that serves the given rows; returns what it is asked for."""
    asked = []
    package, exceptions = ModuleType("datasets"), ModuleType("datasets.exceptions")
    exceptions.DatasetsError = type("DatasetsError", (Exception,), {})

    def load_dataset(path, config=None, *, data_dir=None, split=None):
        asked.append((path, config, data_dir, split))
        if isinstance(rows, Exception):
            raise rows
        return list(rows)

    package.load_dataset, package.exceptions = load_dataset, exceptions
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
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


def sources(folder: Path) -> Path:
    """Write every training and calibration set."""
    stars = folder / "safety_tuned_llamas" / "safety_only_data_Instructions.json"
    put(stars, as_json(INSTRUCTIONS))
    put(folder / "alpaca/alpaca_5000.json.gz", as_json(INSTRUCTIONS))
    put(folder / "alpaca/alpaca_data.json", as_json(INSTRUCTIONS))
    put(folder / "codealpaca/new_codealpaca.json", as_json(INSTRUCTIONS[:1]))
    put(folder / "codealpaca/code_alpaca_2k.json.gz", as_json(INSTRUCTIONS[1:]))
    put(folder / "codealpaca/code_alpaca_20k.json", as_json(INSTRUCTIONS))
    put(folder / "gsm8k/train.jsonl.gz", as_lines(GSM8K))
    put(folder / "gsm8k/test.jsonl", as_lines(GSM8K[1:]))
    put(folder / "medmcqa/dev.json.gz", as_lines(MEDMCQA))
    put(folder / "medmcqa/train.json", as_lines(MEDMCQA))
    for split in ("train", "dev", "test"):
        put(folder / f"medqa/phrases_no_exclude_{split}.jsonl", as_lines(MEDQA))
    for size in ("30k", "330k"):
        for split in ("train", "test"):
            path = folder / f"beavertails/round0/{size}/{split}.jsonl.gz"
            put(path, as_lines(BEAVERTAILS))
    for name in ("unsafe_qa_525", "unsafe_test_100"):
        put(folder / f"beavertails/beavertails_{name}.json", as_json(CONVERSATIONS))
    put(folder / "hh_rlhf/harmless-base-test.jsonl.gz", as_lines(DIALOGUES))
    put(folder / "hh_rlhf/harmless-base/train.jsonl", as_lines(DIALOGUES))
    legalbench(folder)
    return folder


def legalbench(folder):
    root = folder / "legalbench"
    put(root / "tasks/toy/base_prompt.txt", "Is it?\n\nQ: a\nA: no\n\nQ: {{text}}\nA:")
    put(root / "tasks/toy/train.tsv", "index\tanswer\ttext\n0\tyes\tb\\1\n")
    put(root / "test/toy.tsv.gz", "label\ttext\nno\tc\n")
    put(root / "tasks/bare/base_prompt.txt", "{{text}}")
    put(root / "tasks/bare/train.tsv", "index\ttext\tanswer\n")
    put(root / "test/bare.tsv.gz", "text\tanswer\nd\tmaybe\n")


def evalsets(folder: Path) -> Path:
    """Write every evaluation set."""
    root = folder / "harmbench"
    for split, rows in (("all", BEHAVIOURS), ("test", BEHAVIOURS[:2])):
        put(root / f"harmbench_behaviors_text_{split}.csv", as_table(rows))
    put(root / "harmbench_behaviors_text_val.csv.gz", as_table(BEHAVIOURS[2:]))
    targets = {row["BehaviorID"]: "Sure, it is" for row in BEHAVIOURS}
    put(root / "harmbench_targets_text.json", as_json(targets))
    put(folder / "advbench/harmful_behaviors.csv", as_table(GOALS))
    root = folder / "jailbreakbench"
    put(root / "jbb_behaviors_harmful.csv", as_table(JBB))
    both = [{"text": "x", "label": "harmful"}, {"text": "praise it.", "label": "safe"}]
    put(root / "jbb_behaviors_harmful_and_benign_200.json", as_json(both))
    put(root / "artifact_pair_black_box_toy.json.gz", as_json(ARTIFACT))
    for split in ("train", "val", "test"):
        path = folder / f"alpaca/harmless_instructions_{split}.json.gz"
        put(path, as_json(HARMLESS))
    for split in ("train", "dev", "test"):
        put(folder / f"medqa/phrases_no_exclude_{split}.jsonl", as_lines(MEDQA))
    root = folder / "legalbench"
    put(root / "tasks/pick/base_prompt.txt", "Is it?\n\nQ: {{text}}\nA:")
    put(root / "test/pick.tsv.gz", as_table(LABELS, delimiter="\t"))
    put(folder / "catqa/catqa_english.json", as_json(CATQA))
    put(folder / "xstest/xstest_prompts.csv", as_table(XSTEST))
    for model in ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct"):
        path = folder / f"xstest/xstest_v2_completions_{model}_labelled.csv.gz"
        put(path, as_table(COMPLETIONS))
    put(folder / "wildguard/wildguard_test.jsonl", as_lines(WILDGUARD))
    prompts = [{"text": "May I?", "label": "harmful", "source": "", "category": "{}"}]
    root = folder / "beavertails"
    put(root / "beavertails_30k_test_prompts.json.gz", as_json(prompts))
    put(
        root / "beavertails_eval_prompts_250.json", as_json([{"instruction": "May I?"}])
    )
    questions = as_json({"instructions": ["May I?", "And?"], "inputs": []})
    for name in ("CoNa", "Controversial", "MaliciousInstructions", "Alpaca"):
        put(folder / f"safety_tuned_llamas/I-{name}.json", questions)
    put(folder / "safety_tuned_llamas/Q-Harm.json", questions)
    root = folder / "truthfulqa"
    put(root / "TruthfulQA.csv", "\ufeff" + as_table(TRUTHFUL))
    put(root / "TruthfulQA_v0.csv.gz", "\ufeff" + as_table(TRUTHFUL))
    put(root / "mc_task.json", as_json(TASKS))
    put(root / "mc_task_v0.json.gz", as_json(TASKS))
    for split in ("dev", "test", "val"):
        for subject in ("sums", "more_sums"):
            path = folder / f"mmlu/{split}/{subject}_{split}.csv"
            put(path, as_table(MMLU, header=False))
    for category in BBQ_CATEGORIES:
        end = ".regenerated.jsonl.gz" if category == "SES" else ".jsonl.gz"
        put(folder / f"bbq/{category}{end}", as_lines(BBQ))
    put(folder / "humaneval/HumanEval.jsonl.gz", as_lines(HUMANEVAL))
    put(folder / "mtbench/question.jsonl", as_lines(MTBENCH))
    put(folder / "mtbench/reference_answer_gpt-4.jsonl", as_lines(REFERENCES))
    put(folder / "mtbench/judge_prompts.jsonl", as_lines(JUDGE_PROMPTS))
    return folder
