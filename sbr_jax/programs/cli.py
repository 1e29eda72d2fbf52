"""What all command-line programs share: parsing, and one line for a user's mistake."""

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sbr_jax.programs import terminal
from sbr_jax.typing import UserError

Arguments = TypeVar("Arguments")
EXIT_SYSTEM = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
EXIT_TERMINATED = 143
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name: the nearest ones, then all of them.

    >>> print(unknown("preset", "demmo", ["demo", "testbed"]))
    unknown preset 'demmo'; nearest: demo (known: demo, testbed)
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return UserError(f"unknown {kind} '{name}'{hint} (known: {', '.join(known)})")


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown and repeated names.

    Raises:
        UserError: for the first such name.
    """
    known = list(known)
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
        if name in seen:
            raise UserError(f"expected each {kind} once, got '{name}' twice: drop one")
        seen.add(name)


def one_line(text: str) -> str:
    r"""Take the complaint out of a parser's boxed message, without the help below it.

    Where the terminal has no Unicode the box is drawn with hyphens, and its title is a
    row of its own.

    >>> one_line("╭─ Value error ─╮\n│ No X.         │\n│ ───── │\n│ Help: … │\n╰─╯")
    'No X.'
    >>> one_line(" Value error \n ----- \n  No X.  \n  -----  \n  Help: …  \n")
    'No X.'
    """
    blocks: list[list[str]] = [[]]
    for row in re.sub("\x1b\\[[0-9;]*m", "", text).splitlines():
        words = row.strip("│ ")
        if words.startswith("╭") or not words.strip("─-╰╯"):
            blocks.append([])
        else:
            blocks[-1] += words.split()
    said = [" ".join(block) for block in blocks if block]
    titled = "╭" not in text and len(said) > 1
    return said[titled] if said else ""


@contextlib.contextmanager
def _wide_page() -> Iterator[None]:
    """Keeps the parser from cutting a long word of its complaint in two."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def parse(
    arguments: Callable[..., Arguments], args: Sequence[str] | None, prog: str
) -> Arguments:
    """Parse a command line into a frozen dataclass.

    Raises:
        UserError: with the parser's complaint as one line.
    """
    import tyro  # Needed here only; what else imports this module does not pay.

    errors = io.StringIO()
    given = sys.argv[1:] if args is None else args
    for_help = not {"-h", "--help"}.isdisjoint(given)
    page = contextlib.nullcontext() if for_help else _wide_page()
    try:
        with contextlib.redirect_stderr(errors), page:
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(arguments, prog=prog, args=args, config=config)
    except SystemExit as stop:
        if stop.code != EXIT_USER:
            sys.stdout.flush()
            raise
        complaint = one_line(errors.getvalue())
        raise UserError(f"{complaint}; see {prog} --help") from None


def check_folder(folder: Path) -> None:
    """Refuse a place for results that is a file, or lies below one.

    Raises:
        UserError: naming the file.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(
                    f"--workdir {folder}: expected a folder, found the file {place}; "
                    "choose another"
                )
            return


SEEDS = 2**32
"""Seeds lie below this: what a JAX key takes without dropping bits."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are out of range, or given twice.

    Raises:
        UserError: naming the first.
    """
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise UserError(f"expected seeds from 0 to {SEEDS - 1}, got {seed}")
    check_names("seed", map(str, seeds), map(str, seeds))


def guarded(program: Callable[[], None], *, interrupted: str) -> int:
    """Run a program and return its exit code.

    A `UserError` becomes one line on stderr and code 2; what the system refuses (a full
    disk, a stream that is closed) one line and code 1; an interrupt the line
    `interrupted` and code 130, or 143 for SIGTERM. Anything else is a defect and keeps
    its traceback.
    """
    terminal.end_with_parent()
    with terminal.streams():
        try:
            with warnings.catch_warnings(), terminal.terminable():
                warnings.showwarning = show_warning
                program()
                sys.stdout.flush()
        except UserError as error:
            terminal.complain(f"error: {error}")
            return EXIT_USER
        except BrokenPipeError:
            # The reader has seen enough.
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


def system_line(error: OSError) -> str:
    """What the system refused, and where; drops output that cannot be printed.

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
    """Print a warning as one line, without the place in our code that it came from."""
    del where, more
    terminal.complain(f"warning: {message}")


def quiet_libraries() -> None:
    """Keep the advice of libraries off the terminal; call it before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; empty switches it off.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "sbr_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
