"""What all command-line programs share: parsing, and one line for a user's mistake."""

import dataclasses
import difflib
import errno
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sbr_jax import errors
from sbr_jax.programs import terminal
from sbr_jax.typing import UserError

Arguments = TypeVar("Arguments")
EXIT_SYSTEM = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
EXIT_TERMINATED = 143
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parse(
    kind: type[Arguments],
    args: Sequence[str] | None,
    prog: str,
    default: Arguments | None = None,
) -> Arguments:
    """Parses a command line into a frozen dataclass, or a tree of them.

    Args:
        kind: the dataclass.
        args: words; None for those of this process.
        prog: how messages name the program.
        default: values of what is not said.

    Raises:
        UserError: for the parser's complaint, with the nearest names of an option.
    """
    import tyro  # Needed here only; what else imports this module does not pay.
    from tyro import _errors as events

    def refuse(event: Any) -> None:
        raise UserError(f"{_complaint(event, kind)}; see {prog} --help")

    with events.on_parse_error(refuse):
        return tyro.cli(
            kind,
            prog=prog,
            args=args,
            default=default,
            config=(tyro.conf.FlagCreatePairsOff,),
        )


def _complaint(event: Any, kind: type) -> str:
    """What the parser has against a command line, in one line."""
    name = type(event).__name__
    if name == "UnrecognizedArgs":
        words = [word for word in event.tokens if word.startswith("--")]
        word = (words or event.tokens)[0].partition("=")[0]
        near = difflib.get_close_matches(word, list(_flags(kind)), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        return f"unknown option '{word}'{hint}"
    if name in ("BadValue", "InvalidChoice", "InstantiationFailure"):
        said = getattr(event, "message", None) or getattr(event, "reason", None)
        if name == "InvalidChoice":
            said = f"expected one of {', '.join(event.choices)}, got '{event.value}'"
        argument = event.argument
        flag = "" if argument is None else f"{argument.lowered.name_or_flags[-1]}: "
        return " ".join(f"{flag}{said}".split())
    if name == "MissingArgs":
        missing = (a.arg.lowered.name_or_flags[-1] for a in event.missing_arguments)
        return f"expected {', '.join(missing)}, got none"
    return f"cannot be understood ({name})"


def _flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every option of a tree of dataclasses.

    >>> Pair = dataclasses.make_dataclass("Pair", [("a_b", int), ("c", str)])
    >>> list(_flags(dataclasses.make_dataclass("Tree", [("p", Pair), ("q", int)])))
    ['--p.a-b', '--p.c', '--q']
    """
    types = dict(zip(getattr(kind, "__parameters__", ()), (), strict=False))
    origin = typing.get_origin(kind)
    if origin is not None:
        types = dict(zip(origin.__parameters__, typing.get_args(kind), strict=True))
        kind = origin
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner, name = types.get(hints[field.name], hints[field.name]), field.name
        if typing.get_origin(inner) is typing.Annotated:
            inner, *notes = typing.get_args(inner)
            named = (note.name for note in notes if getattr(note, "name", None))
            name = next(named, name)
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(inner):
            yield from _flags(inner, f"{flag}.")
        else:
            yield f"--{flag}"


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
    errors.check_some("seed", seeds)
    errors.check_names("seed", map(str, seeds), map(str, seeds))


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
        program: takes the words.
        args: words; None for those of this process.
        usage: what `--help` prints where no preset comes before it.
        interrupted: see `guarded`.
    """
    quiet_libraries()
    given = list(sys.argv[1:] if args is None else args)
    if usage is not None and given[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    return guarded(lambda: program(given), interrupted=interrupted)


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
