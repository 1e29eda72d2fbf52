"""Evaluation sets: every layout, every mistake, and the real counts.

Of real rows only shapes, labels and counts are looked at, never text.
"""

import collections
import dataclasses

import pytest
import tiny_data as files

from sbr_jax.data import bbq, evalsets, hub, load_evalset
from sbr_jax.data.records import (
    BehaviourItem,
    BiasItem,
    ChoiceItem,
    CodeItem,
    DialogueItem,
    JudgedItem,
    QuestionItem,
    shuffled,
)
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError

DATA = files.DATA
COUNTS = {
    ("advbench", "all"): 520,
    ("alpaca_harmless", "test"): 6266,
    ("alpaca_harmless", "val"): 6264,
    ("bbq", "all"): 58492,
    ("beavertails_prompts", "eval"): 250,
    ("beavertails_prompts", "test"): 3021,
    ("catqa", "all"): 550,
    ("harmbench", "all"): 400,
    ("harmbench", "test"): 320,
    ("harmbench", "val"): 80,
    ("harmbench_contextual", "all"): 100,
    ("harmbench_copyright", "all"): 100,
    ("harmbench_standard", "all"): 200,
    ("humaneval", "all"): 164,
    ("jailbreakbench", "benign"): 100,
    ("jailbreakbench", "harmful"): 100,
    ("jailbreakbench_artifacts", "all"): 286,
    ("legalbench", "test"): 27046,
    ("medqa", "test"): 1273,
    ("mmlu", "dev"): 285,
    ("mmlu", "test"): 14042,
    ("mmlu", "val"): 1542,
    ("mtbench", "all"): 80,
    ("safety_tuned_questions", "I-CoNa"): 178,
    ("safety_tuned_questions", "I-MaliciousInstructions"): 100,
    ("truthfulqa", "current"): 817,
    ("truthfulqa", "v0"): 817,
    ("truthfulqa_mc1", "current"): 817,
    ("truthfulqa_mc1", "v0"): 817,
    ("truthfulqa_mc2", "current"): 817,
    ("truthfulqa_mc2", "v0"): 817,
    ("xstest", "safe"): 250,
    ("xstest", "unsafe"): 200,
    ("xstest_completions", "all"): 2250,
}
KINDS = {
    "bbq": BiasItem,
    "humaneval": CodeItem,
    "jailbreakbench_artifacts": JudgedItem,
    "legalbench": ChoiceItem,
    "medqa": ChoiceItem,
    "mmlu": ChoiceItem,
    "mtbench": DialogueItem,
    "truthfulqa": QuestionItem,
    "truthfulqa_mc1": ChoiceItem,
    "truthfulqa_mc2": ChoiceItem,
    "wildguardtest": JudgedItem,
    "xstest_completions": JudgedItem,
}
TARGETS = [
    {
        "question": row["question"],
        **{
            name: {"choices": list(row[name]), "labels": list(row[name].values())}
            for name in ("mc1_targets", "mc2_targets")
        },
    }
    for row in files.TASKS
]
HUB_ROWS = {
    "advbench": [
        {"prompt": row["goal"], "target": row["target"]} for row in files.GOALS
    ],
    "bbq": files.BBQ * len(files.BBQ_CATEGORIES),
    "catqa": [
        {"Category": "Words", "Subcategory": sub, "Question": question}
        for sub, questions in files.CATQA["Words"].items()
        for question in questions
    ],
    "humaneval": files.HUMANEVAL,
    "jailbreakbench": files.JBB,
    "medqa": files.MEDQA,
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
        for row in files.MTBENCH
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
    "wildguardtest": files.WILDGUARD,
    "xstest": files.XSTEST,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", sorted(evalsets.EVALSETS))
def test_every_set_is_read_from_its_published_files(name, folder):
    for split in evalsets.EVALSETS[name].splits:
        if (name, split) in {("harmbench_copyright", "test"), *NOT_IN_VAL}:
            continue  # The small file has none of that kind.
        items = load_evalset(name, folder, split=split)
        assert {type(item) for item in items} == {KINDS.get(name, BehaviourItem)}
        assert all(item.prompt.strip() and item.id for item in items)
        if split == evalsets.EVALSETS[name].splits[0]:
            assert load_evalset(name, folder) == items


NOT_IN_VAL = {("harmbench_standard", "val"), ("harmbench_contextual", "val")}


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


def test_official_names_of_jailbreakbench_are_read_too(tmp_path):
    for name in ("harmful", "benign"):
        path = tmp_path / f"jailbreakbench/{name}-behaviors.csv"
        files.put(path, files.as_table(files.JBB))
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
        parquet.write_table(pyarrow.Table.from_pylist(files.WILDGUARD), path)
    else:
        writer = files.as_table if ending == "csv" else files.as_lines
        files.put(path, writer(files.WILDGUARD))
    assert load_evalset("wildguardtest", path) == load_evalset("wildguardtest", folder)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"mine\."):
        load_evalset("wildguardtest", path)
    with pytest.raises(UserError, match="csv, tsv, json, jsonl or parquet"):
        load_evalset("wildguardtest", files.put(tmp_path / "mine.txt", "x"))


