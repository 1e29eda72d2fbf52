"""Evaluation sets in every published layout, and every mistake in their files."""

import dataclasses

import pytest
import tiny_data as files
import tiny_rows

from sbr_jax.data import evalsets, load_evalset
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
from sbr_jax.typing import UserError

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
ABSENT = {
    ("harmbench_copyright", "test"),
    ("harmbench_standard", "val"),
    ("harmbench_contextual", "val"),
}
"""Splits without a row: the small file has none of that kind."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", sorted(evalsets.EVALSETS))
def test_every_set_is_read_from_its_published_files(name, folder):
    for split in evalsets.EVALSETS[name].splits:
        if (name, split) in ABSENT:
            continue
        items = load_evalset(name, folder, split=split)
        assert {type(item) for item in items} == {KINDS.get(name, BehaviourItem)}
        assert all(item.prompt.strip() and item.id for item in items)
        if split == evalsets.EVALSETS[name].splits[0]:
            assert load_evalset(name, folder) == items


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
        files.put(path, files.as_table(tiny_rows.JBB))
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
        parquet.write_table(pyarrow.Table.from_pylist(tiny_rows.WILDGUARD), path)
    else:
        writer = files.as_table if ending == "csv" else files.as_lines
        files.put(path, writer(tiny_rows.WILDGUARD))
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
