"""Agreement of the processes of a job, as the rest of the code asks for it.

A process alone decides by itself, at no cost: nothing is loaded for it.
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
"""The session of this process, if it is one of several."""


def current() -> "Session | None":
    """The session of this process; None where it works alone."""
    return CURRENT[-1] if CURRENT else None


def joined(
    option: str, folder: Path | None, card: Callable[[], Mapping[str, Any]]
) -> contextlib.AbstractContextManager[None]:
    """Works together with the processes that ``--distributed`` names, until the end.

    Args:
      option: see :mod:`sbr_jax.distributed.meeting`.
      folder: that all of them must see; None for none.
      card: what must be the same in all of them, by name.

    Raises:
      UserError: where a process is missing, differs, or has another folder.
      Lost: where one goes, or does not come, later on.
    """
    if option == "off":
        return contextlib.nullcontext()
    from sbr_jax.distributed.session import join

    return join(option, folder, card)


def decide(compute: Callable[[], Value]) -> Value:
    """What process 0 computes, in every process; computed here by a process alone.

    Args:
      compute: its value must be JSON; called in process 0 only, which ends the job
        where it raises.

    >>> decide(lambda: 3)
    3
    """
    session = current()
    return compute() if session is None else session.decide(compute)


def require_same(what: str, value: str, remedy: str) -> None:
    """Refuses processes that differ in something; see :class:`Session`."""
    session = current()
    if session is not None:
        session.require_same(what, value, remedy)


def open_log(folder: Path) -> None:
    """Moves what a process prints, unless it is the first, into a run's folder."""
    session = current()
    if session is not None and session.log is not None:
        session.log.open(folder)


def is_first() -> bool:
    """Whether this process writes and prints: process 0, or one alone."""
    session = current()
    return session is None or session.index == 0


def should_stop() -> bool:
    """Whether to save and stop after this step, at the same one in all processes."""
    session = current()
    return stopping.asked() if session is None else session.poll()