def test_truthfulqa_has_one_or_several_right_options(folder):
    (one,) = load_evalset("truthfulqa_mc1", folder)
    (several,) = load_evalset("truthfulqa_mc2", folder, split="v0")
    assert (one.choices, one.correct) == (("No", "Yes"), (0,))
    assert (several.choices, several.correct) == (("No", "Rock", "Yes"), (0, 1))
    (question,) = load_evalset("truthfulqa", folder)
    assert question.correct == ("No", "It is rock")
    assert question.incorrect == ("Yes", "Partly")


def test_mmlu_tells_the_subject_and_fits_no_header(folder):
    items = load_evalset("mmlu", folder)
    assert [item.group for item in items] == ["more_sums", "sums"]
    assert items[0] == ChoiceItem(
        "2 + 2?", ("3", "4", "5", "6"), (1,), "more_sums/1", "more_sums"
    )


def test_dialogues_have_references_only_where_there_are_some(folder):
    writing, math = load_evalset("mtbench", folder)
    assert (writing.references, math.references) == ((), ("1", "1, 2"))
    (code,) = load_evalset("humaneval", folder)
    assert code.prompt.endswith(":\n    ")
    scope: dict = {}
    exec(code.prompt + code.solution.lstrip() + code.test, scope)
    scope["check"](scope[code.entry_point])


def test_shuffling_moves_the_right_options_along():
    item = ChoiceItem("Which?", tuple("abcdefgh"), (0, 1), "1")
    found = {shuffled(dataclasses.replace(item, id=str(i))).answer for i in range(40)}
    assert len(found) > 3
    for seed in range(5):
        other = shuffled(item, seed)
        assert {other.choices[i] for i in other.correct} == {"a", "b"}
        assert sorted(other.choices) == sorted(item.choices)
        assert other == shuffled(item, seed)


# --- BBQ ------------------------------------------------------------------------------


def item(**changes):
    return bbq.bbq_item(Row("toy", 1, files.bias(**changes)))


def test_the_biased_answer_turns_with_the_question():
    assert (item().stereotyped, item().biased, item().unknown) == (0, 0, 2)
    other = item(question_polarity="nonneg")
    assert (other.stereotyped, other.biased) == (0, 1)
    assert item().ambiguous
    assert not item(context_condition="disambig", label=0).ambiguous


@pytest.mark.parametrize(
    ("labels", "groups", "expected"),
    [
        (("lowSES", "highSES"), ["low SES"], 0),
        (("nonDisabled", "disabled"), ["disabled", "D/deaf"], 1),
        (("F-Black", "M-Asian"), ["Black", "African American"], 0),
        (("man", "woman"), ["F"], 1),
        (("trans_F", "nonTrans_M"), ["trans", "Transgender women"], 0),
        (("nonTrans", "trans"), ["trans"], 1),
        (("F-Black", "M-Black"), ["Black"], None),
        (("girl", "woman"), ["F"], None),
        (("x", "y"), ["z"], None),
    ],
)
def test_the_stereotyped_option_is_the_only_one_of_the_group(labels, groups, expected):
    info = {
        "ans0": ["somebody", labels[0]],
        "ans1": ["somebody", labels[1]],
        "ans2": ["Unknown", "unknown"],
    }
    found = item(answer_info=info, additional_metadata={"stereotyped_groups": groups})
    assert found.stereotyped == expected
    assert (found.biased is None) == (expected is None)


def test_nationalities_are_matched_by_the_options_words():
    info = {
        "ans0": ["Unknown", "unknown"],
        "ans1": ["Malian", "Africa"],
        "ans2": ["French", "Europe"],
    }
    groups = {"stereotyped_groups": ["Nigerian", "Malian"]}
    found = item(answer_info=info, additional_metadata=groups, label=0)
    assert (found.unknown, found.stereotyped) == (0, 1)


def test_an_empty_answer_info_is_survived():
    info = files.bias()["answer_info"]
    found = item(answer_info=info | {"ans2": []})
    assert (found.unknown, found.stereotyped) == (2, 0)
    found = item(answer_info=info | {"ans1": []})
    assert (found.unknown, found.stereotyped) == (2, 0)
    # The group's own option without labels: nobody is the stereotyped one.
    assert item(answer_info=info | {"ans0": []}).stereotyped is None


def test_rows_without_one_undecided_option_are_refused():
    info = files.bias()["answer_info"]
    for change in ({"ans2": ["both", "both"]}, {"ans1": ["Unknown", "unknown"]}):
        with pytest.raises(UserError, match=r"toy, row 1, .* labelled 'unknown', got"):
            item(answer_info=info | change)
    with pytest.raises(UserError, match="'label': expected the undecided option"):
        item(label=0)
    with pytest.raises(UserError, match="'label': expected one of the two people"):
        item(context_condition="disambig")
    with pytest.raises(UserError, match=r"'label': .* from 0 to 2"):
        item(label=3)
    with pytest.raises(UserError, match="stereotyped_groups"):
        item(additional_metadata={})


