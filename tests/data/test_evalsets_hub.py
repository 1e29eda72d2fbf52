"""Evaluation sets from the hub: the same items as from their published files."""

import dataclasses

import pytest
import tiny_data as files
import tiny_rows

from sbr_jax.data import evalsets, hub, load_evalset
from sbr_jax.typing import UserError

TARGETS = [
    {
        "question": row["question"],
        **{
            name: {"choices": list(row[name]), "labels": list(row[name].values())}
            for name in ("mc1_targets", "mc2_targets")
        },
    }
    for row in tiny_rows.TASKS
]
HUB_ROWS = {
    "advbench": [
        {"prompt": row["goal"], "target": row["target"]} for row in tiny_rows.GOALS
    ],
    "bbq": tiny_rows.BBQ * len(tiny_rows.BBQ_CATEGORIES),
    "catqa": [
        {"Category": "Words", "Subcategory": sub, "Question": question}
        for sub, questions in tiny_rows.CATQA["Words"].items()
        for question in questions
    ],
    "humaneval": tiny_rows.HUMANEVAL,
    "jailbreakbench": tiny_rows.JBB,
    "medqa": tiny_rows.MEDQA,
    "mmlu": [
        {
            "question": "2 + 2?",
            "subject": subject,
            "choices": ["3", "4", "5", "6"],
            "answer": 1,
        }
        for subject in ("more_sums", "sums")
    ],
    "mtbench": [
        {
            "prompt_id": row["question_id"],
            "category": row["category"],
            "prompt": row["turns"],
            "reference": ["1", "1, 2"] if row["question_id"] == 82 else [],
        }
        for row in tiny_rows.MTBENCH
    ],
    "truthfulqa": [
        {
            "type": "Adversarial",
            "category": "Moon",
            "question": "Is it cheese?",
            "best_answer": "No",
            "correct_answers": ["No", "It is rock"],
            "incorrect_answers": ["Yes", "Partly"],
            "source": "here",
        }
    ],
    "truthfulqa_mc1": TARGETS,
    "truthfulqa_mc2": TARGETS,
    "wildguardtest": tiny_rows.WILDGUARD,
    "xstest": tiny_rows.XSTEST,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", sorted(set(hub.HUB) & set(evalsets.EVALSETS)))
def test_the_hub_gives_the_same_items_as_the_files(name, folder, monkeypatch):
    asked = files.fake_hub(monkeypatch, HUB_ROWS[name])
    here, there = load_evalset(name, folder), load_evalset(name)
    # The hub has neither file names nor rows by subject.
    own = {"bbq": ("regenerated",), "mmlu": ("id",)}.get(name, ())
    plain = [
        [
            {k: v for k, v in dataclasses.asdict(i).items() if k not in own}
            for i in items
        ]
        for items in (here, there)
    ]
    assert plain[0] == plain[1]
    assert asked[0][0] == hub.HUB[name].path
    assert set(hub.HUB[name].splits) <= set(evalsets.EVALSETS[name].splits)


def test_the_hubs_splits_mark_their_prompts(monkeypatch):
    asked = files.fake_hub(monkeypatch, tiny_rows.JBB)
    (benign,) = load_evalset("jailbreakbench", split="benign")
    assert not benign.harmful
    assert asked[-1][3] == "benign"
    files.fake_hub(monkeypatch, tiny_rows.XSTEST)
    assert len(load_evalset("xstest", split="unsafe")) == 1


def test_other_columns_on_the_hub_are_one_clear_line(monkeypatch):
    files.fake_hub(monkeypatch, [HUB_ROWS["mmlu"][0] | {"answer": -1}])
    with pytest.raises(UserError, match=r"cais/mmlu \(test\), row 1: .*columns of its"):
        load_evalset("mmlu")
    files.fake_hub(monkeypatch, FileNotFoundError("gated"))
    with pytest.raises(UserError, match="terms must be accepted"):
        load_evalset("wildguardtest")
    with pytest.raises(UserError, match="no copy of it"):
        load_evalset("harmbench")
