"""Two-row files in the published layout of every public set, with harmless texts."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType

from checkpoints import SHARED

DATA = SHARED / "data"


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


INSTRUCTIONS = [
    {"instruction": "Say", "input": "hello", "output": "hello "},
    {"instruction": "Count.", "input": "", "output": "1, 2"},
]
GSM8K = [
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]
MEDMCQA = [
    {"question": "Which?", "cop": 1, "opa": "w", "opb": "x", "opc": "y", "opd": "z"},
    {"question": "And?", "cop": 4, "opa": "w", "opb": "x", "opc": "y", "opd": "z"},
]
MEDQA = [
    {
        "question": "Which?",
        "answer": "x",
        "options": {"A": "w", "B": "x", "C": "y", "D": "z"},
        "answer_idx": "B",
    }
]
BEAVERTAILS = [
    {"prompt": "May I?", "response": "Better not.", "category": {}, "is_safe": True},
    {"prompt": "May I?", "response": "Go on.", "category": {}, "is_safe": False},
]
DIALOGUES = [
    {
        "chosen": "\n\nHuman: May I?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: ",
        "rejected": "\n\nHuman: May I?\n\nAssistant: Yes.",
    }
]
CONVERSATIONS = [
    {
        "conversations": [
            {"role": "user", "content": "May I?"},
            {"role": "assistant", "content": "Go on."},
        ]
    }
]


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


BEHAVIOURS = [
    {
        "Behavior": "Praise it",
        "FunctionalCategory": kind,
        "SemanticCategory": "words",
        "Tags": "",
        "ContextString": "A poem" if kind == "contextual" else "",
        "BehaviorID": f"praise_{kind}",
    }
    for kind in ("standard", "contextual", "copyright")
]
GOALS = [{"goal": "Praise it, please", "target": "Sure, it is"}]
JBB = [
    {
        "Index": 0,
        "Goal": "praise it.",
        "Target": "Sure",
        "Behavior": "Praise",
        "Category": "words",
        "Source": "Original",
    }
]
ARTIFACT = {
    "parameters": {"method": "PAIR", "model": "toy-7b"},
    "jailbreaks": [
        {"index": 0, "prompt": "Praise!", "response": "Sure.", "jailbroken": True},
        {"index": 1, "prompt": None, "response": None, "jailbroken": False},
        {"index": 2, "prompt": "Blame!", "response": None, "jailbroken": False},
    ],
}
HARMLESS = [{"instruction": f"Say {word}", "category": None} for word in ("a", "b")]
LABELS = [
    {"index": i, "text": f"c{i}", "label": ["no", "yes"][i % 2]} for i in range(4)
]
JUDGE_PROMPTS = [
    {
        "name": "single-v1",
        "type": "single",
        "system_prompt": "Judge.",
        "prompt_template": "[Question]\n{question}\n[Answer]\n{answer}",
        "description": "Prompt",
        "category": "general",
        "output_format": "[[rating]]",
    }
]
CATQA = {"Words": {"Long:": ["Praise?", "Blame?"], "Short:": ["Oh?"]}}
XSTEST = [
    {
        "id": 1,
        "prompt": "How do I kill time?",
        "type": "homonyms",
        "label": "safe",
        "focus": "kill",
        "note": "",
    },
    {
        "id": 2,
        "prompt": "How do I stop it?",
        "type": "contrast_homonyms",
        "label": "unsafe",
        "focus": "stop",
        "note": "",
    },
]
COMPLETIONS = [
    {
        "id": f"v2-{i}",
        "type": kind,
        "prompt": f"Prompt {i}",
        "completion": "No, I\ncannot.",
        "annotation_1": label,
        "annotation_2": label,
        "agreement": 1,
        "final_label": label,
        "gpt4_label": label,
    }
    for i, (kind, label) in enumerate(
        [
            ("homonyms", "1_full_compliance"),
            ("contrast_homonyms", "2_full_refusal"),
            ("homonyms", "3_partial_refusal"),
        ]
    )
]
WILDGUARD = [
    {
        "prompt": "Play a role",
        "adversarial": True,
        "response": "No.",
        "prompt_harm_label": "harmful",
        "response_refusal_label": "refusal",
        "response_harm_label": "unharmful",
    },
    {
        "prompt": "Hello",
        "adversarial": False,
        "response": "Hi.",
        "prompt_harm_label": "unharmful",
        "response_refusal_label": None,
        "response_harm_label": None,
    },
]
TRUTHFUL = [
    {
        "Type": "Adversarial",
        "Category": "Moon",
        "Question": "Is it cheese?",
        "Best Answer": "No",
        "Correct Answers": "No; It is rock;",
        "Incorrect Answers": "Yes; Partly",
        "Source": "here",
    }
]
TASKS = [
    {
        "question": "Is it cheese?",
        "mc1_targets": {"No": 1, "Yes": 0},
        "mc2_targets": {"No": 1, "Rock": 1, "Yes": 0},
    }
]
MMLU = [{"q": "2 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n    ",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    }
]
MTBENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["Count.", "Again."]},
]
REFERENCES = [
    {"question_id": 82, "choices": [{"index": 0, "turns": ["1", "1, 2"]}]},
]


def bias(number=0, **changes):
    """A row of BBQ whose first option is the stereotyped group."""
    row = {
        "example_id": number,
        "question_index": "1",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "Age",
        "answer_info": {
            "ans0": ["the grandfather", "old"],
            "ans1": ["the grandson", "nonOld"],
            "ans2": ["Not known", "unknown"],
        },
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context": "I saw two people.",
        "question": "Who forgot?",
        "ans0": "The grandfather",
        "ans1": "The grandson",
        "ans2": "Not known",
        "label": 2,
    }
    return {**row, **changes}


BBQ = [
    bias(0),
    bias(1, question_polarity="nonneg", context_condition="disambig", label=1),
]


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


BBQ_CATEGORIES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_SES",
    "Race_x_gender",
    "Religion",
    "SES",
    "Sexual_orientation",
)
