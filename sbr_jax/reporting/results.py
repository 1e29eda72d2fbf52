"""Reading a working directory back: `results.jsonl`, `timings.jsonl`, `config.json`.

And `harness.json`, where lm-eval was run.

A `Run` answers the questions that tables and figures ask, and nothing else touches the
files. What a run does not hold (no probe, no composite, one method only) is simply
absent: the answers are then empty, never invented.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.reporting.published import require_published
from sbr_jax.training import code_record
from sbr_jax.training.records import read_json
from sbr_jax.training.run_folder import RunFolder, read_config
from sbr_jax.training.stage_records import not_numbers, unusable
from sbr_jax.typing import UserError

REWRITE = "run the same command again, which writes the file anew"
DOMAIN_PREFIX = "accuracy/"
"""Metrics of single domains are named `accuracy/DOMAIN`."""
PROGRAMS = {"attack": "experiments.attack", "analysis": "experiments.analyse"}
"""Whose run it is where `config.json` has the key; others are of experiments.run."""


def program_of(config: Mapping[str, Any]) -> str:
    """Name the program whose run a `config.json` is of.

    >>> program_of({"settings": {}, "attack": {"name": "poison"}})
    'experiments.attack'
    """
    found = (program for key, program in PROGRAMS.items() if key in config)
    return next(found, "experiments.run")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read lines of JSON objects; a missing file is an empty list.

    Raises:
        UserError: for a line that is none.
    """
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
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


def layers_by_unit(value: Any) -> dict[str, np.ndarray]:
    """Bring a diagnostic into the form `{unit: array}`; None is `{}`.

    >>> layers_by_unit({"q_proj": [1, 2]})["q_proj"].tolist()
    [1.0, 2.0]
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        value = {"all": value}
    out = {}
    for unit, layers in value.items():
        if isinstance(layers, list) and layers and isinstance(layers[0], list):
            width = max(len(layer) for layer in layers)
            padded = [layer + [0.0] * (width - len(layer)) for layer in layers]
            out[unit] = np.asarray(padded, np.float64)
        else:
            out[unit] = np.atleast_1d(np.asarray(layers, np.float64))
    return out


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one working directory.

    Attributes:
        folder: where they were read.
        lines: of `results.jsonl`.
        timings: of `timings.jsonl`.
        config: `config.json`, or empty.
        harness: entries of `harness.json`, or none.
    """

    folder: Path
    lines: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    config: dict[str, Any]
    harness: list[dict[str, Any]] = dataclasses.field(default_factory=list)

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

    def seeds(self, method: str) -> list[int]:
        """Seeds with all domains finished, in order."""
        found: dict[int, int] = {}
        for line in self._of("evaluate", method=method):
            found[line["seed"]] = found.get(line["seed"], 0) + 1
        return sorted(seed for seed, n in found.items() if n == len(self.domains))

    def _of(self, stage: str, **match: Any) -> Iterator[dict[str, Any]]:
        for line in self.lines:
            if line["stage"] == stage and all(line[k] == v for k, v in match.items()):
                yield line

    @functools.cached_property
    def base(self) -> dict[str, float]:
        """Metrics of the aligned model, before any fine-tuning."""
        for line in self._of("base"):
            return line.get("metrics") or {}
        return {}

    def _evaluations(self, method: str) -> list[list[dict[str, Any]]]:
        """Metrics after each domain, per seed, in the order of the file."""
        return [
            [x["metrics"] for x in self._of("evaluate", method=method, seed=seed)]
            for seed in self.seeds(method)
        ]

    def metric(self, method: str, name: str) -> np.ndarray:
        """Return a metric after each stage, `[seeds, 1 + domains]`.

        Empty (`[0, 1 + domains]`) where the run does not have it; NaN where only the
        aligned model's value is missing.
        """
        start = self.base.get(name, np.nan)
        rows = [[start, *(m.get(name) for m in ms)] for ms in self._evaluations(method)]
        rows = [row for row in rows if None not in row]
        return np.asarray(rows, np.float64).reshape(len(rows), 1 + len(self.domains))

    def accuracy(self, method: str, *, at_end: bool = False) -> np.ndarray:
        """Return the accuracy of each domain, `[seeds, domains]`.

        Args:
            method: the row.
            at_end: after the last domain instead of right after its own.
        """
        rows = []
        for stages in self._evaluations(method):
            when = [stages[-1]] * len(stages) if at_end else stages
            rows.append(
                [
                    metrics.get(DOMAIN_PREFIX + domain)
                    for metrics, domain in zip(when, self.domains, strict=True)
                ]
            )
        rows = [row for row in rows if None not in row]
        return np.asarray(rows, np.float64).reshape(len(rows), len(self.domains))

    def diagnostics(self, method: str, stage: str, name: str) -> list[tuple[int, Any]]:
        """Return `(domain index, value)` of a diagnostic, for the first seed with it.

        The aligned model's own subspace has the index −1.
        """
        for seed in self.seeds(method):
            found = []
            for line in self._of(stage, method=method, seed=seed):
                value = (line.get("diagnostics") or {}).get(name)
                if value is not None:
                    domain = line.get("domain")
                    index = self.domains.index(domain) if domain else -1
                    found.append((index, value))
            if found:
                return found
        return []

    def values(self, method: str, stage: str, group: str, key: str) -> list[float]:
        """Return all numbers under a key of `metrics` or `diagnostics`, flattened."""
        found: list[float] = []
        for line in self._of(stage, method=method):
            for part in layers_by_unit((line.get(group) or {}).get(key)).values():
                found += part.ravel().tolist()
        return found

    def code(self, method: str) -> str | None:
        """Return the hash of the code that decided a row, "mixed" for several.

        None where a seed's is not known: before runs recorded it, or elsewhere.
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
        """Return repairs per seed; None where nothing was monitored."""
        seeds = self.seeds(method)
        lines = [x for x in self._of("repair", method=method) if x["seed"] in seeds]
        if not seeds or not lines:
            return None
        fired = [x for x in lines if (x["metrics"].get("blocks") or 0) > 0]
        return len(fired) / len(seeds)

    def seconds_per_step(self, method: str) -> float | None:
        """Return the median time of a training step; None if unknown."""
        values = [
            line["seconds_per_step"]
            for line in self.timings
            if line.get("method") == method
            and line.get("stage") == "train"
            and line.get("seconds_per_step") is not None
        ]
        return float(np.median(values)) if values else None


def read_run(folder: str | Path) -> Run:
    """Read a working directory.

    Raises:
        UserError: when it holds no finished evaluation, a damaged file, or lines that
            are not those of the stages beside them.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(
            f"expected the results of a run in {path}, {_instead(folder, config)}"
        )
    # First the times, which a run writes last: these are then of no later state.
    times = read_lines(folder / "timings.jsonl")
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if wrong := unusable(line):
            raise _damaged(path, number, wrong)
    for number, line in enumerate(times, 1):
        # The other fields say whose time it is, in words.
        if wrong := [key for key in not_numbers(line) if key.startswith("seconds")]:
            raise _damaged(folder / "timings.jsonl", number, wrong)
    require_published(folder, lines, times, REWRITE)
    harness = []
    if (folder / "harness.json").is_file():
        harness = read_json(folder / "harness.json", REWRITE).get("results", [])
    run = Run(folder, lines, times, config, harness)
    if not any(run.seeds(method) for method in run.methods):
        raise UserError(
            f"expected at least one method with all domains evaluated in {path}, got "
            f"none: run the same {program_of(config)} command again, which continues"
        )
    return run


