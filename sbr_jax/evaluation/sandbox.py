"""Sandbox for programs that a model wrote.

Nothing runs unless the caller allows it. Each program gets a fresh interpreter
(isolated, without site packages: the standard library only) with an empty environment,
its own session, an empty temporary working folder that is removed afterwards, no
standard input, limits on memory, processor time, open files and file size, a limit of
wall-clock time after which its whole process group is killed, and a limit on what it
may print. It ends when the process that started it does, however that ends, and by an
alarm of its own where even that fails (on Linux; elsewhere by the alarm alone).

**Two processes.** The program runs in a worker. What it is tested with (:class:`Trial`)
runs in a judge, the worker's parent, which calls the worker's function with plain data
and gets plain data back: numbers, texts, lists, tuples, dicts and sets, made anew of
Python's own types. The program sees neither the check nor what marks a success, so
reading frames, an ``__eq__`` that is always true, a trace function that jumps over the
asserts or a changed built-in reach nobody but itself. A value of any other type equals
nothing, and what a function does to its arguments stays in the worker.

**What holds.** With ``isolation="kernel"`` (Linux on x86-64 with Landlock) two kernel
filters are put on before the first line of the program. Seccomp lets through only the
system calls that reading, computing and printing need: starting a process or thread,
opening a socket, opening any file for writing (also inside its own folder), deleting,
renaming, mounting, signalling others, and raising a limit fail with EPERM, for root
too. Landlock lets nothing be opened but the standard library, the system's libraries
and the empty folder: no file of the user, no environment and no memory of any process
under ``/proc``. A Python audit hook refuses the same things first, in clearer words.
With ``isolation="audit"`` (elsewhere) there is the hook alone, which Python does not
call a sandbox: code that sets out to escape can, and can then reach the judge too.

**What does not hold.** That a path exists, its size and its owner can be asked (stat).
A program without a check (:func:`run_python` of a text) reports its own end, so that
one which sets out to can claim it early: "passed" then says no more than that. A check
sees values, not how they were come by: who guesses what is asked passes. The
processor's own leaks (timing) are out of scope.
"""

import ctypes
import dataclasses
import enum
import functools
import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from sbr_jax.typing import UserError

START_SECONDS = 60.0
"""Time that an interpreter may take to start."""

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY, _SIGNALLED = 3, 128
"""Exit codes of the judge, see there."""
_LANDLOCK_CREATE = 444


class Ending(enum.Enum):
    """End of a program."""

    PASSED = "passed"
    """It ran to its end without an exception."""
    FAILED = "failed"
    """An exception, a refusal of the sandbox, or an early exit."""
    TIMEOUT = "timeout"
    """Out of wall-clock or processor time."""
    MEMORY = "memory"
    """It asked for more memory than it may have."""
    OUTPUT = "output"
    """It printed too much and was stopped."""
    KILLED = "killed"
    """A signal ended it (a crash of the interpreter)."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A program that defines a function, and the check that the function must pass.

    Attributes:
      program: source that is not trusted.
      entry_point: the function's name.
      setup: trusted source that the check needs (helpers); run where the check is.
      check: trusted source, for which ``entry_point`` is the program's function; an
        exception is a failure.
    """

    program: str
    entry_point: str
    setup: str
    check: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """End of a program, and what it printed (its error's name last)."""

    ending: Ending
    output: str

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.ending is Ending.PASSED


