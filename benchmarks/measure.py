"""Compares runs: turns in both orders, medians, a table, JSON lines.

The load of a machine drifts, so compared runs take turns, in either order, and a ratio
is taken within a round. Speed is never a test: a ratio holds for the machine and the
versions in its line.

JAX is imported only when needed: a process that only starts others stays small, and a
peer need not have it.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

RESULTS = pathlib.Path("runs/bench")
"""Folder of the JSON lines, with one file for each command."""
PACKAGES = ("sbr_jax", "jax", "jaxlib", "optax", "flax", "numpy")
PEERS = ("torch", "transformers", "peft")

R = TypeVar("R")


# --- turns ------------------------------------------------------------------------


def interleave(runs: Mapping[str, Callable[[], R]], rounds: int) -> dict[str, list[R]]:
    """The results of each run in each round; every second round goes in reverse.

    >>> log = []
    >>> found = interleave({n: lambda n=n: log.append(n) or n for n in "ab"}, 2)
    >>> found, log
    ({'a': ['a', 'a'], 'b': ['b', 'b']}, ['a', 'b', 'b', 'a'])
    """
    found: dict[str, list[R]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            found[name].append(runs[name]())
    return found


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median, least and largest of ratios taken within rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Our measure over the peer's, in each round.

    >>> print(ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]))
    1.00 [0.50, 1.50]
    """
    found = [a / b for a, b in zip(ours, peer, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def planned_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Arguments, outputs and temporaries of the compiled program, in bytes."""
    import jax

    from sbr_jax.costs import devices

    return devices.planned_bytes(jax.jit(function).lower(*args).compile())


# --- what stands in a line ----------------------------------------------------------


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, and load of the machine."""
    processor = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
        processor = names[0] if names else processor
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor,
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# --- tables -------------------------------------------------------------------------


class Report:
    """A table on the terminal, printed row by row, and JSON lines.

    Args:
      name: of the command.
      columns: titles and widths; a row's cells are strings in this order.
      args: of the command; ``--json`` names the file of lines.
      about: what every line also states: versions of the peer, the device.
    """

    def __init__(
        self,
        name: str,
        columns: Mapping[str, int],
        args: argparse.Namespace,
        about: Mapping[str, Any] | None = None,
    ):
        """Prints the head of the table."""
        self._name, self._widths = name, list(columns.values())
        self._path = pathlib.Path(args.json or RESULTS / f"{name}.jsonl")
        self._common = {
            "benchmark": name,
            "commit": commit(),
            "versions": versions(PACKAGES),
            "machine": machine(),
            "arguments": {k: v for k, v in vars(args).items() if k != "json"},
            **(about or {}),
        }
        where = self._common["machine"]
        print(f"{name}: {where['processor']}, {where['cores']} cores", end="")
        print(f", load {where['load']}; {self._common['commit']}")
        self._line(columns)

    def _line(self, cells: Iterable[str]) -> None:
        pairs = zip(cells, self._widths, strict=True)
        # Words are left-aligned, numbers right-aligned.
        text = [x.ljust(-w) if w < 0 else x.rjust(w) for x, w in pairs]
        print(" ".join(text).rstrip(), flush=True)

    def row(self, cells: Sequence[str], values: Mapping[str, Any]) -> None:
        """Prints a row and appends its numbers to the file of JSON lines."""
        self._line(cells)
        line = {**self._common, "date": time.strftime("%FT%TZ", time.gmtime())}
        line |= {k: _plain(v) for k, v in values.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True, default=str) + "\n")

    def close(self, *notes: str) -> None:
        """Prints remarks on the table, then where the lines are."""
        for note in notes:
            print(note)
        print(f"lines of JSON: {self._path}")


PAIR = {
    "case": -18,
    "ours": -24,
    "beside": -24,
    "ours ms": 10,
    "its ms": 10,
    "time ×": 19,
    "memory ×": 9,
}


class Pairs(Report):
    """A table in which every row compares two runs of one case."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        about: Mapping[str, Any] | None = None,
    ):
        """Prints the head of the table."""
        super().__init__(name, PAIR, args, about)
        self._rounds = args.rounds

    def measure(
        self,
        case: str,
        runs: Mapping[str, Callable[[], float]],
        pairs: Iterable[tuple[str, str]],
        *,
        memory: Mapping[str, int] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Runs all in turn and prints a row for each pair.

        Args:
          case: label of the rows.
          runs: calls that return their seconds; the first call is not counted.
          pairs: names of two runs each.
          memory: bytes of those runs for which they are known.
          more: further values for the JSON lines.

        Returns:
          Median seconds of each run.
        """
        memory = memory or {}
        for run in runs.values():
            run()
        found = interleave(runs, self._rounds)
        middle = {name: statistics.median(times) for name, times in found.items()}
        for ours, peer in pairs:
            time_ratio = ratio(found[ours], found[peer])
            values = {
                "case": case,
                "ours": ours,
                "beside": peer,
                "seconds": middle[ours],
                "peer_seconds": middle[peer],
                "time": time_ratio,
                **(more or {}),
            }
            share = ""
            if ours in memory and peer in memory:
                values["memory"] = memory[ours] / memory[peer]
                values["bytes"] = memory[ours]
                share = f"{values['memory']:.2f}"
            times = [f"{1e3 * middle[name]:.2f}" for name in (ours, peer)]
            self.row([case, ours, peer, *times, str(time_ratio), share], values)
        return middle


def timed(call: Callable[..., Any], *args: Any, calls: int = 1) -> Callable[[], float]:
    """A run for :meth:`Pairs.measure`: seconds of a JAX call until its result."""
    import jax

    def run() -> float:
        start = time.perf_counter()
        found = None
        for _ in range(calls):
            found = call(*args)
        jax.block_until_ready(found)
        return (time.perf_counter() - start) / calls

    return run


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Ratio) else value


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every command has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    made.add_argument("--json", metavar="FILE", help=f"default: {RESULTS}/NAME.jsonl")
    made.add_argument("--rounds", type=int, help="turns of each run; even is fair")
    made.add_argument("--peers", metavar="PYTHON", help="interpreter with torch")
    return made


def options(doc: str | None, given: list[str] | None) -> argparse.Namespace:
    """Parses the command line of a command without options of its own."""
    args = parser(doc).parse_args(given)
    args.rounds = args.rounds or (2 if args.smoke else 6)
    return args
