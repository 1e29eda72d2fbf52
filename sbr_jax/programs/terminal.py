"""Streams of a program, and the signals that end it."""

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
"""Environment variable: the process with which this one ends."""
OUTPUT = "standard output"
"""What a failure to print calls its file."""
SPELT = str.maketrans(
    {"→": "->", "–": "-", "−": "-", "±": "+/-", "×": "x", "…": "...", "κ": "kappa"}
)
"""Signs of our tables and lines, for terminals that lack them."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises `Terminated` where SIGTERM would kill the process without a word.

    A training loop is asked to save itself first, at its next step, and raises it then.
    Whoever has set another handler, or ignores the signal, keeps it.
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
    """Ends this process with the one that `PARENT` names, however that ends.

    Linux only; elsewhere a killed parent leaves its processes running.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    # What a kill leaves is in order: the next run continues it.
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def python(module: str) -> list[str]:
    """The command that runs a module in a process of its own, as found from here.

    Python looks for it in the working directory first, where a file of the user's may
    have the name of a package: not where this process did not look there either.
    """
    here = {"", os.getcwd()} & set(sys.path)
    return [sys.executable, *([] if here else ["-P"]), "-m", module]


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Writes what a stream's encoding lacks in letters that every encoding has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(SPELT)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("spelt", _spell)


def _open_streams() -> None:
    """Gives closed streams a descriptor, lest a file of results gets their number.

    What is written to a closed standard output fails, as it would for any program.
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
    """Standard output whose failures say that they are its own."""

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
    except BrokenPipeError:  # No failure: the reader has seen enough.
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), OUTPUT) from None


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Makes every text printable, and sees to it that both streams are there."""
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
    """Drops what is left to print; at its end Python would try once more."""
    with contextlib.suppress(OSError):  # No descriptor, no trouble.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def complain(line: str) -> None:
    """Prints a line on standard error, if that still goes."""
    with contextlib.suppress(OSError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)
