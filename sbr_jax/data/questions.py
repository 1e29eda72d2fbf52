"""Questions, code tasks and dialogues: rows of the published files, and their items.

The table of files is in :mod:`sbr_jax.data.evalsets`.
"""

from collections.abc import Callable
from pathlib import Path

from sbr_jax.data.readers import (
    filled,
    find,
    find_all,
    json_rows,
    jsonl_rows,
    table_rows,
)
from sbr_jax.data.records import ChoiceItem, CodeItem, DialogueItem, QuestionItem
from sbr_jax.data.rows import Row


def truthfulqa_rows(folder: Path, split: str) -> list[Row]:
    """The table of questions and reference answers."""
    end = "_v0" if split == "v0" else ""
    return table_rows(find(folder / "truthfulqa", f"TruthfulQA{end}.csv"))


def truthfulqa(row: Row) -> QuestionItem:
    """A question with answers, which are separated by semicolons."""

    def answers(column: str) -> tuple[str, ...]:
        parts = (part.strip() for part in row.text(column).split(";"))
        return tuple(part for part in parts if part)

    return QuestionItem(
        prompt=row.text("Question").strip(),
        best=row.text("Best Answer").strip(),
        correct=answers("Correct Answers"),
        incorrect=answers("Incorrect Answers"),
        id=str(row.number),
        group=row.text("Category"),
    )


def truthful_task_rows(folder: Path, split: str) -> list[Row]:
    """The multiple-choice tasks."""
    end = "_v0" if split == "v0" else ""
    return json_rows(find(folder / "truthfulqa", f"mc_task{end}.json"))


def truthful_task(column: str) -> Callable[[Row], ChoiceItem]:
    """The item of one task: ``"mc1_targets"`` has one right option, the other several.

    In the files the right options come first; see
    :func:`sbr_jax.data.records.shuffled`.
    """

    def item(row: Row) -> ChoiceItem:
        targets = row.get(column)
        labels = list(targets.values()) if isinstance(targets, dict) else []
        whole = all(type(label) is int and label in (0, 1) for label in labels)
        if 1 not in labels or not whole:
            raise row.fault(column, "options with 0 or 1, of which one has 1")
        if column == "mc1_targets" and sum(labels) != 1:
            raise row.fault(column, "exactly one right option")
        return ChoiceItem(
            question=row.text("question").strip(),
            choices=tuple(targets),
            correct=tuple(i for i, label in enumerate(labels) if label),
            id=str(row.number),
        )

    return item


def mmlu_rows(folder: Path, split: str) -> list[Row]:
    """The headerless tables of all subjects, which the files' names tell."""
    root = folder / "mmlu" / split
    end = f"_{split}.csv"
    files = find_all(root, f"*{end}")
    columns = ("question", *"ABCD", "answer")
    return filled(
        str(root),
        (
            row.with_cells(subject=path.name.partition(end)[0])
            for path in files
            # One published question ends with a quotation mark that nothing opens.
            for row in table_rows(path, columns=columns, lone_quotes=True)
        ),
    )


def mmlu(row: Row) -> ChoiceItem:
    """A question with four options."""
    letters = "ABCD"
    subject = row.text("subject")
    return ChoiceItem(
        question=row.text("question").strip(),
        choices=tuple(row.text(letter, empty=True).strip() for letter in letters),
        correct=(letters.index(row.option("answer", tuple(letters))),),
        id=f"{subject}/{row.number}",
        group=subject,
    )


def humaneval_rows(folder: Path, split: str) -> list[Row]:
    """The tasks of HumanEval."""
    del split
    return jsonl_rows(find(folder / "humaneval", "HumanEval.jsonl"))


def humaneval(row: Row) -> CodeItem:
    """A function to complete; blanks are kept."""
    return CodeItem(
        prompt=row.text("prompt"),
        entry_point=row.text("entry_point"),
        solution=row.text("canonical_solution"),
        test=row.text("test"),
        id=row.text("task_id"),
    )


def mtbench_rows(folder: Path, split: str) -> list[Row]:
    """Questions with GPT-4's reference answers, where that file is there."""
    del split
    root = folder / "mtbench"
    rows = jsonl_rows(find(root, "question.jsonl"))
    references = {}
    for path in find_all(root, "reference_answer_gpt-4.jsonl"):
        for row in jsonl_rows(path):
            choices = row.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            if not isinstance(first, dict):
                raise row.fault("choices", "a list of answers")
            answer = row.with_cells(turns=first.get("turns"))
            references[row.identity("question_id")] = answer.texts("turns")
    return [
        row.with_cells(references=references.get(row.identity("question_id"), []))
        for row in rows
    ]


def mtbench(row: Row) -> DialogueItem:
    """A dialogue of two turns."""
    turns = row.texts("turns")
    if not turns:
        raise row.fault("turns", "at least one question")
    return DialogueItem(
        turns=turns,
        id=row.identity("question_id"),
        group=row.text("category"),
        references=row.texts("references"),
    )