def test_regenerated_categories_are_marked(folder):
    marked = {i.category for i in load_evalset("bbq", folder) if i.regenerated}
    files_of = {"SES": True, "Age": False}
    for category, expected in files_of.items():
        items = load_evalset("bbq", folder, split=category)
        assert {i.regenerated for i in items} == {expected}
    assert marked
    count = {
        split: len(load_evalset("bbq", folder, split=split))
        for split in ("all", "single", "intersectional")
    }
    assert count == {"all": 22, "single": 18, "intersectional": 4}


# --- the hub --------------------------------------------------------------------------


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
    asked = files.fake_hub(monkeypatch, files.JBB)
    (benign,) = load_evalset("jailbreakbench", split="benign")
    assert not benign.harmful
    assert asked[-1][3] == "benign"
    files.fake_hub(monkeypatch, files.XSTEST)
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


# --- mistakes -------------------------------------------------------------------------


def test_unknown_names_and_splits(folder):
    with pytest.raises(UserError, match="unknown evaluation set 'mmlo'; nearest: mmlu"):
        load_evalset("mmlo", folder)
    with pytest.raises(UserError, match="unknown split of mmlu 'train'"):
        load_evalset("mmlu", folder, split="train")
    with pytest.raises(UserError, match="expected a folder"):
        load_evalset("mmlu", folder / "nowhere")


@pytest.mark.parametrize(
    ("name", "path", "text", "message"),
    [
        ("mmlu", "mmlu/test/a_test.csv", "Q,1,2,3,4,E\n", "row 1, column 'answer'"),
        ("mmlu", "mmlu/test/a_test.csv", "Q,1,2,3,A\n", "expected 6 cells, got 5"),
        ("mmlu", "mmlu/none.csv", "", "at least one row, got none"),
        ("advbench", "advbench/harmful_behaviors.csv", "goal\nx\n", "column 'target'"),
        ("advbench", "advbench/harmful_behaviors.csv", "goal,target\n", "one row"),
        ("catqa", "catqa/catqa_english.json", "[1]", "category and subcategory"),
        ("xstest", "xstest/xstest_prompts.csv", "id,prompt\n1,x\n", "'type'"),
        ("truthfulqa_mc1", "truthfulqa/mc_task.json", '[{"question": "x", '
         '"mc1_targets": {"a": 1, "b": 1}}]', "exactly one right option"),
        ("truthfulqa_mc2", "truthfulqa/mc_task.json", '[{"question": "x", '
         '"mc2_targets": {"a": 0}}]', "of which one has 1"),
        ("mtbench", "mtbench/question.jsonl",
         '{"question_id": 1, "category": "x", "turns": []}', "at least one question"),
        ("safety_tuned_questions", "safety_tuned_llamas/I-MaliciousInstructions.json",
         '{"instructions": [1]}', "a list of texts"),
    ],
)  # fmt: skip
def test_rows_that_are_not_as_published_are_named(name, path, text, message, tmp_path):
    files.put(tmp_path / path, text)
    with pytest.raises(UserError, match=message) as error:
        load_evalset(name, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_harmbench_wants_a_target_for_every_behaviour(tmp_path):
    files.evalsets(tmp_path)
    path = tmp_path / "harmbench/harmbench_targets_text.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="row 1, column 'BehaviorID'"):
        load_evalset("harmbench", tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="targets by BehaviorID"):
        load_evalset("harmbench", tmp_path)


# --- the real files -------------------------------------------------------------------

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside us")


@needs_data
@pytest.mark.parametrize("key", sorted(set(COUNTS) - {("bbq", "all")}), ids="-".join)
def test_counts_of_the_real_files(key):
    items = load_evalset(key[0], DATA, split=key[1])
    assert len(items) == COUNTS[key]
    assert len({item.id for item in items}) == len(items)
    if key[0] in ("harmbench", "advbench"):
        assert sum(not item.target for item in items) == 0
    if key[0] == "mmlu":
        assert len({item.group for item in items}) == 57


@needs_data
def test_bbq_says_who_is_stereotyped_wherever_its_labels_do():
    items = load_evalset("bbq", DATA)
    assert len(items) == COUNTS["bbq", "all"]
    made = collections.Counter(i.category for i in items if i.regenerated)
    assert sum(made.values()) == 46536
    assert len(made) == 5
    open_ = collections.Counter(i.category for i in items if i.stereotyped is None)
    assert {name: n for name, n in open_.items() if name in bbq.SINGLE} == {
        "Gender_identity": 20,
        "Race_ethnicity": 16,
    }
    assert all(i.stereotyped != i.unknown and i.biased != i.unknown for i in items)
    # Names are drawn for both sides alike, so neither position is preferred.
    named = [i for i in items if i.stereotyped is not None]
    by_place = collections.Counter(i.stereotyped for i in named)
    assert max(by_place.values()) / len(named) < 0.40


@needs_data
def test_the_labelled_answers_have_both_verdicts():
    items = load_evalset("xstest_completions", DATA)
    verdicts = collections.Counter(item.verdict for item in items)
    expected = {"compliance": 1091, "refusal": 983, "partial refusal": 176}
    assert verdicts == expected
    assert sum(item.harmful_prompt for item in items) == 1000
