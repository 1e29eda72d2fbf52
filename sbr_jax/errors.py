"""Messages that all rooms share: unknown names, and names given twice."""

import difflib
from collections.abc import Iterable

from sbr_jax.typing import UserError


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name: the nearest ones, then all of them.

    >>> print(unknown("preset", "demmo", ["demo", "testbed"]))
    unknown preset 'demmo'; nearest: demo (known: demo, testbed)
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return UserError(f"unknown {kind} '{name}'{hint} (known: {', '.join(known)})")


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuses unknown and repeated names.

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
    """Refuses an empty list.

    Raises:
      UserError: saying of what.
    """
    if not list(given):
        raise UserError(f"expected at least one {kind}, got none")
