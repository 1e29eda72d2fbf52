"""Reads rows from the Hugging Face hub in the form of the original files.

Some repositories require their terms to be accepted first (AdvBench, WildGuardTest);
until then they look like a missing set. Copies may differ in date from the owner's
files: TruthfulQA's is from 2022, MMLU's validation set has 1,531 questions, and BBQ's
is the official draw.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from sbr_jax.data._rows import Row
from sbr_jax.data.readers import filled
from sbr_jax.errors import option
from sbr_jax.typing import UserError

Cells = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hub:
    """A set's copy on the hub."""

    path: str
    splits: Mapping[str, str] | None = None
    """From our name of a split to the hub's; None if they are the same for all."""
    config: str | None = None
    data_dir: str | None = None
    adapt: Callable[[Cells], Cells] | None = None
    """Converts the hub's columns to those of the original file."""
    cells: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Cells to add to each row, by our name of the split."""


def hub_rows(
    hub: Hub | None, name: str, split: str, *, remedy: str | None = None
) -> list[Row]:
    """The rows of one split of a set on the hub, at least one.

    Args:
      hub: its copy; None if the hub has none.
      name: our name of the set.
      split: our name of the split.
      remedy: what else the user can do; it ends every error. None to name a folder.

    Raises:
      UserError: if the set or split is not on the hub, ``datasets`` is missing, the hub
        cannot be reached, or the copy's columns differ from its card.
    """
    remedy = remedy or f"name a data folder: {option('data', 'FOLDER')}"
    theirs = split
    if hub is not None and hub.splits is not None:
        theirs = hub.splits.get(split)
    if hub is None or theirs is None:
        raise UserError(
            f"expected a folder with '{name}' (split {split}), got none, and the hub "
            f"has no copy of it: {remedy}"
        )
    try:
        datasets = importlib.import_module("datasets")
        failures = importlib.import_module("datasets.exceptions").DatasetsError
    except ImportError as error:
        raise UserError(
            f"expected the package 'datasets' to fetch '{name}', found none: install "
            f"sbr_jax[eval], or {remedy}"
        ) from error
    try:
        data = datasets.load_dataset(
            hub.path, hub.config, data_dir=hub.data_dir, split=theirs
        )
    except (OSError, ValueError, failures) as error:
        raise UserError(
            f"expected to fetch {hub.path} from the hub, got {type(error).__name__}: "
            f"check the network and whether its terms must be accepted, or {remedy}"
        ) from error
    where, cells = f"{hub.path} ({theirs})", hub.cells.get(split, {})
    numbered = ((i, {**row, **cells}) for i, row in enumerate(data, 1))
    return filled(where, (_adapted(hub, where, i, row, remedy) for i, row in numbered))


def _adapted(hub: Hub, where: str, number: int, values: Cells, remedy: str) -> Row:
    row = Row.read(where, number, values)
    if hub.adapt is None:
        return row
    try:
        return row._replace(values=hub.adapt(dict(row.values)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}, row {number}: expected the columns of its card, got "
            f"{', '.join(map(repr, row.values))} with other contents: {remedy}"
        ) from error


# --- from the hub's columns to those of the file --------------------------------------


def renamed(**names: str) -> Callable[[Cells], Cells]:
    """Renames columns: new name = old name."""
    return lambda row: row | {n: row[old] for n, old in names.items() if old in row}


def cop_from_one(row: Cells) -> Cells:
    """Counts MedMCQA's right option from 1, as in the release, instead of from 0."""
    return row | {"cop": row["cop"] + 1} if type(row.get("cop")) is int else row


def truthful_targets(row: Cells) -> Cells:
    """TruthfulQA's options as the file's mapping from option to 0 or 1."""
    found = {}
    for name in {"mc1_targets", "mc2_targets"} & row.keys():
        choices, labels = _listed(row[name]["choices"]), _listed(row[name]["labels"])
        if len(set(choices)) < len(choices):
            raise ValueError
        found[name] = dict(zip(choices, labels, strict=True))
    return row | found


def truthful_answers(row: Cells) -> Cells:
    """TruthfulQA's answers as the file's semicolon-separated cells."""
    return {
        "Category": row["category"],
        "Question": row["question"],
        "Best Answer": row["best_answer"],
        "Correct Answers": "; ".join(_listed(row["correct_answers"])),
        "Incorrect Answers": "; ".join(_listed(row["incorrect_answers"])),
    }


def lettered(row: Cells) -> Cells:
    """MMLU's options and right position as the file's cells."""
    cells = dict(zip("ABCD", _listed(row["choices"]), strict=True))
    if type(row["answer"]) is not int:
        raise TypeError
    return row | cells | {"answer": dict(enumerate("ABCD"))[row["answer"]]}


def _listed(value: Any) -> list[Any]:
    # A text would be read as a list of its letters.
    if not isinstance(value, list):
        raise TypeError
    return value
