"""Reads finished runs back from their working directories.

A `Run` answers the questions of tables and figures; nothing else touches the files. If
a run lacks something (a probe, a composite, a second method), it is absent, never
invented.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.training import code_record
from sbr_jax.training.records import DIGEST, read_json
from sbr_jax.training.run_folder import RunFolder, read_config
from sbr_jax.training.stage_records import RESULT, not_numbers, unusable
from sbr_jax.typing import UserError

REWRITE = "run the same command again, which writes the file anew"
PROGRAMS = {"attack": "experiments.attack", "analysis": "experiments.analyse"}
"""The program for each key of `config.json`; without such a key, experiments.run."""

Line = dict[str, Any]


def program_of(config: Mapping[str, Any]) -> str:
    """Name of the program that wrote a `config.json`.

    >>> program_of({"training": {}, "attack": {"name": "poison"}})
    'experiments.attack'
    """
    found = (program for key, program in PROGRAMS.items() if key in config)
    return next(found, "experiments.run")


def layers_by_unit(value: Any) -> dict[str, np.ndarray]:
    """A diagnostic as `{unit: array}`; None becomes `{}`.

    >>> layers_by_unit({"q_proj": [1, 2]})["q_proj"].tolist()
    [1.0, 2.0]
    """
    if value is None:
        return {}
    units = value if isinstance(value, dict) else {"all": value}
    out = {}
    for unit, layers in units.items():
        if isinstance(layers, list) and layers and isinstance(layers[0], list):
            width = max(map(len, layers))
            layers = [layer + [0.0] * (width - len(layer)) for layer in layers]
        out[unit] = np.atleast_1d(np.asarray(layers, np.float64))
    return out


@dataclasses.dataclass(frozen=True)
class Run:
    """Results of one working directory.

    Attributes:
        folder: the working directory.
        lines: those of `results.jsonl`.
        timings: those of `timings.jsonl`.
        config: `config.json`, or empty.
        harness: entries of `harness.json` (lm-eval), or none.
    """

    folder: Path
    lines: list[Line]
    timings: list[Line]
    config: dict[str, Any]
    harness: list[Line] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @functools.cached_property
    def methods(self) -> list[str]:
        """Rows in the order in which they were run."""
        return list(dict.fromkeys(line["method"] for line in self._of("evaluate")))

    @functools.cached_property
    def domains(self) -> list[str]:
        """Domains in the order of training."""
        return list(dict.fromkeys(line["domain"] for line in self._of("evaluate")))

    @property
    def stages(self) -> list[str]:
        """The aligned model, then one stage per domain."""
        return ["start", *self.domains]

    @functools.cached_property
    def base(self) -> dict[str, float]:
        """Metrics of the aligned model, before any fine-tuning."""
        return next((line["metrics"] for line in self._of("base")), {})

    def _of(self, stage: str, method: str | None = None) -> Iterator[Line]:
        for line in self.lines:
            if line["stage"] == stage and method in (None, line["method"]):
                yield line

    @functools.cached_property
    def _finished(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Metrics after each domain, by row and seed, if all domains are done."""
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for line in self._of("evaluate"):
            seeds = found.setdefault(line["method"], {})
            seeds.setdefault(line["seed"], []).append(line["metrics"])
        count = len(self.domains)
        return {
            method: {s: x for s, x in sorted(seeds.items()) if len(x) == count}
            for method, seeds in found.items()
        }

    def seeds(self, method: str) -> list[int]:
        """Seeds with all domains finished, in order."""
        return list(self._finished.get(method, {}))

    def metric(self, method: str, name: str) -> np.ndarray:
        """A metric after each stage, `[seeds, 1 + domains]`.

        Empty (`[0, 1 + domains]`) if the run lacks it; NaN if only the aligned model's
        value is missing.
        """
        start = self.base.get(name, np.nan)
        seeds = self._finished.get(method, {}).values()
        rows = [[start, *(found.get(name) for found in stages)] for stages in seeds]
        return _matrix(rows, 1 + len(self.domains))

    def accuracy(self, method: str, *, at_end: bool = False) -> np.ndarray:
        """Accuracy of each domain, `[seeds, domains]`, or empty.

        With ``at_end``: after the last domain; otherwise: right after its own.
        """
        keys = [f"accuracy/{domain}" for domain in self.domains]
        rows = [
            [stages[-1 if at_end else i].get(key) for i, key in enumerate(keys)]
            for stages in self._finished.get(method, {}).values()
        ]
        return _matrix(rows, len(keys))

    def diagnostics(self, method: str, stage: str, name: str) -> list[tuple[int, Any]]:
        """`(domain index, value)` of a diagnostic, for the first seed with it.

        The aligned model's own subspace has the index −1.
        """
        for seed in self.seeds(method):
            found = []
            for line in self._of(stage, method):
                value = (line.get("diagnostics") or {}).get(name)
                if line["seed"] == seed and value is not None:
                    domain = line.get("domain")
                    index = self.domains.index(domain) if domain else -1
                    found.append((index, value))
            if found:
                return found
        return []

    def values(self, method: str, stage: str, group: str, key: str) -> list[float]:
        """All numbers under a key of `metrics` or `diagnostics`, flattened."""
        found: list[float] = []
        for line in self._of(stage, method):
            for part in layers_by_unit((line.get(group) or {}).get(key)).values():
                found += part.ravel().tolist()
        return found

    def code(self, method: str) -> str | None:
        """Hash of the code that decided a row; "mixed" if there are several.

        None if a seed's hash is unknown: the run predates hashes, or was made
        elsewhere.
        """
        found: set[str] = set()
        for seed in self.seeds(method):
            stages = RunFolder(self.folder).stage(method, seed, 0, "subspace").parent
            hashes = code_record.read(stages)
            if not hashes:
                return None
            found.update(hashes)
        return "mixed" if len(found) > 1 else next(iter(found), None)

    def triggers(self, method: str) -> float | None:
        """Repairs per seed; None if nothing was monitored."""
        seeds = self.seeds(method)
        lines = [x for x in self._of("repair", method) if x["seed"] in seeds]
        fired = [x for x in lines if (x["metrics"].get("blocks") or 0) > 0]
        return len(fired) / len(seeds) if lines else None

    def probed(self, method: str, name: str = "probe_after") -> np.ndarray:
        """The monitor's probe after each domain, `[seeds, domains]`, or empty.

        ``name`` is a metric of repairs; "probe" is the one before them.
        """
        found: dict[int, list[Any]] = {seed: [] for seed in self.seeds(method)}
        for line in self._of("repair", method):
            if line["seed"] in found:
                found[line["seed"]].append(line["metrics"].get(name))
        count = len(self.domains)
        rows = [values for values in found.values() if len(values) == count]
        return _matrix(rows, count)

    def seconds_per_step(self, method: str) -> float | None:
        """Median time of a training step; None if unknown."""
        values = [
            line["seconds_per_step"]
            for line in self.timings
            if (line.get("method"), line.get("stage")) == (method, "train")
            and line.get("seconds_per_step") is not None
        ]
        return float(np.median(values)) if values else None


