"""MedQA, LegalBench, recorded attacks, harmless instructions, judge prompts: files."""

import pytest
import tiny_data as files
from tiny_data import needs_data

from sbr_jax.data import judge_prompts, load_evalset
from sbr_jax.typing import UserError

DATA = files.DATA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("data"))


def test_recorded_attacks_keep_only_what_was_submitted(folder, tmp_path):
    first, third = load_evalset("jailbreakbench_artifacts", folder)
    assert (first.id, first.group) == ("PAIR/toy-7b/0", "PAIR/toy-7b")
    assert [i.harmful_response for i in (first, third)] == [True, False]
    assert (third.id, third.prompt, third.response) == ("PAIR/toy-7b/2", "Blame!", "")
    path = tmp_path / "jailbreakbench/attack-artifacts/PAIR/black_box/toy-7b.json"
    files.put(path, files.as_json(files.ARTIFACT))
    assert load_evalset("jailbreakbench_artifacts", tmp_path) == [first, third]
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a column 'parameters'"):
        load_evalset("jailbreakbench_artifacts", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="recorded attacks"):
        load_evalset("jailbreakbench_artifacts", tmp_path)


def test_harmless_instructions_should_not_be_refused(folder):
    items = load_evalset("alpaca_harmless", folder)
    assert [(i.prompt, i.id, i.harmful) for i in items] == [
        ("Say a", "1", False),
        ("Say b", "2", False),
    ]


def test_medqa_and_legalbench_have_options(folder, tmp_path):
    (item,) = load_evalset("medqa", folder)
    assert (item.choices, item.correct) == (("w", "x", "y", "z"), (1,))
    items = load_evalset("legalbench", folder)
    assert [i.choices[i.answer] for i in items] == ["no", "yes", "no", "yes"]
    assert {i.choices for i in items} == {("no", "yes")}
    assert (items[1].id, items[1].group) == ("pick/2", "pick")
    assert items[1].question == "Is it?\n\nQ: c1\nA:"
    # Tasks whose answers are texts are no choice among labels.
    root = tmp_path / "legalbench"
    files.put(root / "tasks/open/base_prompt.txt", "{{text}}")
    rows = [{"text": str(i), "label": f"because {i}"} for i in range(4)]
    files.put(root / "test/open.tsv", files.as_table(rows, delimiter="\t"))
    with pytest.raises(UserError, match="tasks with labels"):
        load_evalset("legalbench", tmp_path)
    files.put(root / "tasks/pick/base_prompt.txt", "{{text}}")
    files.put(root / "test/pick.tsv", files.as_table(files.LABELS, delimiter="\t"))
    assert {i.group for i in load_evalset("legalbench", tmp_path)} == {"pick"}


def test_judge_prompts_are_filled_in_one_pass(folder, tmp_path):
    (prompt,) = judge_prompts.load_judge_prompts(folder).values()
    assert prompt.cells == ("question", "answer")
    system, user = prompt.messages({"question": "{answer}?", "answer": "{x}"})
    assert (system["content"], user["role"]) == ("Judge.", "user")
    assert user["content"] == "[Question]\n{answer}?\n[Answer]\n{x}"
    with pytest.raises(UserError, match="got no answer"):
        prompt.messages({"question": "?"})
    with pytest.raises(UserError, match=r"judge_prompts\.jsonl"):
        judge_prompts.load_judge_prompts(tmp_path)
    changed = files.as_lines([files.JUDGE_PROMPTS[0] | {"type": "triple"}])
    files.put(tmp_path / "mtbench/judge_prompts.jsonl", changed)
    with pytest.raises(UserError, match="row 1, column 'type'"):
        judge_prompts.load_judge_prompts(tmp_path)


@needs_data
def test_the_real_judge_prompts_are_read():
    found = judge_prompts.load_judge_prompts(DATA)
    assert len(found) == 8
    assert {prompt.kind for prompt in found.values()} == {"single", "pairwise"}
    assert found["single-v1"].cells == ("question", "answer")
    assert "ref_answer_1" in found["single-math-v1"].cells
