"""Output streams of a program, and the signals that end it."""

import codecs
import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator

from sbr_jax.distributed import stopping
from sbr_jax.distributed.errors import Terminated

PARENT = "SBR_JAX_ENDS_WITH"
"""Environment variable with the id of the process that this one must end with."""
OUTPUT = "standard output"
"""File name in the error for a failure to print."""
SPELT = str.maketrans(
    {"→": "->", "–": "-", "−": "-", "±": "+/-", "×": "x", "…": "...", "κ": "kappa"}
)
"""Replacements for our special characters on terminals that lack them."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Turns SIGTERM, which would kill the process silently, into `Terminated`.

    A training loop first saves itself at its next step, then raises it. If the signal
    has another handler or is ignored, that stays so.
    """

    def stop(number: int, frame: object) -> None:
        if not stopping.ask():
            raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent() -> None:
    """Ends this process when the one that `PARENT` names ends, however it ends.

    This works on Linux only; elsewhere a killed parent leaves its processes running.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    # A kill does no harm: the next run continues.
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def python(module: str) -> list[str]:
    """The command that runs a module in a new process with the same search path.

    By default Python searches the working directory first, where a user's file may have
    the name of a package. The command prevents that if this process does not search it.
    """
    here = {"", os.getcwd()} & set(sys.path)
    return [sys.executable, *([] if here else ["-P"]), "-m", module]


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(SPELT)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("spelt", _spell)


def _open_streams() -> None:
    """Gives closed streams a descriptor, so that no result file gets their number.

    Writing to a closed standard output fails, as in any program.
    """
    ways = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)
    for descriptor, way in enumerate(ways):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, way)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


class _Output(io.TextIOWrapper):
    """Standard output whose write errors name it."""

    def write(self, text: str) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # Not a failure: the reader has closed the pipe.
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), OUTPUT) from None


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Makes every text printable, and ensures that both streams exist."""
    _open_streams()
    plain, complaints = sys.stdout, sys.stderr
    if isinstance(complaints, io.TextIOWrapper):
        complaints.reconfigure(errors="spelt")
    if not isinstance(plain, io.TextIOWrapper) or isinstance(plain, _Output):
        yield
        return
    plain.flush()
    sys.stdout = named = _Output(
        plain.buffer,
        encoding=plain.encoding,
        errors="spelt",
        line_buffering=plain.line_buffering,
        write_through=plain.write_through,
    )
    try:
        yield
    finally:
        named.detach()
        sys.stdout = plain


def silence_output() -> None:
    """Drops buffered output, which Python would try to print again on exit."""
    with contextlib.suppress(OSError):  # Without a descriptor there is nothing to do.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def complain(line: str) -> None:
    """Prints a line on standard error, if that still works."""
    with contextlib.suppress(OSError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)
