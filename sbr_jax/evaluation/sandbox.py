"""A sandbox for programs that a model wrote.

Nothing runs unless the caller allows it. Each program gets a fresh interpreter
(isolated, without site packages: the standard library only), an empty environment, its
own session, no standard input, and an empty temporary working folder that is removed
afterwards. Memory, processor time, open files, file size and output are limited, as is
wall-clock time, after which the whole process group is killed. The program ends when
the process that started it ends, for whatever reason (on Linux); if even that fails, or
elsewhere, an alarm of its own ends it.

**Two processes.** The program runs in a worker. Its test (:class:`Trial`) runs in a
judge, the worker's parent. The judge calls the worker's function with plain data and
gets plain data back: numbers, texts, lists, tuples, dicts and sets, rebuilt from
Python's own types. The program sees neither the check nor the token that marks success.
So reading frames, an ``__eq__`` that is always true, a trace function that jumps over
the asserts or a changed built-in affect only the program itself. A value of any other
type equals nothing, and a function's changes to its arguments stay in the worker.

**What holds.** With ``isolation="kernel"`` (Linux on x86-64 with Landlock) two kernel
filters are installed before the first line of the program. Seccomp permits only the
system calls that reading, computing and printing need. Starting a process or thread,
opening a socket, opening any file for writing (even inside its own folder), deleting,
renaming, mounting, signalling others, and raising a limit fail with EPERM, also for
root. Landlock permits opening only the standard library, the system's libraries and the
empty folder: no file of the user, and no environment or memory of any process under
``/proc``. A Python audit hook refuses the same things first, with clearer messages.
With ``isolation="audit"`` (elsewhere) there is only the hook, which Python does not
call a sandbox: code that sets out to escape can, and can then reach the judge too.

**What does not hold.** A program can ask whether a path exists, its size and its owner
(stat). A program without a check (:func:`run_python` of a text) reports its own end, so
a program can falsely claim to have finished: "passed" then proves nothing more. A check
sees values, not how they were computed: a program that guesses right passes. Side
channels of the processor (timing) are out of scope.
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
"""Exit codes of the judge, see ``sandbox_child``."""
_LANDLOCK_CREATE = 444


class Ending(enum.Enum):
    """How a program ended."""

    PASSED = "passed"
    """It ran to its end without an exception."""
    FAILED = "failed"
    """An exception, a refusal of the sandbox, or an early exit."""
    TIMEOUT = "timeout"
    """It ran out of wall-clock or processor time."""
    MEMORY = "memory"
    """It asked for more memory than allowed."""
    OUTPUT = "output"
    """It printed too much and was stopped."""
    KILLED = "killed"
    """A signal ended it (a crash of the interpreter)."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A program that defines a function, and the check that the function must pass.

    Attributes:
      program: untrusted source.
      entry_point: the function's name.
      setup: trusted source that the check needs (helpers); runs in the same process.
      check: trusted source in which ``entry_point`` is the program's function; an
        exception means failure.
    """

    program: str
    entry_point: str
    setup: str
    check: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed (last, the name of its error)."""

    ending: Ending
    output: str

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.ending is Ending.PASSED


@functools.cache
def kernel_isolation() -> bool:
    """Whether this machine can confine a program with kernel filters."""
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
    """Runs one program and reports how it ended.

    Args:
      program: Python source, or a function and its check.
      allow_code_execution: must be True, since the program is untrusted.
      seconds: wall-clock limit of the program; processor time may be twice that.
      memory_mb: limit of the address space, in MiB.
      max_output: characters of output kept; more ends the program.
      isolation: ``"kernel"`` or ``"audit"``; the module says what each guarantees.

    Raises:
      UserError: if running is not allowed, a limit is not positive, the machine lacks
        this isolation, or the sandbox cannot be set up.
    """
    _check(allow_code_execution, seconds, memory_mb, max_output, isolation)
    trial = Trial(program, "", "", "") if isinstance(program, str) else program
    # Only the judge knows these two, and the check.
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
    """Runs programs in parallel; results keep the given order.

    Args:
      programs: Python sources, or functions and their checks.
      workers: how many run at once (None: as many as processors).
      **options: of :func:`run_python`.
    """
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, min(workers, len(programs)))) as pool:
        try:
            return list(pool.map(lambda p: run_python(p, **options), programs))
        finally:
            # After an interrupt no further program may start.
            pool.shutdown(wait=False, cancel_futures=True)


def _note(content: Mapping[str, object]) -> IO[bytes]:
    """An anonymous file that holds JSON, to read from."""
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

    The program's clock starts when the inside reports that it has begun, so that a slow
    start on a busy machine does not count. If a limit is broken, the process group is
    killed.

    Returns:
      What the program printed, and the limit that it broke, if any.
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
        # Not waited for yet, so nobody else can have the group's number.
        os.killpg(process.pid, signal.SIGKILL)
    return bytes(output), ending


def _outcome(output: bytes, ending: Ending | None, status: int, done: bytes) -> Outcome:
    finished = output.endswith(done) and status == 0
    text = output.removesuffix(done).decode(errors="replace").strip()
    if ending is None:
        # If a signal ended the judge itself, the status is its negative number.
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
