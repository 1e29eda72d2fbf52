"""Turns rows of benign training sets into pairs of prompt and answer.

The table of sets is :data:`sbr_jax.data.registry.SOURCES`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sbr_jax.data._rows import Row, is_texts
from sbr_jax.data.readers import (
    any_rows,
    filled,
    find,
    find_all,
    table_rows,
    whole_text,
)
from sbr_jax.data.records import LETTERS, Pair, format_choices
from sbr_jax.typing import UserError

_CELL = r"\{\{(.*?)\}\}"


def joined_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The rows of all files, one after the other."""
    return [row for name in files for row in any_rows(find(folder, name))]


def filled_pair(prompt: str, answer: str) -> Pair | None:
    """A pair with its texts stripped, or None if one is empty."""
    pair = Pair(prompt.strip(), answer.strip())
    return pair if pair.prompt and pair.answer else None


def instruction(row: Row) -> Pair | None:
    """The Alpaca layout: instruction, input, output; unanswered rows are left out."""
    parts = [row.text("instruction", empty=True).strip()]
    if "input" in row.values:
        parts.append(row.text("input", empty=True).strip())
    prompt = "\n\n".join(part for part in parts if part)
    return filled_pair(prompt, row.text("output", empty=True))


def gsm8k(row: Row) -> Pair:
    """Question and worked answer, without the calculator annotations."""
    answer = re.sub(r"<<.*?>>", "", row.text("answer")).strip()
    return Pair(row.text("question").strip(), answer)


def medmcqa(row: Row) -> Pair:
    """Question with options and `LETTER. text`; `cop` counts from 1 in this release."""
    choices = [row.text(f"op{letter}") for letter in "abcd"]
    index = row.integer("cop", 1, 4, "; a file that counts from 0 is another release")
    answer = f"{LETTERS[index - 1]}. {choices[index - 1].strip()}"
    return Pair(format_choices(row.text("question"), choices), answer)


def medqa_options(row: Row) -> tuple[list[str], str]:
    """The options A to D, and the letter of the right one."""
    options = row.get("options")
    if not isinstance(options, dict) or sorted(options) != list("ABCD"):
        raise row.fault("options", "an object of the options A to D")
    letter = row.option("answer_idx", tuple("ABCD"))
    choices = [options[name] for name in "ABCD"]
    if not is_texts(choices):
        raise row.with_cells(options=choices).fault("options", "a list of texts")
    return choices, letter


def medqa(row: Row) -> Pair:
    """Question with options and `LETTER. text`."""
    choices, letter = medqa_options(row)
    answer = f"{letter}. {choices['ABCD'.index(letter)].strip()}"
    return Pair(format_choices(row.text("question"), choices), answer)


# --- LegalBench -----------------------------------------------------------------------


def legalbench_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The rows of every task, with its name, and its question under `prompt`."""
    prompts, train, test = files
    if split == "train":
        found = {path.parent.name: path for path in find_all(folder, train)}
    else:
        found = {p.name.partition(".")[0]: p for p in find_all(folder, test)}
    rows = (
        row
        for task, path in sorted(found.items())
        for row in _task_rows(find(folder, prompts.replace("TASK", task)), path, task)
    )
    return filled(f"{folder / 'legalbench'} ({split})", rows)


def _task_rows(source: Path, path: Path, task: str) -> Iterator[Row]:
    template = whole_text(source)
    names = re.findall(_CELL, template)
    if not names or {template.count("{{"), template.count("}}")} != {len(names)}:
        raise UserError(
            f"expected names of columns in double braces in {source}, got "
            f"{len(names)} of them, or braces that nothing closes: fetch it again"
        )
    query = _last_query(template)
    # Some tasks have no training examples.
    needed = re.findall(_CELL, query)
    for row in table_rows(path, delimiter="\t", needed=needed):
        question = re.sub(_CELL, lambda m, row=row: row.text(m[1], empty=True), query)
        yield row.with_cells(prompt=question, task=task)


def _last_query(template: str) -> str:
    r"""A few-shot template's instruction and open question, without solved examples.

    >>> _last_query("Is it?\n\nQ: a\nA: no\n\nQ: {{text}}\nA:")
    'Is it?\n\nQ: {{text}}\nA:'
    """
    start = template.rfind("\n\n", 0, template.find("{{"))
    if start < 0:
        return template.strip()
    instruction = template.split("\n\n", 1)[0].strip()
    query = template[start:].strip()
    return query if instruction in query else f"{instruction}\n\n{query}"


def legalbench(row: Row) -> Pair:
    """Question and target: column `answer`, in most test files `label`."""
    target = "label" if "answer" not in row.values else "answer"
    if target not in row.values:
        raise row.fault(target, "a target called 'answer' or 'label'")
    return Pair(row.text("prompt"), row.text(target).strip())