@functools.cache
def kernel_isolation() -> bool:
    """Whether this machine can hold a program with kernel filters."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return False
    # Asks for Landlock's version; changes nothing.
    return ctypes.CDLL(None).syscall(_LANDLOCK_CREATE, None, 0, 1) > 0


def run_python(
    program: str | Trial,
    *,
    allow_code_execution: bool = False,
    seconds: float = 3.0,
    memory_mb: int = 1024,
    max_output: int = 64 * 1024,
    isolation: str = "kernel",
) -> Outcome:
    """Runs one program and says how it ended.

    Args:
      program: Python source, or a function and its check.
      allow_code_execution: must be True: the program is not to be trusted.
      seconds: wall-clock limit of the program; twice that of processor time.
      memory_mb: limit of the address space, in MiB.
      max_output: characters of output kept; more ends the program.
      isolation: ``"kernel"`` or ``"audit"``; see the module for what each holds.

    Raises:
      UserError: running was not allowed, a limit is not positive, the machine has no
        isolation of that kind, or the sandbox could not be set up.
    """
    _check(allow_code_execution, seconds, memory_mb, max_output, isolation)
    trial = Trial(program, "", "", "") if isinstance(program, str) else program
    # Only the judge knows these two, and what it checks.
    begun, done = ("\0" + secrets.token_hex(16) for _ in range(2))
    orders = {
        "program": trial.program,
        "entry_point": trial.entry_point,
        "memory": memory_mb * 2**20,
        "cpu_seconds": max(1, round(2 * seconds)),
        "alarm": START_SECONDS + 2 * seconds,
        "kernel": isolation == "kernel",
        "parent": os.getpid(),
    }
    sealed = {"begun": begun, "done": done, "entry_point": trial.entry_point}
    sealed |= {"setup": trial.setup, "check": trial.check}
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        _note(orders) as note,
        _note(sealed) as secret,
    ):
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)]
        process = subprocess.Popen(
            [*command, str(secret.fileno())],
            stdin=note,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(secret.fileno(),),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        with process:
            try:
                output, ending = _watch(process, begun.encode(), seconds, max_output)
            except BaseException:  # An interrupt ends the program too.
                os.killpg(process.pid, signal.SIGKILL)
                raise
    before, mark, output = output.partition(begun.encode())
    if not mark:
        said = before.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(
            f"run_python: the sandbox did not start ({said or 'no word from it'}); "
            "use a machine that allows seccomp and Landlock, or isolation='audit'"
        )
    outcome = _outcome(output, ending, process.returncode, done.encode())
    return dataclasses.replace(outcome, output=outcome.output[:max_output])


def run_many(
    programs: Sequence[str | Trial], *, workers: int | None = None, **options
) -> list[Outcome]:
    """Runs programs side by side, in the given order of results.

    Args:
      programs: Python sources, or functions and their checks.
      workers: how many at once (None: as many as processors).
      **options: of :func:`run_python`.
    """
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, min(workers, len(programs)))) as pool:
        try:
            return list(pool.map(lambda p: run_python(p, **options), programs))
        finally:
            # After an interrupt no further program may begin.
            pool.shutdown(wait=False, cancel_futures=True)


def _note(content: Mapping[str, object]) -> IO[bytes]:
    """A nameless file to read from, which holds JSON."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(json.dumps(content).encode())
    file.seek(0)
    return file


def _check(
    allowed: bool, seconds: float, memory_mb: int, max_output: int, isolation: str
) -> None:
    if allowed is not True:
        raise UserError(
            "run_python: this runs code written by a model; pass "
            "allow_code_execution=True if that is what you want"
        )
    limits = {"seconds": seconds, "memory_mb": memory_mb, "max_output": max_output}
    for name, value in limits.items():
        if not value > 0:
            raise UserError(f"run_python: expected {name} above 0, got {value!r}")
    if isolation not in ("kernel", "audit"):
        raise UserError(
            f"run_python: expected isolation 'kernel' or 'audit', got {isolation!r}"
        )
    if isolation == "kernel" and not kernel_isolation():
        raise UserError(
            "run_python: isolation='kernel' needs Linux on x86-64 with Landlock (5.13 "
            f"or later, not switched off), this is {sys.platform} on "
            f"{platform.machine()} without; use a container and isolation='audit', "
            "which stops accidents only"
        )


def _watch(
    process: subprocess.Popen, begun: bytes, seconds: float, max_output: int
) -> tuple[bytes, Ending | None]:
    """Reads what a process prints until it ends or breaks a limit.

    The clock of the program starts when the inside says that it has begun, so that a
    busy machine's slow start is not the program's fault. Kills the process group where
    a limit is broken.

    Returns:
      What it printed, and the limit that it broke, if any.
    """
    deadline = time.monotonic() + START_SECONDS
    output, ending, started = bytearray(), None, False
    pipe = cast(IO[bytes], process.stdout).fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            wait = deadline - time.monotonic()
            if wait <= 0:
                ending = Ending.TIMEOUT
                break
            if not selector.select(wait):
                continue
            piece = os.read(pipe, 65536)
            output += piece
            if not started and begun in output:
                started, deadline = True, time.monotonic() + seconds
            if not piece:
                break
            if len(output) > max_output + 256:
                ending = Ending.OUTPUT
                break
    if ending is None:
        try:
            process.wait(max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            ending = Ending.TIMEOUT
    if ending is not None:
        # Not waited for yet, so the group's number cannot be somebody else's by now.
        os.killpg(process.pid, signal.SIGKILL)
    return bytes(output), ending


def _outcome(output: bytes, ending: Ending | None, status: int, done: bytes) -> Outcome:
    finished = output.endswith(done) and status == 0
    text = output.removesuffix(done).decode(errors="replace").strip()
    if ending is None:
        # A signal that ended the judge itself has its number below zero.
        killer = -status if status < 0 else status - _SIGNALLED
        if finished:
            ending = Ending.PASSED
        elif killer in (signal.SIGXCPU, signal.SIGALRM):
            ending = Ending.TIMEOUT
        elif status == _MEMORY:
            ending = Ending.MEMORY
        elif killer > 0:
            ending = Ending.KILLED
        else:
            ending = Ending.FAILED
    return Outcome(ending, text)
