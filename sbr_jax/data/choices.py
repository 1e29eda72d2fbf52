"""MedQA and LegalBench as questions with options.

The files are those of the training sets (:mod:`sbr_jax.data.sources`), and are read by
the same readers. The table of files is in :mod:`sbr_jax.data.evalsets`.

References: arXiv:2009.13081 (MedQA), arXiv:2308.11462 (LegalBench).
"""

from collections import Counter
from pathlib import Path

from sbr_jax.data.readers import filled
from sbr_jax.data.records import ChoiceItem
from sbr_jax.data.rows import Row
from sbr_jax.data.sources import SOURCES

MOST_LABELS = 12
"""A task with more answers than this asks for text, not for a label."""


def medqa_rows(folder: Path, split: str) -> list[Row]:
    """The US questions with four options."""
    return SOURCES["medqa"].rows(folder, split)


def medqa(row: Row) -> ChoiceItem:
    """A question with the options A to D."""
    SOURCES["medqa"].pair(row)  # Refuses rows that are not as published.
    options = row.get("options")
    return ChoiceItem(
        question=row.text("question").strip(),
        choices=tuple(options[letter].strip() for letter in "ABCD"),
        correct=("ABCD".index(row.get("answer_idx")),),
        id=str(row.number),
    )


def legalbench_rows(folder: Path, split: str) -> list[Row]:
    """The rows of the tasks that ask for a label, each with its task's label set.

    The files do not say which tasks those are: a task is taken whose rows hold 2 to 12
    different answers, each twice on average. Of the published tests only ``rule_qa``
    fails that.
    """
    rows = []
    for row in SOURCES["legalbench"].rows(folder, split):
        pair = SOURCES["legalbench"].pair(row)
        if pair is not None and pair.answer:
            task = Path(row.where).name.partition(".")[0]
            rows.append(row.with_cells(task=task, target=pair.answer))
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(row.get("task"), Counter())[row.get("target")] += 1
    labels = {
        task: tuple(sorted(counts))
        for task, counts in answers.items()
        if 2 <= len(counts) <= min(MOST_LABELS, counts.total() // 2)
    }
    return filled(
        f"{folder / 'legalbench'} ({split}, tasks with labels)",
        (
            row.with_cells(labels=labels[row.get("task")])
            for row in rows
            if row.get("task") in labels
        ),
    )


def legalbench(row: Row) -> ChoiceItem:
    """A filled template, without its solved examples, and its task's labels."""
    labels = row.texts("labels")
    task = row.text("task")
    return ChoiceItem(
        question=row.text("prompt").strip(),
        choices=labels,
        correct=(labels.index(row.text("target")),),
        id=f"{task}/{row.number}",
        group=task,
    )
