"""LegalBench's rows as pairs: each with its task's question, without solved examples.

References: arXiv:2308.11462.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from sbr_jax.data.readers import filled, find, find_all, table_rows, whole_text
from sbr_jax.data.records import Pair
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError

_CELL = r"\{\{(.*?)\}\}"


def _last_query(template: str) -> str:
    r"""Keeps a few-shot template's instruction and its open question.

    >>> _last_query("Is it?\n\nQ: a\nA: no\n\nQ: {{text}}\nA:")
    'Is it?\n\nQ: {{text}}\nA:'
    """
    start = template.rfind("\n\n", 0, template.find("{{"))
    if start < 0:
        return template.strip()
    instruction = template.split("\n\n", 1)[0].strip()
    query = template[start:].strip()
    return query if instruction in query else f"{instruction}\n\n{query}"


def legalbench_rows(folder: Path, split: str) -> list[Row]:
    """The rows of every task, each with its task's question under `prompt`."""
    root = folder / "legalbench"
    if split == "train":
        files = {p.parent.name: p for p in find_all(root, "tasks/*/train.tsv")}
    else:
        files = {p.name.partition(".")[0]: p for p in find_all(root, "test/*.tsv")}
    rows = (
        row for task in sorted(files) for row in _task_rows(root, files[task], task)
    )
    return filled(f"{root} ({split})", rows)


def _task_rows(root: Path, path: Path, task: str) -> Iterator[Row]:
    source = find(root / "tasks" / task, "base_prompt.txt")
    template = whole_text(source)
    names = re.findall(_CELL, template)
    if not names or {template.count("{{"), template.count("}}")} != {len(names)}:
        raise UserError(
            f"expected names of columns in double braces in {source}, got "
            f"{len(names)} of them, or braces that nothing closes: fetch it again"
        )
    query = _last_query(template)
    # Some tasks have no examples to learn from.
    needed = re.findall(_CELL, query)
    for row in table_rows(path, delimiter="\t", needed=needed):
        question = re.sub(_CELL, lambda m, row=row: row.text(m[1], empty=True), query)
        yield row.with_cells(prompt=question)


def legalbench(row: Row) -> Pair:
    """The target is called `answer`, in most files of tests `label`."""
    target = "label" if "answer" not in row.values else "answer"
    if target not in row.values:
        raise row.fault(target, "a target called 'answer' or 'label'")
    return Pair(row.text("prompt"), row.text(target).strip())
