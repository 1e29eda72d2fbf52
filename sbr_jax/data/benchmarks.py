"""Turns rows of questions, code tasks and dialogues into items.

The table of sets is :data:`sbr_jax.data.registry.EVALSETS`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sbr_jax.data import domains
from sbr_jax.data._rows import Row
from sbr_jax.data.readers import filled, find_all, table_rows
from sbr_jax.data.records import ChoiceItem, CodeItem, DialogueItem, QuestionItem

MOST_LABELS = 12
"""A LegalBench task with more distinct answers asks for text, not for a label."""


def truthfulqa(row: Row) -> QuestionItem:
    """A question with reference answers, which semicolons separate."""

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


def truthful_task(column: str) -> Callable[[Row], ChoiceItem]:
    """A reader for one task: ``"mc1_targets"`` has one right option, the other several.

    The files list the right options first.
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


def mmlu_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The headerless tables of all subjects, which are named in the file names."""
    pattern = files[0].replace("SPLIT", split)
    columns = ("question", *"ABCD", "answer")
    rows = (
        row.with_cells(subject=path.name.partition(f"_{split}.csv")[0])
        for path in find_all(folder, pattern)
        # One published question ends with an unopened quotation mark.
        for row in table_rows(path, columns=columns, lone_quotes=True)
    )
    return filled(str(folder / pattern), rows)


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


def medqa(row: Row) -> ChoiceItem:
    """A question with the options A to D."""
    choices, letter = domains.medqa_options(row)
    return ChoiceItem(
        question=row.text("question").strip(),
        choices=tuple(choice.strip() for choice in choices),
        correct=("ABCD".index(letter),),
        id=str(row.number),
    )


def legalbench_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The rows of the tasks that ask for a label, each with its task's label set.

    The files do not say which tasks ask for labels. A task counts if its rows hold 2 to
    12 different answers, each twice on average. Of the published tests only ``rule_qa``
    fails that.
    """
    answers: dict[str, Counter[str]] = {}
    rows = []
    for row in domains.legalbench_rows(folder, split, files):
        if answer := domains.legalbench(row).answer:
            answers.setdefault(row.get("task"), Counter())[answer] += 1
            rows.append(row.with_cells(target=answer))
    labels = {
        task: tuple(sorted(counts))
        for task, counts in answers.items()
        if 2 <= len(counts) <= min(MOST_LABELS, counts.total() // 2)
    }
    return filled(
        f"{folder / 'legalbench'} ({split}, tasks with labels)",
        (
            r.with_cells(labels=labels[t])
            for r in rows
            if (t := r.get("task")) in labels
        ),
    )


def legalbench(row: Row) -> ChoiceItem:
    """A filled template, without its solved examples, and its task's labels."""
    labels, task = row.texts("labels"), row.text("task")
    return ChoiceItem(
        question=row.text("prompt").strip(),
        choices=labels,
        correct=(labels.index(row.text("target")),),
        id=f"{task}/{row.number}",
        group=task,
    )


def humaneval(row: Row) -> CodeItem:
    """A function to complete; blanks are kept."""
    return CodeItem(
        prompt=row.text("prompt"),
        entry_point=row.text("entry_point"),
        solution=row.text("canonical_solution"),
        test=row.text("test"),
        id=row.text("task_id"),
    )


def mtbench(row: Row) -> DialogueItem:
    """A dialogue of two turns."""
    turns = row.texts("turns")
    if not turns:
        raise row.fault("turns", "at least one question")
    return DialogueItem(
        turns=turns,
        id=row.identity("question_id"),
        group=row.text("category"),
    )
