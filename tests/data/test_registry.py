"""Every public set: its layout, its copy on the hub, its size, its mistakes.

Of real rows only shapes, labels and counts are looked at, never text.
"""

import collections
import dataclasses
import sys

import pytest
import tiny_data as files
import tiny_rows as rows
from tiny_data import DATA, needs_data

from sbr_jax.data import DOMAINS, EVALSETS, SOURCES, load_evalset, load_source
from sbr_jax.data.records import (
    BehaviourItem,
    BiasItem,
    ChoiceItem,
    CodeItem,
    DialogueItem,
    JudgedItem,
    Pair,
    QuestionItem,
)
from sbr_jax.typing import UserError

TWO = [("Say\n\nhello", "hello"), ("Count.", "1, 2")]
CHOICES = "A. w\nB. x\nC. y\nD. z\nAnswer:"
PAIRS = {
    "alpaca": TWO,
    "alpaca_full": TWO,
    "beavertails": [("May I?", "Better not.")],
    "beavertails_unsafe": [("May I?", "Go on.")],
    "beavertails_unsafe_qa": [("May I?", "Go on.")],
    "beavertails_unsafe_test": [("May I?", "Go on.")],
    "codealpaca": TWO,
    "codealpaca_20k": TWO,
    "gsm8k": [("2 + 2?", "2 + 2 = 4\n#### 4"), ("3 + 3?", "#### 6")],
    "hh_rlhf": [("May I?", "No.")],
    "legalbench": [("Is it?\n\nQ: b\\1\nA:", "yes")],
    "medmcqa": [(f"Which?\n{CHOICES}", "A. w"), (f"And?\n{CHOICES}", "D. z")],
    "medqa": [(f"Which?\n{CHOICES}", "B. x")],
    "safety_tuned_llamas": TWO,
}
KINDS = {
    BiasItem: ["bbq"],
    CodeItem: ["humaneval"],
    ChoiceItem: ["legalbench", "medqa", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2"],
    DialogueItem: ["mtbench"],
    JudgedItem: ["jailbreakbench_artifacts", "wildguardtest", "xstest_completions"],
    QuestionItem: ["truthfulqa"],
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
ABSENT = {
    ("harmbench_copyright", "test"),
    ("harmbench_standard", "val"),
    ("harmbench_contextual", "val"),
}
"""Splits without a row: the small file has none of that kind."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("evalsets"))


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    return files.sources(tmp_path_factory.mktemp("sources"))


# --- what sets hold -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_is_read_from_its_published_files(name, source_folder):
    assert load_source(name, source_folder) == PAIRS[name]
    for split in SOURCES[name].splits:
        found = load_source(name, source_folder, split=split)
        assert {type(pair) for pair in found} == {Pair}


@pytest.mark.parametrize("name", sorted(EVALSETS))
def test_every_evaluation_set_is_read_from_its_published_files(name, folder):
    first = next(iter(EVALSETS[name].splits))
    for split in EVALSETS[name].splits:
        if (name, split) in ABSENT:
            continue
        items = load_evalset(name, folder, split=split)
        assert {type(item) for item in items} == {KIND.get(name, BehaviourItem)}
        assert all(item.prompt.strip() and item.id for item in items)
        if split == first:
            assert load_evalset(name, folder) == items


def test_splits_differ_where_the_files_do(source_folder):
    assert load_source("gsm8k", source_folder, split="test") == PAIRS["gsm8k"][1:]
    found = load_source("legalbench", source_folder, split="test")
    assert found == [("d", "maybe"), ("Is it?\n\nQ: c\nA:", "no")]


def test_what_may_be_a_domain_has_no_harmful_answers():
    roles = {name: source.role for name, source in SOURCES.items()}
    assert set(roles.values()) == {"domain", "safety", "harmful"}
    assert not [name for name in DOMAINS if "unsafe" in name]
    harmful = {name for name, role in roles.items() if role == "harmful"}
    assert {name for name in roles if "unsafe" in name} == harmful


def test_behaviours_carry_context_target_and_kind(folder):
    standard, contextual, copyright = load_evalset("harmbench", folder)
    assert standard.prompt == "Praise it"
    assert contextual.prompt == "A poem\n\n---\n\nPraise it"
    assert (standard.target, copyright.kind) == ("Sure, it is", "copyright")
    assert load_evalset("harmbench_contextual", folder) == [contextual]
    assert load_evalset("harmbench", folder, split="val") == [copyright]
    (goal,) = load_evalset("advbench", folder)
    assert (goal.prompt, goal.target) == ("Praise it, please", "Sure, it is")


def test_harmful_and_benign_prompts_are_told_apart(folder):
    (harmful,) = load_evalset("jailbreakbench", folder)
    (benign,) = load_evalset("jailbreakbench", folder, split="benign")
    assert (harmful.harmful, harmful.target, harmful.group) == (True, "Sure", "words")
    assert (benign.harmful, benign.prompt) == (False, "praise it.")
    assert [item.harmful for item in load_evalset("xstest", folder)] == [False, True]
    (safe,) = load_evalset("xstest", folder, split="safe")
    assert (safe.id, safe.group) == ("1", "homonyms")
    plain = load_evalset("safety_tuned_questions", folder, split="I-Alpaca")
    assert not any(item.harmful for item in plain)
    assert all(item.harmful for item in load_evalset("safety_tuned_questions", folder))
    groups = [item.group for item in load_evalset("catqa", folder)]
    assert groups == ["Words"] * 3
    assert [
        (i.prompt, i.id, i.harmful) for i in load_evalset("alpaca_harmless", folder)
    ] == [
        ("Say a", "1", False),
        ("Say b", "2", False),
    ]


def test_official_names_of_jailbreakbench_are_read_too(tmp_path):
    for name in ("harmful", "benign"):
        files.save(tmp_path, {f"jailbreakbench/{name}-behaviors.csv": rows.JBB})
        (item,) = load_evalset("jailbreakbench", tmp_path, split=name)
        assert item.harmful == (name == "harmful")


def test_judged_answers_keep_what_people_said(folder):
    first, second, third = load_evalset("xstest_completions", folder, split="gpt4")
    verdicts = [item.verdict for item in (first, second, third)]
    assert verdicts == ["compliance", "refusal", "partial refusal"]
    assert [item.harmful_prompt for item in (first, second)] == [False, True]
    assert (first.id, first.response) == ("gpt4/v2-0", "No, I\ncannot.")
    attack, plain = load_evalset("wildguardtest", folder)
    assert (attack.verdict, attack.group) == ("refusal", "adversarial")
    assert (attack.harmful_prompt, attack.harmful_response) == (True, False)
    assert (plain.verdict, plain.harmful_response) == ("", None)


@pytest.mark.parametrize("ending", ["csv", "jsonl.gz", "parquet"])
def test_wildguardtest_is_a_file_of_the_users_own(ending, folder, tmp_path):
    path = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows.WILDGUARD), path)
    else:
        files.save(tmp_path, {path.name: rows.WILDGUARD})
    assert load_evalset("wildguardtest", path) == load_evalset("wildguardtest", folder)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"mine\."):
        load_evalset("wildguardtest", path)
    with pytest.raises(UserError, match="csv, tsv, json, jsonl or parquet"):
        load_evalset("wildguardtest", files.put(tmp_path / "mine.txt", "x"))


def test_recorded_attacks_keep_only_what_was_submitted(folder, tmp_path):
    first, third = load_evalset("jailbreakbench_artifacts", folder)
    assert (first.id, first.group) == ("PAIR/toy-7b/0", "PAIR/toy-7b")
    assert [i.harmful_response for i in (first, third)] == [True, False]
    assert (third.id, third.prompt, third.response) == ("PAIR/toy-7b/2", "Blame!", "")
    path = "jailbreakbench/attack-artifacts/PAIR/black_box/toy-7b.json"
    files.save(tmp_path, {path: rows.ARTIFACT})
    assert load_evalset("jailbreakbench_artifacts", tmp_path) == [first, third]


def test_truthfulqa_has_one_or_several_right_options(folder):
    (one,) = load_evalset("truthfulqa_mc1", folder)
    (several,) = load_evalset("truthfulqa_mc2", folder, split="v0")
    assert (one.choices, one.correct) == (("No", "Yes"), (0,))
    assert (several.choices, several.correct) == (("No", "Rock", "Yes"), (0, 1))
    (question,) = load_evalset("truthfulqa", folder)
    assert question.correct == ("No", "It is rock")
    assert question.incorrect == ("Yes", "Partly")


def test_questions_with_options_tell_their_group(folder, tmp_path):
    items = load_evalset("mmlu", folder)
    assert [item.group for item in items] == ["more_sums", "sums"]
    assert items[0] == ChoiceItem(
        "2 + 2?", ("3", "4", "5", "6"), (1,), "more_sums/1", "more_sums"
    )
    (item,) = load_evalset("medqa", folder)
    assert (item.choices, item.correct) == (("w", "x", "y", "z"), (1,))
    items = load_evalset("legalbench", folder)
    assert [i.choices[i.answer] for i in items] == ["no", "yes", "no", "yes"]
    assert {i.choices for i in items} == {("no", "yes")}
    assert (items[1].id, items[1].group) == ("pick/2", "pick")
    assert items[1].question == "Is it?\n\nQ: c1\nA:"
    # Tasks whose answers are texts are no choice among labels.
    prompt, test = "legalbench/tasks/{}/base_prompt.txt", "legalbench/test/{}.tsv"
    texts = [{"text": str(i), "label": f"because {i}"} for i in range(4)]
    files.save(
        tmp_path, {prompt.format("open"): "{{text}}", test.format("open"): texts}
    )
    with pytest.raises(UserError, match="tasks with labels"):
        load_evalset("legalbench", tmp_path)
    labels = {prompt.format("pick"): "{{text}}", test.format("pick"): rows.LABELS}
    files.save(tmp_path, labels)
    assert {i.group for i in load_evalset("legalbench", tmp_path)} == {"pick"}


def test_a_code_task_passes_with_its_solution(folder):
    (code,) = load_evalset("humaneval", folder)
    assert code.prompt.endswith(":\n    ")
    scope: dict = {}
    exec(code.prompt + code.solution.lstrip() + code.test, scope)
    scope["check"](scope[code.entry_point])


# --- the hub --------------------------------------------------------------------------

TARGETS = [
    {
        name: {"choices": list(cell), "labels": list(cell.values())}
        if isinstance(cell, dict)
        else cell
        for name, cell in row.items()
    }
    for row in rows.TASKS
]
ON_HUB = {
    "alpaca_full": rows.INSTRUCTIONS,
    "beavertails": rows.BEAVERTAILS,
    "beavertails_unsafe": rows.BEAVERTAILS,
    "codealpaca_20k": rows.INSTRUCTIONS,
    "gsm8k": rows.GSM8K,
    "hh_rlhf": rows.DIALOGUES,
    # The hub's copy counts the right option from 0.
    "medmcqa": [row | {"cop": row["cop"] - 1} for row in rows.MEDMCQA],
    "medqa": rows.MEDQA,
    "advbench": [
        {"prompt": row["goal"], "target": row["target"]} for row in rows.GOALS
    ],
    "bbq": rows.BBQ * len(rows.BBQ_CATEGORIES),
    "catqa": [
        {"Category": "Words", "Subcategory": sub, "Question": question}
        for sub, questions in rows.CATQA["Words"].items()
        for question in questions
    ],
    "humaneval": rows.HUMANEVAL,
    "jailbreakbench": rows.JBB,
    "mmlu": rows.rows(
        "question subject choices answer",
        *(("2 + 2?", subject, list("3456"), 1) for subject in ("more_sums", "sums")),
    ),
    "mtbench": [
        {
            "prompt_id": row["question_id"],
            "category": row["category"],
            "prompt": row["turns"],
        }
        for row in rows.MTBENCH
    ],
    "truthfulqa": rows.rows(
        "category question best_answer correct_answers incorrect_answers",
        ("Moon", "Is it cheese?", "No", ["No", "It is rock"], ["Yes", "Partly"]),
    ),
    "truthfulqa_mc1": TARGETS,
    "truthfulqa_mc2": TARGETS,
    "wildguardtest": rows.WILDGUARD,
    "xstest": rows.XSTEST,
}


def on_hub(table):
    return [name for name, found in table.items() if found.hub is not None]


@pytest.mark.parametrize("name", on_hub(SOURCES))
def test_the_hub_gives_the_same_pairs_as_the_files(name, source_folder, monkeypatch):
    asked = files.fake_hub(monkeypatch, ON_HUB[name])
    assert load_source(name) == load_source(name, source_folder)
    hub, split = SOURCES[name].hub, next(iter(SOURCES[name].splits))
    theirs = split if hub.splits is None else hub.splits[split]
    assert asked == [(hub.path, hub.config, hub.data_dir, theirs)]
    assert set(hub.splits or ()) <= set(SOURCES[name].splits)


@pytest.mark.parametrize("name", on_hub(EVALSETS))
def test_the_hub_gives_the_same_items_as_the_files(name, folder, monkeypatch):
    asked = files.fake_hub(monkeypatch, ON_HUB[name])
    # The hub has neither file names nor rows by subject.
    own = {"bbq": {"regenerated": None}, "mmlu": {"id": ""}}.get(name, {})
    here, there = (
        [dataclasses.replace(item, **own) for item in items]
        for items in (load_evalset(name, folder), load_evalset(name))
    )
    assert here == there
    hub = EVALSETS[name].hub
    assert asked[0][0] == hub.path
    assert set(hub.splits or ()) <= set(EVALSETS[name].splits)


def test_the_hubs_splits_mark_their_prompts(monkeypatch):
    asked = files.fake_hub(monkeypatch, rows.JBB)
    (benign,) = load_evalset("jailbreakbench", split="benign")
    assert not benign.harmful
    assert asked[-1][3] == "benign"
    files.fake_hub(monkeypatch, rows.XSTEST)
    assert len(load_evalset("xstest", split="unsafe")) == 1


QUESTION = {"question": "q", "subject": "s"}
CARD = "row 1: expected the columns of its card"
HUB_FAULTS = {
    "no network": (
        *("gsm8k", None, ConnectionError("no route")),
        r"openai/gsm8k.*ConnectionError.*name a data folder: folder='FOLDER'",
    ),
    "gated": (
        *("wildguardtest", None, FileNotFoundError("gated")),
        "terms must be accepted",
    ),
    "no copy of a source": ("legalbench", "train", [], "no copy of it"),
    "no copy of a set": ("harmbench", None, [], "no copy of it"),
    "no copy of a split": ("medqa", "dev", [], "no copy of it"),
    "hidden answers": (
        *("medmcqa", None, [rows.MEDMCQA[0] | {"cop": -1}]),
        r"row 1, column 'cop': .* 1 to 4, got 0",
    ),
    **{
        f"mmlu {answer} of {choices}": (
            *("mmlu", None),
            [QUESTION | {"choices": choices, "answer": answer}],
            CARD,
        )
        for answer, choices in (
            (1, "abcd"),
            (1, list("abcde")),
            *((answer, list("abcd")) for answer in (True, 4)),
        )
    },
    **{
        f"truthfulqa {case}": (
            *("truthfulqa_mc1", None),
            [QUESTION | {"mc1_targets": {"choices": choices, "labels": [1, 0]}}],
            CARD,
        )
        for case, choices in {"letters": "ab", "option twice": ["a", "a"]}.items()
    },
}


@pytest.mark.parametrize("case", HUB_FAULTS)
def test_a_hub_out_of_reach_or_of_other_columns_is_one_line(case, monkeypatch):
    name, split, served, said = HUB_FAULTS[case]
    files.fake_hub(monkeypatch, served)
    load = load_source if name in SOURCES else load_evalset
    with pytest.raises(UserError, match=said) as error:
        load(name, split=split)
    assert "\n" not in str(error.value)


def test_without_the_package_the_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"sbr_jax\[eval\]"):
        load_source("gsm8k")


# --- the real files -------------------------------------------------------------------

# Instructions without an answer and dialogues with an empty first one are left out.
SOURCE_COUNTS = {
    "alpaca": {"all": 4998},
    "beavertails_unsafe_qa": {"all": 524},
    "beavertails_unsafe_test": {"all": 100},
    "codealpaca": {"all": 6550},
    "gsm8k": {"test": 1319, "train": 7473},
    "hh_rlhf": {"test": 2309},
    "legalbench": {"test": 27096, "train": 835},
    "medmcqa": {"dev": 4183},
    "medqa": {"test": 1273},
    "safety_tuned_llamas": {"all": 2483},
}
COUNTS = {
    "advbench": {"all": 520},
    "alpaca_harmless": {"test": 6266, "val": 6264},
    "beavertails_prompts": {"eval": 250, "test": 3021},
    "catqa": {"all": 550},
    "harmbench": {"all": 400, "test": 320, "val": 80},
    "harmbench_contextual": {"all": 100},
    "harmbench_copyright": {"all": 100},
    "harmbench_standard": {"all": 200},
    "humaneval": {"all": 164},
    "jailbreakbench": {"benign": 100, "harmful": 100},
    "jailbreakbench_artifacts": {"all": 286},
    "legalbench": {"test": 27046},
    "medqa": {"test": 1273},
    "mmlu": {"dev": 285, "test": 14042, "val": 1542},
    "mtbench": {"all": 80},
    "safety_tuned_questions": {"I-CoNa": 178, "I-MaliciousInstructions": 100},
    "truthfulqa": {"current": 817, "v0": 817},
    "truthfulqa_mc1": {"current": 817, "v0": 817},
    "truthfulqa_mc2": {"current": 817, "v0": 817},
    "xstest": {"safe": 250, "unsafe": 200},
    "xstest_completions": {"all": 2250},
}


@needs_data
@pytest.mark.parametrize("name", SOURCE_COUNTS)
def test_counts_of_the_real_pairs(name):
    for split, count in SOURCE_COUNTS[name].items():
        pairs = load_source(name, DATA, split=split)
        assert len(pairs) == count
        assert sum(not p.prompt.strip() or not p.answer.strip() for p in pairs) == 0
        assert sum("{{" in p.prompt for p in pairs if name == "legalbench") == 0


@needs_data
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_real_items(name):
    for split, count in COUNTS[name].items():
        items = load_evalset(name, DATA, split=split)
        assert len(items) == count
        assert len({item.id for item in items}) == len(items)
        if name in ("harmbench", "advbench"):
            assert sum(not item.target for item in items) == 0
        if name == "mmlu":
            assert len({item.group for item in items}) == 57


@needs_data
def test_the_labelled_answers_have_both_verdicts():
    items = load_evalset("xstest_completions", DATA)
    verdicts = collections.Counter(item.verdict for item in items)
    assert verdicts == {"compliance": 1091, "refusal": 983, "partial refusal": 176}
    assert sum(item.harmful_prompt for item in items) == 1000


# --- mistakes -------------------------------------------------------------------------

TRAIN = "legalbench/tasks/toy/train.tsv"
BEHAVIOURS = files.as_table(rows.BEHAVIOURS)
NO_ROW, TYPED = "at least one row, got none", "options with 0 or 1"
FAULTS = {
    ("gsm8k", "gsm8k/train.jsonl"): [
        (None, r"gsm8k/train.jsonl .*found none: put .*, or name another"),
        ("", NO_ROW),
        (
            files.as_lines(rows.GSM8K) + '\n{"question": "half',
            r"JSON in .*, row 4.*Unterm",
        ),
        ([{"question": "a secret sentence"}], "row 1: .* 'answer', got question"),
        (
            [{"question": "2 + 2?", "reply": "4", "a secret sentence": "4"}],
            r"row 1: .* 'answer', got question, reply, 1 l",
        ),
    ],
    ("alpaca", "alpaca/alpaca_5000.json"): [
        ([], NO_ROW),
        ('[{"instruction": 1},\n{', r"expected JSON in .* at line 2"),
    ],
    ("legalbench", TRAIN): [
        (None, r"legalbench \(train\).*at least one row"),
        ("index\tanswer\ttext\n0\tyes\tb\n1\tno\n", "row 2: expected 3 cells, got 2"),
        ("index\tanswer\tquestion\n0\tyes\tb\n", "header: expected a column 'text'"),
        ("index\treply\ttext\n0\tyes\tb\n", "'answer' or 'label'"),
    ],
    ("legalbench", "legalbench/tasks/x/train.tsv"): [("a\n", r"base_prompt\.txt")],
    ("medqa", "medqa/phrases_no_exclude_test.jsonl"): [
        ([rows.MEDQA[0] | {"answer_idx": "E"}], "row 1, column 'answer_idx'"),
        ([rows.MEDQA[0] | {"options": {"A": "w"}}], "row 1, column 'options'"),
    ],
    ("medmcqa", "medmcqa/dev.json"): [
        (
            files.as_lines([rows.MEDMCQA[0], rows.MEDMCQA[0] | {"cop": cop}]),
            r"row 2, column 'cop'.*counts from 0",
        )
        for cop in (0, 5, True)
    ],
    ("beavertails", "beavertails/30k_train.jsonl"): [
        ([rows.BEAVERTAILS[0] | {"is_safe": "perhaps"}], "row 1, column 'is_safe'")
    ],
    ("beavertails_unsafe", "beavertails/30k_train.jsonl"): [
        (rows.BEAVERTAILS[:1], "at least one item .* none in 1 rows")
    ],
    ("hh_rlhf", "hh_rlhf/harmless-base-test.jsonl"): [
        ([{"chosen": "Hello."}], "row 1, column 'chosen'")
    ],
    ("harmbench", "harmbench/harmbench_targets_text.json"): [
        ({}, "row 1, column 'BehaviorID'"),
        ([], "targets by BehaviorID"),
    ],
    ("jailbreakbench_artifacts", "jailbreakbench/artifact_x.json"): [
        (None, "recorded attacks"),
        ([], "expected a column 'parameters'"),
    ],
    ("advbench", "advbench/harmful_behaviors.csv"): [
        ("goal\nx\n", "column 'target'"),
    ],
    ("catqa", "catqa/catqa_english.json"): [
        ([1], "category and subcategory"),
        ({"W": {"L": "Who?"}}, "lists of q"),
    ],
    ("xstest", "xstest/xstest_prompts.csv"): [("id,prompt\n1,x\n", "'type'")],
    ("safety_tuned_questions", "safety_tuned_llamas/I-MaliciousInstructions.json"): [
        ({"instructions": "Who?"}, "a list of texts, got a text of 4"),
    ],
    ("mmlu", "mmlu/test/a_test.csv"): [
        (None, NO_ROW),
        ("Q,1,2,3,4,E\n", "row 1, column 'answer'"),
        ("Q,1,2,3,A\n", "expected 6 cells, got 5"),
    ],
    ("truthfulqa_mc1", "truthfulqa/mc_task.json"): [
        (
            [rows.TASKS[0] | {"mc1_targets": {"a": 1, "b": 1}}],
            "exactly one right option",
        ),
        ([rows.TASKS[0] | {"mc1_targets": {"a": True, "b": False}}], TYPED),
    ],
    ("truthfulqa_mc2", "truthfulqa/mc_task.json"): [
        ([rows.TASKS[0] | {"mc2_targets": {"a": 0}}], "of which one has 1"),
    ],
    ("mtbench", "mtbench/question.jsonl"): [
        ([rows.MTBENCH[0] | {"turns": []}], "at least one question"),
        ([rows.MTBENCH[0] | {"turns": "Go."}], "'turns': expected a list of texts"),
    ],
    ("bbq", "bbq/Age.jsonl"): [
        (
            [rows.bias(answer_info={"ans0": "o", "ans1": ["x"], "ans2": ["y"]})],
            "lists of labels",
        )
    ],
}
CASES = [(*key, *fault) for key, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("name", "path", "value", "said"), CASES)
def test_files_that_are_not_as_published_are_named_in_one_line(
    name, path, value, said, tmp_path
):
    beside = {"harmbench/harmbench_behaviors_text_all.csv": BEHAVIOURS}
    if path == TRAIN and value:
        beside = files.LEGALBENCH
    files.save(tmp_path, beside if value is None else {**beside, path: value})
    load = load_source if name in SOURCES else load_evalset
    with pytest.raises(UserError, match=said) as error:
        load(name, tmp_path, split="Age" if name == "bbq" else None)
    assert str(tmp_path) in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("load", "name", "split", "said"),
    [
        (load_source, "gsm8", None, "unknown data set 'gsm8'; nearest: gsm8k"),
        (load_source, "gsm8k", "dev", r"unknown split of gsm8k 'dev'.*train, test"),
        (load_evalset, "mmlo", None, "unknown evaluation set 'mmlo'; nearest: mmlu"),
        (load_evalset, "mmlu", "train", "unknown split of mmlu 'train'"),
        (load_source, "gsm8k", None, "expected a folder with data sets"),
        (load_evalset, "mmlu", None, "expected a folder with data sets"),
    ],
)
def test_unknown_names_splits_and_folders(load, name, split, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load(name, tmp_path / "nowhere", split=split)
