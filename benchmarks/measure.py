"""Measuring beside a peer: turns in both orders, medians, a table, lines of JSON.

Other work on a machine drifts, so what is compared takes turns, once in either order,
and a ratio is taken inside a turn. Speed is never a test: a ratio holds for the machine
and the versions that stand in its line.

Nothing here imports JAX before it is needed: a process that only starts others stays
small, and a peer need not have it.
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
"""Where the lines of JSON go, one file a command."""
PACKAGES = ("sbr_jax", "jax", "jaxlib", "optax", "flax", "numpy")
PEERS = ("torch", "transformers", "peft")

R = TypeVar("R")


# --- turns ------------------------------------------------------------------------


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of each of ``repeats`` calls, after one that is not counted."""
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times


def beside(
    ours: Callable[[], Any], peer: Callable[[], Any], repeats: int = 5
) -> tuple[float, float]:
    """Median seconds of both, run in both orders, as other work may drift."""
    first, second = [], []
    for order in ((0, 1), (1, 0)):
        for which in order:
            if which == 0:
                first += seconds(ours, repeats)
            else:
                second += seconds(peer, repeats)
    return statistics.median(first), statistics.median(second)


def interleave(runs: Mapping[str, Callable[[], R]], rounds: int) -> dict[str, list[R]]:
    """What each run returns in each round, every second round in reverse.

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
    """Median of ratios taken inside rounds, with the least and the largest."""

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

    plan: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    return int(
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


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
    """Processor, cores that may be used, memory, and how busy the machine is."""
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
    """The commit of the working tree, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# --- tables -------------------------------------------------------------------------


class Report:
    """A table on the terminal, a line for each row as it is measured, and JSON lines.

    Args:
      name: of the command.
      columns: titles and widths; a row's cells are strings in this order.
      args: of the command; ``--json`` says where lines go.
      about: what every line says besides: versions of the peer, the device.
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
        # Words stand left, numbers right.
        text = [x.ljust(-w) if w < 0 else x.rjust(w) for x, w in pairs]
        print(" ".join(text).rstrip(), flush=True)

    def row(self, cells: Sequence[str], values: Mapping[str, Any]) -> None:
        """Prints a row and appends its numbers to the file of JSON lines."""
        self._line(cells)
        line = {**self._common, "time": time.strftime("%FT%TZ", time.gmtime())}
        line |= {k: _plain(v) for k, v in values.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True, default=str) + "\n")

    def close(self, *notes: str) -> None:
        """Says where the lines are, after remarks on the table."""
        for note in notes:
            print(note)
        print(f"lines of JSON: {self._path}")


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
    return made
