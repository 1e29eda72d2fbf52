"""Holds SIGTERM back for work that can save itself, until its next step."""

import contextlib
from collections.abc import Iterator

_HOLDING: list[object] = []
_ASKED: list[bool] = []


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Wraps work that calls :func:`asked` after each step and then saves itself."""
    _HOLDING.append(None)
    try:
        yield
    finally:
        _HOLDING.pop()
        if not _HOLDING:
            _ASKED.clear()


def is_held() -> bool:
    """Whether such work is running."""
    return bool(_HOLDING)


def ask() -> bool:
    """Asks the running work to stop; False if none can save itself.

    A second request does not wait for it.

    >>> ask()
    False
    >>> with holding():
    ...     ask(), asked(), ask()
    (True, True, False)
    """
    if not _HOLDING or _ASKED:
        return False
    _ASKED.append(True)
    return True


def asked() -> bool:
    """Whether the work should save itself and stop."""
    return bool(_ASKED)
