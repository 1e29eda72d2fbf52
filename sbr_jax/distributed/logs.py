"""Logs of every process but process 0, and a check that all see one folder."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sbr_jax.distributed.errors import Ended, Lost
from sbr_jax.typing import UserError

if TYPE_CHECKING:
    from sbr_jax.distributed.session import Session

FOLDER = "logs"
"""The logs' folder in a run's folder."""
TOKEN = ".token-"
SEEN = 20.0
"""Seconds in which all hosts must see what one host writes."""


class Log:
    """Sends a process's output, including that of C++, to a file until the end.

    The file is temporary until the run's folder is known.
    """

    def __init__(self, index: int):
        """Keeps the index of the process."""
        self.name = f"host-{index:02d}.log"
        self._place: Path | None = None

    def __enter__(self) -> "Log":
        """Redirects both streams."""
        self._file = tempfile.TemporaryFile("w+b")
        self._kept = [os.dup(1), os.dup(2)]
        self._point(self._file.fileno())
        return self

    def open(self, folder: Path) -> None:
        """Moves past and future output into a run's folder."""
        self._place = folder / FOLDER / self.name
        if not isinstance(folder, Path):  # A bucket's objects are written whole.
            return
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._flush()
        self._file.seek(0)
        with self._place.open("ab") as file:
            shutil.copyfileobj(self._file, file)
            file.flush()
            self._point(file.fileno())

    def _point(self, descriptor: int) -> None:
        self._flush()
        for number in (1, 2):
            os.dup2(descriptor, number)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()

    def close(self) -> None:
        """Writes any remaining output."""
        self._flush()
        if self._place is not None and not isinstance(self._place, Path):
            self._file.seek(0)
            self._place.write_bytes(self._file.read())

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        """Keeps the streams, unless a defect would leave no trace."""
        self.close()
        told = (UserError, Ended, Lost, KeyboardInterrupt)
        if self._place is None and kind is not None and not issubclass(kind, told):
            for number, kept in zip((1, 2), self._kept, strict=True):
                os.dup2(kept, number)
            self._file.seek(0)
            sys.stderr.write(self._file.read().decode("utf-8", "replace"))


def require_shared(session: "Session", folder: Path) -> None:
    """Refuses hosts that see a different folder under the same name."""
    token = f"{TOKEN}{os.urandom(8).hex()}"
    token = session.decide(lambda: _leave(folder, token))
    found = session.gather("the folder", _sees(folder, token))
    with contextlib.suppress(OSError):
        session.decide(lambda: (folder / token).unlink(missing_ok=True))
    pairs = zip(session.links, found[1:], strict=False)
    if blind := [str(link) for link, sees in pairs if not sees]:
        raise UserError(
            f"--workdir {folder}: {', '.join(blind[:3])} sees another folder of that "
            "name than process 0: name one on a disk that all hosts share, or in a "
            "bucket"
        )
    session.decide(lambda: None)


def _leave(folder: Path, token: str) -> str:
    try:
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_text("")
    except OSError as error:
        raise UserError(
            f"workdir {folder}: expected a folder that can be written, got "
            f"'{error.strerror or error}'; choose another one"
        ) from error
    return token


def _sees(folder: Path, token: str) -> bool:
    """Whether this host sees process 0's file; a shared disk may be late."""
    deadline = time.monotonic() + SEEN
    while True:
        with contextlib.suppress(OSError):
            # Not `exists`: shared disks cache for a while that a file was missing.
            if any(path.name == token for path in folder.iterdir()):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
