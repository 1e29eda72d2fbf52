"""Sharing a run's variants and seeds among processes, each in its own folder.

The command starts itself once for each process and passes that process's variants and
seeds with `--only`. When all have ended, it gathers their stages and finds everything
finished.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from sbr_jax import errors, files, storage
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli, job, terminal
from sbr_jax.programs.job import Job
from sbr_jax.typing import UserError

Jobs = int | Literal["auto"]
ORDER = (*METHODS, *VARIANTS)
"""Variants, in the order of `results.jsonl`."""
MOST = 1000
"""Largest number of processes; a larger one is a typing mistake."""


def check(wanted: Job, jobs: Jobs, only: Sequence[str] | None) -> None:
    """Refuses a wrong `--jobs`, or an `--only` that the job does not contain."""
    if jobs != "auto" and not 1 <= jobs <= MOST:
        raise UserError(f"--jobs: expected auto, or from 1 to {MOST}, got {jobs}")
    if only is not None:  # It may be empty: a shell variable that is not set.
        errors.check_some("variant and seed", only)
        errors.check_names("variant and seed", only, named(pairs(wanted)))
    if jobs == 1:
        return
    if only is not None:
        raise UserError(f"--jobs {jobs} with --only: expected one of the two; drop one")
    if wanted.config.hardware.mesh is not None and jobs != "auto":
        raise UserError(
            f"--jobs {jobs} with a mesh: expected one process, as a mesh has all "
            "devices; drop one"
        )
    files.require_disk(wanted.workdir)


def pairs(wanted: Job) -> list[tuple[str, int]]:
    """The variants and seeds of a job, in order."""
    return [(name, seed) for name in wanted.methods for seed in wanted.seeds]


def named(chosen: Sequence[tuple[str, int]]) -> list[str]:
    """Variants and seeds as words of `--only`.

    >>> named([("plain", 0), ("lean", 3)])
    ['plain/0', 'lean/3']
    """
    return [f"{variant}/{seed}" for variant, seed in chosen]


def shares(left: list[tuple[str, int]], count: int) -> list[list[tuple[str, int]]]:
    """Every process's part; they begin as far apart among the variants as they can.

    Every second process goes backwards through the variants. So each variant's programs
    are compiled by one process, long before another comes to it and finds them.

    >>> names = ("plain", "ewc", "lean")
    >>> left = [(variant, seed) for variant in names for seed in (0, 1)]
    >>> [named(own) for own in shares(left, 2)]
    [['ewc/0', 'lean/0', 'plain/0'], ['plain/1', 'lean/1', 'ewc/1']]
    """
    names = list(dict.fromkeys(variant for variant, _ in left))
    parts = []
    for index in range(count):
        first = len(names) * (count - 1 - index) // count
        order = names[first:] + names[:first]
        if index % 2:
            order = [order[0], *reversed(order[1:])]
        parts.append(sorted(left[index::count], key=lambda one: order.index(one[0])))
    return parts


def chosen(wanted: Job, only: Sequence[str]) -> Iterator[Job]:
    """One job for each variant in `--only`, in its order, with its seeds there."""
    for variant in dict.fromkeys(one.rpartition("/")[0] for one in only):
        seeds = tuple(s for s in wanted.seeds if f"{variant}/{s}" in only)
        yield dataclasses.replace(wanted, methods=(variant,), seeds=seeds)


def processes(wanted: Job, jobs: Jobs, left: int) -> int:
    """The number of processes for the remaining work; `auto` gives one per core.

    Raises:
        UserError: if several would share an accelerator.
    """
    if jobs == "auto" and wanted.config.hardware.mesh is not None:
        return 1
    import jax

    on = jax.default_backend()
    if on != "cpu":
        if jobs == "auto":
            return 1
        raise UserError(
            f"--jobs {jobs}: expected one process, as all would share one {on}; drop it"
        )
    return min(len(cores()) if jobs == "auto" else jobs, left)


def gather(wanted: Job) -> None:
    """Moves in the stages that an earlier command left in folders of parts.

    Raises:
        UserError: for parts of another run; then no part is touched.
    """
    if not storage.has_parts(wanted.workdir):
        return
    from sbr_jax.training import parts

    for part in parts.found(wanted.workdir):
        job.check_settings(wanted, part)
    parts.gather(wanted.workdir, ORDER)


def execute(wanted: Job, words: Sequence[str], jobs: Jobs) -> None:
    """Runs the remaining work in several processes and gathers it in the job's folder.

    However this process ends, no other outlives it, and the next command on the same
    folder finds all finished stages.

    Raises:
        UserError: for a folder of another run, or processes that were killed.
        SystemExit: with the code of a failed process, which has already said why.
    """
    from sbr_jax.training import locks, parts

    stages, config = wanted.workdir / "stages", wanted.workdir / "config.json"
    if stages.exists() and not config.exists():
        return  # A single process checks the stages and writes the config anew.
    job.check_folder(wanted)
    left = parts.unfinished(wanted.workdir, pairs(wanted), wanted.domains)
    count = processes(wanted, jobs, len(left))
    if count < 2:
        return
    with locks.taken(wanted.workdir):
        running: list[_Process] = []
        said = _Said()
        try:
            for index, own in enumerate(shares(left, count)):
                folder = parts.hand_out(wanted.workdir, str(index), own)
                command = _command(words, wanted, folder, own)
                with on(cores()[index::count]):
                    running.append(_Process(command, said))
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.end()
    parts.gather(wanted.workdir, ORDER)
    if killed := [-code for code in codes if code < 0]:
        raise UserError(
            f"{len(killed)} of {count} processes were killed (signal {killed[0]}): run "
            "the same command again, with fewer --jobs if memory was short"
        )
    if any(codes):
        if max(codes) in (cli.EXIT_INTERRUPTED, cli.EXIT_TERMINATED):
            terminal.complain(cli.KEPT)
        raise SystemExit(max(codes))


def _command(
    words: Sequence[str], wanted: Job, folder: Path, own: Sequence[tuple[str, int]]
) -> list[str]:
    """The command line of a part: the same command in another folder."""
    # At the end, this process runs lm-eval on the whole.
    given = ("--workdir", "--jobs", "--harness", "--harness-limit", "--study.date")
    command = [*terminal.python("sbr_jax.programs"), "run", *without(words, *given)]
    date = getattr(wanted.study, "date", None)
    if date is not None:  # So that midnight cannot fall between two processes.
        command.append(f"--study.date={date}")
    # With "=", a folder that begins with a dash does not look like an option.
    return [*command, f"--workdir={folder}", "--only", *named(own)]


def without(words: Sequence[str], *options: str) -> list[str]:
    """A command line without some options and their values.

    >>> words = ["demo", "--harness", "bbq", "mmlu", "--quiet", "--harness_limit=2"]
    >>> without(words, "--harness", "--harness-limit")
    ['demo', '--quiet']
    """
    kept, inside = [], False
    for word in words:
        if word.startswith("--"):
            inside = word.partition("=")[0].replace("_", "-") in options
        if not inside:
            kept.append(word)
    return kept


class _Said:
    """Passes on the lines of several processes, whole and as they come.

    The same complaint from two processes is printed once. Only this process itself
    prints that finished stages are kept.
    """

    def __init__(self):
        self._complaints, self._lock = {cli.KEPT}, threading.Lock()

    def __call__(self, line: str, to: IO[str]) -> None:
        text = line.strip()
        with self._lock:
            if text in self._complaints:
                return
            if text.startswith(("error: ", "warning: ")):
                self._complaints.add(text)
            print(line, end="", file=to, flush=True)


class _Process:
    """A process that passes on its lines."""

    def __init__(self, command: Sequence[str], said: _Said):
        environment = {**os.environ, terminal.PARENT: str(os.getpid())}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            command, env=environment, text=True, errors="replace", **streams
        )
        self._said, self._failed = said, []
        pipes = (self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)
        # Daemon threads: if this process is ended twice, it does not wait for them.
        self._readers = [
            threading.Thread(target=self._pass_on, args=pair, daemon=True)
            for pair in pipes
        ]
        for reader in self._readers:
            reader.start()

    def _pass_on(self, lines: IO[str], to: IO[str]) -> None:
        with lines:
            try:
                for line in lines:
                    self._said(line, to)
            except OSError as error:
                self._failed.append(error)  # The closed pipe then ends the process.

    def wait(self) -> int:
        """Its exit code, once it has ended and all its lines are passed on.

        Raises:
            OSError: if its lines could not be passed on.
        """
        code = self.end()
        for error in self._failed:
            raise error
        return code

    def terminate(self) -> None:
        """Asks the process to end, if it runs; it saves its work first."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> int:
        """Waits until it has ended and all its lines are passed on."""
        for reader in self._readers:
            reader.join()
        return self._process.wait()


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def on(own: Sequence[int]) -> Iterator[None]:
    """Starts processes on some cores only, if the system supports that.

    XLA starts a thread for each core that it sees. If every process used all cores,
    they would wait for each other.
    """
    if not own or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