def _matrix(rows: list[list[Any]], width: int) -> np.ndarray:
    """Complete rows as an array `[rows, width]`."""
    rows = [row for row in rows if None not in row]
    return np.asarray(rows, np.float64).reshape(len(rows), width)


# --- reading --------------------------------------------------------------------------


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads working directories, each only once."""
    if not folders:
        raise UserError("expected at least one working directory, got none: add DIR...")
    places = [Path(folder).resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(
                f"expected each folder once, got {folders[number]} twice: drop one"
            )
    return [read_run(folder) for folder in folders]


def read_run(folder: str | Path) -> Run:
    """Reads a working directory.

    Raises:
        UserError: if it holds no finished evaluation, a damaged file, or lines that
            differ from the stages beside them.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(
            f"expected the results of a run in {path}, {_instead(folder, config)}"
        )
    # Read the times first: a run writes them last, so they cannot be newer.
    times = _read_lines(folder / "timings.jsonl")
    lines = _read_lines(path)
    for number, line in enumerate(lines, 1):
        _refuse_wrong(unusable(line), path, number)
    for number, line in enumerate(times, 1):
        # The other fields say in words what was timed.
        wrong = [key for key in not_numbers(line) if key.startswith("seconds")]
        _refuse_wrong(wrong, folder / "timings.jsonl", number)
    _require_published(folder, lines, times)
    path = folder / "harness.json"
    harness = read_json(path, REWRITE).get("results", []) if path.is_file() else []
    run = Run(folder, lines, times, config, harness)
    if not any(map(run.seeds, run.methods)):
        raise UserError(
            "expected at least one method with all domains evaluated in "
            f"{folder / 'results.jsonl'}, got none: run the same "
            f"{program_of(config)} command again, which continues"
        )
    return run


