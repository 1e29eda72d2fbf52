"""SIGTERM where work can save itself first: noted, and obeyed at the next step."""

import contextlib
from collections.abc import Iterator

_HOLDING: list[object] = []
_ASKED: list[bool] = []


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Work that asks :func:`asked` after each of its steps, and then saves itself."""
    _HOLDING.append(None)
    try:
        yield
    finally:
        _HOLDING.pop()
        if not _HOLDING:
            _ASKED.clear()


def is_held() -> bool:
    """Whether such work is going on."""
    return bool(_HOLDING)


def ask() -> bool:
    """Asks the work that is going on to stop; False where none can save itself.

    Asked a second time, it is not waited for.

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
    """Whether the work is to save itself and stop."""
    return bool(_ASKED)