def _read_config(folder: Path) -> dict[str, Any]:
    """A run's `config.json`, or nothing where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_config(folder)
    for key in ("settings", "attack"):
        if not isinstance(value := config.get(key, {}), dict):
            raise UserError(
                f"expected an object as '{key}' in {path}, got {json.dumps(value)}; "
                "it was damaged after it was written: restore it, or choose another "
                "folder"
            )
    return config


def _damaged(path: Path, number: int, wrong: Sequence[str]) -> UserError:
    """The refusal of a line that no run has written so."""
    return UserError(
        f"expected a stage's result in line {number} of {path}, got one without a "
        f"usable {', '.join(wrong)}: {REWRITE}"
    )


def _instead(folder: Path, config: Mapping[str, Any]) -> str:
    """What stands where a run was expected, and what to do."""
    below = sorted(path.parent for path in folder.glob("*/results.jsonl"))
    if below:
        more = " ..." if len(below) > 2 else ""
        return f"found runs below it: name {' '.join(map(str, below[:2]))}{more}"
    if folder.is_file():
        return "found a file: name the folder that a run was given as --workdir"
    if "settings" in config:
        program = program_of(config)
        return f"found none: run the same {program} command again, which continues"
    return (
        f"found {'none' if folder.exists() else 'no such folder'}: run "
        f"'python -m experiments.run PRESET --workdir {folder}' first"
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read working directories, each of them once.

    Raises:
        UserError: for none, for one that is named twice, and as :func:`read_run`.
    """
    if not folders:
        raise UserError("expected at least one working directory, got none: add DIR...")
    seen: set[Path] = set()
    for folder in folders:
        place = Path(folder).resolve()
        if place in seen:
            raise UserError(f"expected each folder once, got {folder} twice: drop one")
        seen.add(place)
    return [read_run(folder) for folder in folders]
