"""Shared messages: unknown names, repeated names, counts, settings."""

import contextlib
import contextvars
import difflib
from collections.abc import Iterable, Iterator

from sbr_jax.typing import UserError

LISTED = {"method": "sbr-jax run --list shows them"}
"""Kinds with too many names for one line, and where to find those names."""


_commanded = contextvars.ContextVar("commanded", default=False)

PYTHON = {"train": "examples", "eval": "evaluation", "data": "folder"}
PYTHON |= {"mesh": "hardware.mesh"}
"""Options whose argument of a function has another name."""


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Makes messages speak of options; outside it they have Python's names."""
    token = _commanded.set(True)
    try:
        yield
    finally:
        _commanded.reset(token)


def option(name: str, value: object = None) -> str:
    """What the caller calls a setting, perhaps with its value.

    Args:
        name: of the option, without its dashes.
        value: that it has or should have; None for the name alone.

    >>> option("study.max-length"), option("train"), option("method", "plain")
    ('study.max_length', 'examples', "method='plain'")
    >>> with command_line():
    ...     option("study.max-length"), option("train"), option("method", "plain")
    ('--study.max-length', '--train', '--method plain')
    """
    if _commanded.get():
        said = f"--{name.replace('_', '-')}"
        return said if value is None else f"{said} {value}"
    said = PYTHON.get(name, name.replace("-", "_"))
    return said if value is None else f"{said}={value!r}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun in the singular or plural.

    >>> counted(1, "row"), counted(0, "row"), counted(2, "answer held", "answers held")
    ('1 row', '0 rows', '2 answers held')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name, with the nearest names and where to find all.

    >>> print(unknown("preset", "demmo", ["demo", "testbed"]))
    unknown preset 'demmo'; nearest: demo (known: demo, testbed)
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    listed = f"known: {', '.join(known)}"
    if kind in LISTED:
        listed = f"{len(known)} are known: {LISTED[kind]}"
    return UserError(f"unknown {kind} '{name}'{hint} ({listed})")


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown and repeated names.

    Raises:
      UserError: for the first such name.
    """
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    check_once(kind, names)


def check_once(kind: str, given: Iterable[object]) -> None:
    """Refuses what is given twice.

    Raises:
      UserError: for the first such thing.
    """
    seen = set()
    for one in given:
        if one in seen:
            raise UserError(f"expected each {kind} once, got '{one}' twice: drop one")
        seen.add(one)


def check_some(kind: str, given: Iterable[object]) -> None:
    """Refuse an empty list.

    Raises:
      UserError: naming what is missing.
    """
    if not list(given):
        raise UserError(f"expected at least one {kind}, got none")
