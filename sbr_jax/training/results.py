"""The working directory: finished stages, result lines, the summary.

A stage is a folder whose ``result.json`` is renamed into place last; without it the
stage never happened. ``results.jsonl``, ``timings.jsonl`` and ``summary.json`` are
functions of the finished stages and are written anew.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.training.summary import summarise
from sbr_jax.typing import UserError

BASE = "base"
ENVIRONMENT = ("versions", "hardware")
RECOMPUTE = "delete its folder to compute that stage again"
LINE = {
    "method": str,
    "seed": int | None,
    "stage": str,
    "domain": str | None,
    "index": int,
    "metrics": dict,
    "diagnostics": dict,
}
"""What a finished stage's line holds; see :func:`write_result`."""


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is either whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plain_numbers(tree: Any) -> Any:
    """Arrays to nested lists, floats to six digits, NaN to null: what JSON holds."""
    if isinstance(tree, Mapping):
        return {str(k): plain_numbers(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain_numbers(v) for v in tree]
    if isinstance(tree, (bool, str, int)) or tree is None:
        return tree
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if math.isfinite(tree) else None
    return plain_numbers(np.asarray(tree).tolist())


class Workdir:
    """A run's folder, locked while it is open."""

    def __init__(self, folder: str | pathlib.Path):
        """Names the folder; nothing is touched.

        Args:
          folder: where results go.
        """
        self.folder = pathlib.Path(folder)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a folder that belongs to other settings; touches nothing.

        Args:
          config: what decides the results, JSON values only; see
            :data:`ENVIRONMENT` for the keys that are recorded but not compared.

        Raises:
          UserError: naming the settings that differ.
        """
        path = self.folder / "config.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"workdir {self.folder}: expected a folder, found a file")
        if not path.exists():
            refuse_foreign(self.folder, "config.json")
            return
        whole = read_config(self.folder)
        if "settings" not in whole:
            raise UserError(
                f"expected the settings of a run in {path}, found another program's "
                "file; choose another folder"
            )
        there = _flat({k: v for k, v in whole.items() if k not in ENVIRONMENT})
        here = _flat(json.loads(json.dumps(config)))
        keys = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        if keys:
            shown = "; ".join(
                f"{k}: there {_short(there.get(k))}, now {_short(here.get(k))}"
                for k in keys
            )
            raise UserError(
                f"{self.folder} belongs to a run with other settings: {shown}; "
                "choose another folder or the same settings"
            )

    @contextlib.contextmanager
    def opened(
        self, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> Iterator[None]:
        """Creates the folder and ``config.json``, and holds the lock.

        Raises:
          UserError: if another process holds it, a finished stage's record is
            damaged, or :meth:`check` refuses.
        """
        import fcntl

        self.check(config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"workdir {self.folder}: expected a folder that can be written, got "
                f"'{error.strerror}'; choose another one"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"workdir {self.folder} is in use by another run; wait for it or "
                    "choose another folder"
                ) from error
            self.lines(())  # What cannot be published is refused before any work.
            if not (self.folder / "config.json").exists():
                text = json.dumps({**config, **environment}, indent=2) + "\n"
                write_atomically(self.folder / "config.json", text)
            yield

    def stage(self, method: str, seed: int | None, number: int, stage: str):
        """The folder of one stage."""
        seed_part = "all" if seed is None else str(seed)
        name = method.replace(":", "+")
        return self.folder / "stages" / name / seed_part / f"{number:02d}-{stage}"

    def lines(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Every finished stage's record, in canonical order.

        Args:
          order: method names; others come after, by name.

        Raises:
          UserError: for a damaged record.
        """
        rank = {name: i for i, name in enumerate([BASE, *order])}
        found = []
        for path in (self.folder / "stages").glob("*/*/*/result.json"):
            record = _read_record(path)
            number = int(path.parent.name.split("-")[0])
            method, seed = record["line"]["method"], record["line"]["seed"]
            place = (rank.get(method, len(rank)), method, -1 if seed is None else seed)
            found.append(((*place, number), record))
        return [record for _, record in sorted(found, key=lambda item: item[0])]

    def publish(self, order: Sequence[str]) -> dict[str, Any]:
        """Writes ``results.jsonl``, ``timings.jsonl`` and ``summary.json``.

        Returns:
          The summary.
        """
        records = self.lines(order)
        lines = [json.dumps(r["line"]) + "\n" for r in records]
        write_atomically(self.folder / "results.jsonl", "".join(lines))
        times = [
            json.dumps({**_identity(r["line"]), **r["timing"]}) + "\n" for r in records
        ]
        write_atomically(self.folder / "timings.jsonl", "".join(times))
        summary = plain_numbers(summarise(records, BASE))
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.folder / "summary.json", text)
        return summary