def _read_lines(path: Path) -> list[Line]:
    """Lines of JSON objects; empty for a missing file."""
    lines = []
    texts = path.read_bytes().splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"expected a JSON object in line {number} of {path}, got something "
                f"else: {REWRITE}"
            )
        lines.append(found)
    return lines


def _refuse_wrong(wrong: Sequence[str], path: Path, number: int) -> None:
    if wrong:
        raise UserError(
            f"expected a stage's result in line {number} of {path}, got one without a "
            f"usable {', '.join(wrong)}: {REWRITE}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """A run's `config.json`; empty if there is none."""
    path = folder / "config.json"
    config = read_config(folder) if path.is_file() else {}
    for key in ("training", "settings", "attack"):  # "settings" until 0.1
        if not isinstance(value := config.get(key, {}), dict):
            raise UserError(
                f"expected an object as '{key}' in {path}, got {json.dumps(value)}; "
                "it was damaged after it was written: restore it, or choose another "
                "folder"
            )
    return config


def _instead(folder: Path, config: Mapping[str, Any]) -> str:
    """Says what was found instead of a run, and what to do."""
    below = sorted(path.parent for path in folder.glob("*/results.jsonl"))
    if below:
        more = " ..." if len(below) > 2 else ""
        return f"found runs below it: name {' '.join(map(str, below[:2]))}{more}"
    if folder.is_file():
        return "found a file: name the folder that a run was given as --workdir"
    if "training" in config or "settings" in config:
        program = program_of(config)
        return f"found none: run the same {program} command again, which continues"
    return (
        f"found {'none' if folder.exists() else 'no such folder'}: run "
        f"'python -m experiments.run PRESET --workdir {folder}' first"
    )


def _require_published(
    folder: Path, lines: Sequence[Line], times: Sequence[Line]
) -> None:
    """Compares `results.jsonl` with the finished stages, if both exist.

    The lines are derived from the stages' records, which hold digests, and have no
    digest of their own. So only this comparison shows that a line was edited or
    removed. A run publishes after each row, so stages may be ahead of the lines; stages
    that the times name were published. Lines without stages (a copy), or from versions
    that wrote no digests, are accepted as they are.

    Raises:
        UserError: naming the first line that differs, or for a damaged stage.
    """
    path = folder / "config.json"
    sealed = path.is_file() and DIGEST in json.loads(path.read_text(encoding="utf-8"))
    if not sealed or not any(folder.glob(f"stages/*/*/*/{RESULT}")):
        return

    def key(line: Line) -> str:
        names = ("method", "seed", "stage", "domain", "index")
        return json.dumps([line.get(name) for name in names])

    def place(record: Line) -> Path:
        return folder / "stages" / record["place"] / RESULT

    path = folder / "results.jsonl"
    published = {key(line) for line in (*lines, *times)}
    rows: dict[tuple[str, int | None], list[Line]] = {}
    for record in RunFolder(folder).lines(()):
        row = record["line"]["method"], record["line"]["seed"]
        rows.setdefault(row, []).extend([record] * (key(record["line"]) in published))
    for number, line in enumerate(lines, 1):
        left = rows.get((line["method"], line["seed"]))
        if not left:
            raise UserError(
                f"expected the line of a finished stage in line {number} of {path}, "
                f"got one of which there is none in {folder / 'stages'}: {REWRITE}"
            )
        record = left.pop(0)
        if line != record["line"]:
            raise UserError(
                f"expected line {number} of {path} as {place(record)} has it, got "
                f"another: {REWRITE}"
            )
    for left in rows.values():
        if left:
            raise UserError(
                f"expected after line {len(lines)} of {path} that of {place(left[0])}, "
                f"got none: {REWRITE}"
            )
