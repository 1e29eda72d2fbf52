"""Frame of every command-line program: checks, one-line errors, exit codes."""

import collections
import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from sbr_jax import errors, files
from sbr_jax.distributed.errors import Ended, Lost
from sbr_jax.programs import terminal
from sbr_jax.programs.parsing import parse as parse
from sbr_jax.progress import Ticker
from sbr_jax.typing import UserError

EXIT_SYSTEM = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_LOST = 134
EXIT_PIPE = 141
EXIT_TERMINATED = 143
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command(program: str) -> str:
    """The words that call a program here: as installed, or in a clone."""
    if Path(sys.argv[0]).name == "sbr-jax":
        return f"sbr-jax {program}"
    return f"python -m experiments.{program.replace('-', '_')}"


def check_folder(folder: Path, option: str = "--workdir") -> None:
    """Refuses a results folder that is a file, lies below one, or is in a bucket."""
    from sbr_jax import files

    files.require_disk(folder)
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(
                    f"{option} {folder}: expected a folder, found the file {place}; "
                    "choose another"
                )
            return


def guarded(program: Callable[[], None], *, interrupted: str) -> int:
    """Runs a program and returns its exit code.

    Each of these prints one line on stderr:

    - a `UserError`: code 2.
    - a refusal of the system (a full disk, a closed stream): code 1.
    - an interrupt: the line `interrupted` and code 130, or 143 for SIGTERM.
    - the loss of one of several processes: code 134.

    Anything else is a defect and keeps its traceback.
    """
    terminal.end_with_parent()
    with errors.command_line(), terminal.streams():
        try:
            with warnings.catch_warnings(), terminal.terminable():
                warnings.showwarning = show_warning
                program()
                sys.stdout.flush()
        except UserError as error:
            terminal.complain(f"error: {error}")
            return EXIT_USER
        except Lost as error:
            terminal.complain(f"error: {error}; {KEPT}")
            return EXIT_LOST
        except Ended as error:  # Process 0 prints for all processes.
            if str(error):
                terminal.complain(f"error: {error}")
            return error.code
        except BrokenPipeError:
            # The reader of a pipe has closed it.
            terminal.silence_output()
            return EXIT_PIPE
        except OSError as error:
            terminal.complain(f"error: {system_line(error)}")
            return EXIT_SYSTEM
        except KeyboardInterrupt as interrupt:
            terminal.complain(interrupted)
            ended = isinstance(interrupt, terminal.Terminated)
            return EXIT_TERMINATED if ended else EXIT_INTERRUPTED
    return 0


_COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled or found in the cache."""

KEPT = "interrupted: finished stages are kept; the same command continues"


def start(
    program: Callable[[Sequence[str]], None],
    args: Sequence[str] | None,
    usage: str | None,
    *,
    interrupted: str = KEPT,
) -> int:
    """Runs a program on a command line and returns its exit code; see `guarded`.

    Args:
        program: called with the words.
        args: words; None for those of this process.
        usage: text that `--help` prints if no preset precedes it.
        interrupted: see `guarded`.
    """
    quiet_libraries()
    make_room_for_devices()
    decompose_in_one_thread()
    given = list(sys.argv[1:] if args is None else args)
    if usage is not None and given[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    return guarded(lambda: program(given), interrupted=interrupted)


def system_line(error: OSError) -> str:
    """The line that says what the system refused, and where; drops unprintable output.

    >>> system_line(FileNotFoundError(2, "No such file or directory", "a"))
    "expected to use 'a', got 'No such file or directory'"
    """
    said = error.strerror or str(error)
    if error.filename == terminal.OUTPUT:
        terminal.silence_output()
        return f"expected to print to {terminal.OUTPUT}, got '{said}': lines are lost"
    where = "a file" if error.filename is None else repr(os.fsdecode(error.filename))
    more = "; make room, then run the same command" if error.errno in FULL else ""
    return f"expected to use {where}, got '{said}'{more}"


def show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Prints a warning as one line, without its place in the code."""
    del where, more
    terminal.complain(f"warning: {message}")


def serve_profiler() -> None:
    """Lets `tpu_setup/profile.sh` profile this process, if its port is set.

    Call it once the devices are known, because it asks for them.
    """
    if port := os.environ.get("SBR_JAX_PROFILER_PORT"):
        import jax

        jax.profiler.start_server(int(port))


def telling(quiet: bool) -> contextlib.AbstractContextManager[object]:
    """Reports progress on standard error from time to time, unless ``quiet``."""
    return contextlib.nullcontext() if quiet else Ticker(terminal.complain)


def quiet_libraries() -> None:
    """Keeps libraries' advice off the terminal; call it before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def simulated_devices() -> int:
    """The number of devices that the CPU simulates; 1 by default.

    It is set by `JAX_NUM_CPU_DEVICES`, or by the older flag that it replaces.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    named = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    given = [os.environ.get("JAX_NUM_CPU_DEVICES", ""), *named]
    return max((int(number) for number in given if number.isdigit()), default=1)


def make_room_for_devices() -> None:
    """Gives XLA threads for all simulated devices; call it before importing jax.

    In a collective each device waits on its own thread for the others. With only one
    thread per core, two cores have too few for that, and XLA aborts.
    """
    count = simulated_devices()
    if count > 1:
        os.environ.setdefault("NPROC", str(max(2 * count, os.cpu_count() or 1)))


def decompose_in_one_thread() -> None:
    """Keeps LAPACK to one thread; call it before the first decomposition.

    Here many matrices of a few hundred rows follow one another. OpenBLAS's threads
    would wait for each other in loops that take the cores from XLA's threads, and
    results would depend on their number. A set `OPENBLAS_NUM_THREADS` is kept.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def enable_compilation_cache() -> Callable[[], str]:
    """Keeps compiled programs between runs, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; empty switches it off.

    Returns:
        A function that says how much has since been compiled or found in the cache.
    """
    import jax

    seen: collections.Counter[str] = collections.Counter()
    seconds: list[float] = []

    def timed(event: str, duration_secs: float, **_: object) -> None:
        if event == _COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
    jax.monitoring.register_event_duration_secs_listener(timed)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = str(files.cache_folder() / "jax")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def told() -> str:
        folder = jax.config.values["jax_compilation_cache_dir"]
        where = f"in {folder}" if folder else "kept nowhere: the cache is off"
        found = seen["/jax/compilation_cache/cache_hits"]
        return (
            f"programs: {len(seconds)} made ready in {sum(seconds):.0f} s, {found} of "
            f"them found compiled; {where}"
        )

    return told
