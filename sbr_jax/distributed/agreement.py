"""Agreement among the processes of a job: the interface for other code.

A single process decides by itself at no cost: nothing is loaded for it.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sbr_jax.distributed import stopping

if TYPE_CHECKING:
    from sbr_jax.distributed.session import Session

Value = TypeVar("Value")

CURRENT: "list[Session]" = []
"""The session of this process, if there are several."""


def current() -> "Session | None":
    """The session of this process; None if it works alone."""
    return CURRENT[-1] if CURRENT else None


def joined(
    option: str, folder: Path | None, card: Callable[[], Mapping[str, Any]]
) -> contextlib.AbstractContextManager[None]:
    """Works with the processes that ``--distributed`` names, until the block ends.

    Args:
      option: see :mod:`sbr_jax.distributed.meeting`.
      folder: a folder that all of them must see, or None.
      card: values that must be the same in all of them, by name.

    Raises:
      UserError: if a process is missing, differs, or has another folder.
      Lost: if a process disappears or does not arrive later on.
    """
    if option == "off":
        return contextlib.nullcontext()
    from sbr_jax.distributed.session import join

    return join(option, folder, card)


def decide(compute: Callable[[], Value]) -> Value:
    """Computes a value in process 0 and returns it in every process.

    Args:
      compute: its value must be JSON; called in process 0 (or a single process) only,
        which ends the job if it raises.

    >>> decide(lambda: 3)
    3
    """
    session = current()
    return compute() if session is None else session.decide(compute)


def require_same(what: str, value: str, remedy: str) -> None:
    """Refuses processes whose values differ; see :class:`Session`."""
    session = current()
    if session is not None:
        session.require_same(what, value, remedy)


def open_log(folder: Path) -> None:
    """Moves the output of every process but the first into a run's folder."""
    session = current()
    if session is not None and session.log is not None:
        session.log.open(folder)


def is_first() -> bool:
    """Whether this process writes and prints: process 0, or a single one."""
    session = current()
    return session is None or session.index == 0


def should_stop() -> bool:
    """Whether to save and stop after this step; the same in all processes."""
    session = current()
    return stopping.asked() if session is None else session.poll()
