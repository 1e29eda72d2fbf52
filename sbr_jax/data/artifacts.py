"""Recorded jailbreaks and harmless instructions: rows of the files, and their items.

The table of files is in :mod:`sbr_jax.data.evalsets`. The recorded attacks are harmful
requests; nothing here prints or quotes a text.

References: arXiv:2404.01318 (JailbreakBench), arXiv:2307.15043 (GCG), arXiv:2310.08419
(PAIR).
"""

from collections.abc import Iterator
from pathlib import Path

from sbr_jax.data.readers import filled, find, find_all, json_rows, json_value
from sbr_jax.data.records import BehaviourItem, JudgedItem
from sbr_jax.data.rows import Row, describe
from sbr_jax.typing import UserError

PATTERNS = ("artifact_*.json", "attack-artifacts/*/*/*.json")
"""One folder of files, or the folders of the artifacts' own repository."""


def artifact_rows(folder: Path, split: str) -> list[Row]:
    """The submitted prompts of every attack on every model.

    An attack that found nothing for a behaviour submitted no prompt; such rows are left
    out.

    Raises:
      UserError: for no files, and a file of another shape.
    """
    del split
    root = folder / "jailbreakbench"
    paths = [path for pattern in PATTERNS for path in find_all(root, pattern)]
    if not paths:
        raise UserError(
            f"expected recorded attacks {' or '.join(PATTERNS)} in {root}, found none: "
            "put JailbreakBench's artifacts there, or drop the measurement"
        )
    rows = (row for path in paths for row in _submitted(path))
    return filled(f"{root} (recorded attacks)", rows)


def _submitted(path: Path) -> Iterator[Row]:
    value = json_value(path)
    whole = Row(str(path), 0, value if isinstance(value, dict) else {})
    about, attempts = whole.get("parameters"), whole.get("jailbreaks")
    if not isinstance(about, dict) or not isinstance(attempts, list):
        raise UserError(
            f"{path}: expected an object of parameters and a list of jailbreaks, got "
            "another shape; use the file as its owner publishes it"
        )
    for number, cells in enumerate(attempts, 1):
        if not isinstance(cells, dict):
            raise UserError(
                f"{path}, row {number}: expected an object, got {describe(cells)}"
            )
        row = Row(str(path), number, {**about, **cells})
        if row.get("prompt") is not None:
            yield row


def artifact(row: Row) -> JudgedItem:
    """An attack's prompt, the model it was made for, and whether it got through."""
    group = f"{row.text('method')}/{row.text('model')}"
    return JudgedItem(
        prompt=row.text("prompt"),
        response=row.text("response", empty=True),
        verdict="",
        id=f"{group}/{row.identity('index')}",
        group=group,
        harmful_prompt=True,
        harmful_response=row.flag("jailbroken"),
    )


def harmless_rows(folder: Path, split: str) -> list[Row]:
    """Instructions of Alpaca without answers."""
    return json_rows(find(folder / "alpaca", f"harmless_instructions_{split}.json"))


def harmless(row: Row) -> BehaviourItem:
    """An instruction that nobody should refuse."""
    text = row.text("instruction").strip()
    return BehaviourItem(text, str(row.number), harmful=False)
