"""Shared messages: unknown names, repeated names, counts."""

import difflib
from collections.abc import Iterable

from sbr_jax.typing import UserError

LISTED = {"method": "sbr-jax run --list shows them"}
"""Kinds with too many names for one line, and where to find those names."""


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
    known, seen = list(known), set()
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
        if name in seen:
            raise UserError(f"expected each {kind} once, got '{name}' twice: drop one")
        seen.add(name)


def check_some(kind: str, given: Iterable[object]) -> None:
    """Refuse an empty list.

    Raises:
      UserError: naming what is missing.
    """
    if not list(given):
        raise UserError(f"expected at least one {kind}, got none")
