"""Whether `results.jsonl` is what the finished stages beside it say.

It is a function of their records, which hold digests, and has none itself: a line that
was edited or removed shows only by comparing.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.training.records import DIGEST
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import RESULT
from sbr_jax.typing import UserError

_KEYS = ("method", "seed", "stage", "domain", "index")


def require_published(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    times: Sequence[Mapping[str, Any]],
    remedy: str,
) -> None:
    """Compare the lines of a run with its stages, where both are there.

    A run publishes after each row, so stages may be ahead of the lines; those that the
    times name were published. Lines without stages (a copy) and those of versions that
    wrote no digests are taken as they are.

    Args:
        folder: of the run.
        lines: of `results.jsonl`, each that of a stage.
        times: of `timings.jsonl`.
        remedy: what to do if they differ.

    Raises:
        UserError: naming the first line that differs, and for a damaged stage.
    """
    if not _sealed(folder) or not any(folder.glob(f"stages/*/*/*/{RESULT}")):
        return
    path = folder / "results.jsonl"
    published = {_key(line) for line in (*lines, *times)}
    rows: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for record in RunFolder(folder).lines(()):
        line = record["line"]
        row = rows.setdefault((line["method"], line["seed"]), [])
        if _key(line) in published:
            row.append(record)
    left: dict[tuple[str, int | None], Iterator[dict[str, Any]]]
    left = {name: iter(row) for name, row in rows.items()}
    for number, line in enumerate(lines, 1):
        record = next(left.get((line["method"], line["seed"]), iter(())), None)
        if record is None:
            raise UserError(
                f"expected the line of a finished stage in line {number} of {path}, "
                f"got one of which there is none in {folder / 'stages'}: {remedy}"
            )
        if line != record["line"]:
            raise UserError(
                f"expected line {number} of {path} as {_place(folder, record)} has it, "
                f"got another: {remedy}"
            )
    for row in left.values():
        if (record := next(row, None)) is not None:
            raise UserError(
                f"expected after line {len(lines)} of {path} that of "
                f"{_place(folder, record)}, got none: {remedy}"
            )


def _sealed(folder: Path) -> bool:
    """Whether `config.json` has a digest, as that of every run that can go on."""
    path = folder / "config.json"
    return path.is_file() and DIGEST in json.loads(path.read_text(encoding="utf-8"))


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line.get(key) for key in _KEYS])


def _place(folder: Path, record: Mapping[str, Any]) -> Path:
    return folder / "stages" / record["place"] / RESULT
