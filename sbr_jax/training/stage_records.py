"""A finished stage's record: its run, its place and the digests of its files.

``result.json`` holds the stage's line of ``results.jsonl``, its timing, its run, its
place in the run, and the digests of its files. A checkpoint inside a stage has such a
record in ``history.json``.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from sbr_jax import storage
from sbr_jax.training.records import (
    DamagedError,
    file_digests,
    plain_numbers,
    read_record,
    write_record,
    writing,
)

BASE = "base"
RESULT, HISTORY = "result.json", "history.json"
PARTIAL = "partial-"


@dataclasses.dataclass(frozen=True)
class Line:
    """A finished stage's line of ``results.jsonl``.

    Attributes:
      method: the variant; :data:`BASE` for the aligned model.
      seed: None for the aligned model.
      stage: its name.
      domain: name of the domain; None at the start.
      index: of the domain; -1 at the start.
      metrics: numbers.
      diagnostics: trees of numbers.
    """

    method: str
    seed: int | None
    stage: str
    domain: str | None
    index: int
    metrics: dict
    diagnostics: dict = dataclasses.field(default_factory=dict)


def write_result(
    folder: pathlib.Path,
    run: str,
    line: Line,
    timing: Mapping[str, Any] | None = None,
    checkpoints: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Marks a stage as finished: its ``result.json``, renamed into place.

    Args:
      folder: of the stage.
      run: the digest of the settings that decide the run's results.
      line: the stage's results.
      timing: seconds.
      checkpoints: names of the checkpoints in the folder, which must be complete.

    Returns:
      The record.
    """
    content = {"line": plain_numbers(vars(line)), "timing": plain_numbers(timing or {})}
    return _write(folder / RESULT, run, content, checkpoints)


def write_history(
    folder: pathlib.Path, run: str, content: Mapping[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """Marks a checkpoint inside a stage as complete; see :func:`write_result`.

    ``content`` holds the ``step`` after which it was made, the ``history``, and the
    names of ``split`` arrays; ``names`` lists what the folder holds.
    """
    return _write(folder / HISTORY, run, dict(content), names)


def _write(
    path: pathlib.Path, run: str, content: dict[str, Any], checkpoints: tuple[str, ...]
) -> dict[str, Any]:
    folder = path.parent
    record = {
        **content,
        "run": run,
        "place": place_of(folder),
        "files": {name: file_digests(folder / name) for name in checkpoints},
    }
    with writing(folder):
        storage.made(folder)
    write_record(path, record)
    return record


def read_result(
    folder: pathlib.Path, run: str, name: str = RESULT
) -> dict[str, Any] | None:
    """Reads the record in a stage's folder; None if there is none.

    Args:
      folder: of the stage, or of a checkpoint inside it.
      run: the digest of the run that it must belong to.
      name: file name of the record.

    Raises:
      DamagedError: if it is damaged, or belongs to another run or place.
    """
    path = folder / name
    if not path.exists():
        return None
    record = read_record(path, redo(folder))
    place, found = place_of(folder), record.get("place")
    if record.get("run") != run:
        reason = f"expected a stage of this run in {path}, found one of another run"
        reason += " (other settings, data or model)"
        raise DamagedError(reason, redo(folder))
    if found != place:
        reason = f"expected the record of {place} in {path}, found that of {found}"
        raise DamagedError(reason, redo(folder))
    return record


def require_intact(checkpoint: pathlib.Path, run: str) -> None:
    """Compares every file of a checkpoint's folder with the record beside it.

    Raises:
      DamagedError: naming the first file that has changed.
    """
    folder = checkpoint.parent
    name = HISTORY if folder.name.startswith(PARTIAL) else RESULT
    record = read_result(folder, run, name)
    if record is None or checkpoint.name not in record["files"]:
        reason = f"expected a record of {checkpoint}, found none"
        raise DamagedError(reason, redo(folder))
    if not checkpoint.is_dir():
        reason = f"expected a checkpoint in {checkpoint}, found none"
        raise DamagedError(reason, redo(folder))
    written, found = record["files"][checkpoint.name], file_digests(checkpoint)
    for file in sorted({*written, *found}):
        if written.get(file) != found.get(file):
            what = "another file" if file in found else "none"
            path = checkpoint / file
            reason = f"expected {path} as its stage left it, found {what}"
            raise DamagedError(reason, redo(folder))


def place_of(folder: pathlib.Path) -> str:
    """The place of a stage's folder, or of a checkpoint inside it, within the run.

    >>> place_of(pathlib.Path("runs/a/stages/plain/0/05-train/partial-00000002"))
    'plain/0/05-train/partial-00000002'
    """
    return "/".join(folder.parts[-4 if folder.name.startswith(PARTIAL) else -3 :])


def redo(folder: pathlib.Path) -> pathlib.Path:
    """What to delete so that a damaged stage is computed again.

    Newer checkpoints replace older ones, so a stage in the middle can seldom be
    computed alone: its variant and seed must begin anew. Three things can be redone
    alone: a checkpoint inside a stage, an evaluation that nothing follows, and the
    evaluation of the aligned model.
    """
    if folder.name.startswith(PARTIAL) or folder.parent.parent.name == BASE:
        return folder
    last = not any(
        path.parent.name > folder.name for path in folder.parent.glob(f"*/{RESULT}")
    )
    return folder if last and folder.name.endswith("-evaluate") else folder.parent


def unusable(line: Any) -> list[str]:
    """Names the parts of a stage's line that are missing or of a wrong type.

    These are fields or, if all fields are right, metrics and diagnostics that are not
    numbers. The list is empty for a valid line.

    >>> line = {"method": "plain", "seed": 0, "stage": "train", "domain": "legal"}
    >>> unusable(line)
    ['index', 'metrics', 'diagnostics']
    >>> line |= {"index": 0, "diagnostics": {"alpha": {"q_proj": [0.5, None]}}}
    >>> unusable({**line, "metrics": {"loss": "low", "removed": None}})
    ['metrics.loss']
    """
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Line)}
    if not isinstance(line, dict):
        return list(kinds)
    wrong = [k for k, kind in kinds.items() if not isinstance(line.get(k, ...), kind)]
    if wrong:
        return wrong
    deep = [k for k, tree in line["diagnostics"].items() if not _holds_numbers(tree)]
    return [
        *(f"metrics.{name}" for name in not_numbers(line["metrics"])),
        *(f"diagnostics.{name}" for name in deep),
    ]


def not_numbers(found: Mapping[str, Any]) -> list[str]:
    """Keys of values that are neither a number nor null (which stands for NaN)."""
    return [k for k, v in found.items() if not isinstance(v, int | float | None)]


def _holds_numbers(tree: Any) -> bool:
    if isinstance(tree, (dict, list)):
        parts = tree.values() if isinstance(tree, dict) else tree
        return all(map(_holds_numbers, parts))
    return isinstance(tree, int | float | None)