def write_result(
    folder: pathlib.Path,
    *,
    method: str,
    seed: int | None,
    stage: str,
    domain: str | None,
    index: int,
    metrics: Mapping[str, Any],
    diagnostics: Mapping[str, Any] | None = None,
    timing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Marks a stage as finished: its ``result.json``, renamed into place."""
    line = {
        "method": method,
        "seed": seed,
        "stage": stage,
        "domain": domain,
        "index": index,
        "metrics": plain_numbers(metrics),
        "diagnostics": plain_numbers(diagnostics or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    record = {"line": line, "timing": plain_numbers(timing or {})}
    write_atomically(folder / "result.json", json.dumps(record) + "\n")
    return record


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
    """A finished stage's record, or None.

    Raises:
      UserError: if it is damaged.
    """
    path = folder / "result.json"
    return _read_record(path) if path.exists() else None


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    """A ``result.json`` of the shape that :func:`write_result` gives it."""
    record = read_json(path)
    timing = record.get("timing")
    wrong = [f"line.{name}" for name in unusable(record.get("line"))]
    if isinstance(timing, dict):
        wrong += [f"timing.{name}" for name in not_numbers(timing)]
    else:
        wrong.append("timing")
    if wrong:
        raise UserError(
            f"expected a stage's record in {path}, got one without a usable "
            f"{', '.join(wrong)}; it was damaged after it was written: {RECOMPUTE}"
        )
    return record


def unusable(line: Any) -> list[str]:
    """What of a stage's line is missing, or of a type that no run writes.

    Args:
      line: as read from a file.

    Returns:
      Names of fields, or else of metrics and diagnostics that hold no numbers; empty
      for a line in order.

    >>> line = {"method": "plain", "seed": 0, "stage": "train", "domain": "legal"}
    >>> unusable(line)
    ['index', 'metrics', 'diagnostics']
    >>> line |= {"index": 0, "diagnostics": {"alpha": {"q_proj": [0.5, None]}}}
    >>> unusable({**line, "metrics": {"loss": "low", "removed": None}})
    ['metrics.loss']
    """
    if not isinstance(line, dict):
        return list(LINE)
    wrong = [k for k, kind in LINE.items() if not isinstance(line.get(k, ...), kind)]
    if wrong:
        return wrong
    deep = [k for k, tree in line["diagnostics"].items() if not _holds_numbers(tree)]
    return [
        *(f"metrics.{name}" for name in not_numbers(line["metrics"])),
        *(f"diagnostics.{name}" for name in deep),
    ]


def not_numbers(found: Mapping[str, Any]) -> list[str]:
    """Keys of values that are neither a number nor null, which JSON has for NaN."""
    return [k for k, v in found.items() if not isinstance(v, int | float | None)]


def _holds_numbers(tree: Any) -> bool:
    if isinstance(tree, (dict, list)):
        parts = tree.values() if isinstance(tree, dict) else tree
        return all(map(_holds_numbers, parts))
    return isinstance(tree, int | float | None)


def read_json(path: pathlib.Path, remedy: str = RECOMPUTE) -> dict[str, Any]:
    """Reads a file that a run wrote.

    Raises:
      UserError: if it is damaged; files are renamed into place when complete, so only
        something else than a run can have cut one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(
            f"expected JSON in {path}, got something else ({error}); it was damaged "
            f"after it was written: {remedy}"
        ) from error
    return found


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a run's ``config.json``; see :func:`read_json`."""
    return read_json(folder / "config.json", "restore it, or choose another folder")


def refuse_foreign(folder: pathlib.Path, lacking: str, own: Sequence[str] = ()) -> None:
    """Refuses a folder with files of somebody else; hidden ones and logs are nobody's.

    Raises:
      UserError: naming some of the files, and the one by which it would be ours.
    """
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    found = sorted(
        name
        for name in names - set(own)
        if not (name.startswith(".") or name.endswith((".log", ".out")))
    )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{folder} holds {', '.join(found[:3])}{more} but no {lacking}: expected "
            "an empty folder or one of a previous run; choose another"
        )


def _identity(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: line[k] for k in ("method", "seed", "stage", "domain", "index")}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
