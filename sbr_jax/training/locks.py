"""Lock of a run's folder: one process works in it at a time.

On a disk the system holds the lock and drops it when the process ends. A bucket has no
such lock: the latest run takes it over, and the earlier one notices at its next stage.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Protocol

from sbr_jax import storage
from sbr_jax.typing import UserError

NAME = ".lock"


class Lock(Protocol):
    """A lock that was taken."""

    def is_held(self) -> bool:
        """Whether the lock is still in the folder."""
        ...


class _File:
    """A file that the system locks until it is closed."""

    def __init__(self, path: pathlib.Path, stack: contextlib.ExitStack):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = stack.enter_context(path.open("w"))
        _flock(path.parent, self._file)

    def is_held(self) -> bool:
        own = os.fstat(self._file.fileno())
        try:
            return os.path.samestat(own, self._path.stat())
        except OSError:
            return False


class _Object:
    """A bucket's object that holds the random number of its last writer."""

    def __init__(self, path: pathlib.Path):
        self._path, self._mine = path, os.urandom(16).hex()
        path.write_text(self._mine)

    def is_held(self) -> bool:
        try:
            found = self._path.read_text()
        except OSError:
            return False
        if found != self._mine:
            raise UserError(
                f"workdir {self._path.parent} is in use by another run, which came "
                "later; wait for it or choose another folder"
            )
        return True


@contextlib.contextmanager
def taken(folder: pathlib.Path) -> Iterator[Lock]:
    """Holds a folder's lock; on a disk, makes the folder first.

    Raises:
      UserError: if it cannot be written, or another run works in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if storage.is_bucket(folder):
                lock: Lock = _Object(folder / NAME)
            else:
                lock = _File(folder / NAME, stack)
        except OSError as error:
            raise UserError(
                f"workdir {folder}: expected a folder that can be written, got "
                f"'{error.strerror or error}'; choose another one"
            ) from error
        yield lock


def _flock(folder: pathlib.Path, file: IO[str]) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"workdir {folder} is in use by another run; wait for it or choose another "
            "folder"
        ) from error
