"""Folders of runs on a disk or in a bucket, with the differences between the two.

A bucket's objects are whole or absent; they cannot be renamed or locked, and there are
no folders to create. Paths of both kinds have the methods of ``pathlib.Path``: those on
a disk are such paths, those in a bucket are ``etils.epath`` ones, which need the extra
``gcs`` for ``gs://``.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
from typing import Any

from sbr_jax import files
from sbr_jax.typing import UserError

NEEDED = {"gs": "gcsfs", "s3": "s3fs"}
"""The package that accesses buckets of each scheme."""
JOBS = "jobs"
"""Folder of a run's parts, if several processes work on it."""


def folder(place: str | pathlib.Path) -> pathlib.Path:
    """A folder by its path or address.

    Args:
      place: a path, or ``gs://bucket/folder``, of which ``Path`` drops a slash.

    Raises:
      UserError: for a bucket that cannot be reached from here.

    >>> folder("runs/demo").as_posix()
    'runs/demo'
    """
    match = files.BUCKET.match(str(place))
    if match is None:
        return pathlib.Path(place)
    address = files.address(place)
    needed = NEEDED.get(match[1])
    if needed is None:
        raise UserError(
            f"expected a folder on a disk or in a bucket of {' or '.join(NEEDED)}, got "
            f"{address}: copy it there when the run is done"
        )
    if importlib.util.find_spec(needed) is None:
        raise UserError(
            f"expected the package {needed} to reach {address}, found none: pip "
            f"install {needed}"
        )
    from etils import epath

    found: Any = epath.Path(address)
    return found


def is_bucket(path: Any) -> bool:
    """Whether a path of :func:`folder` is in a bucket."""
    return not isinstance(path, pathlib.Path)


def has_parts(run: pathlib.Path) -> bool:
    """Whether processes have left parts of a run in its folder; never in a bucket."""
    return not is_bucket(run) and os.path.isdir(run / JOBS)


def remove(path: pathlib.Path) -> None:
    """Deletes a folder and everything in it, as far as possible."""
    if not is_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    place: Any = path
    with contextlib.suppress(OSError):
        place.rmtree(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    if is_bucket(path):
        path.write_text(text, encoding="utf-8")
    else:
        files.write_text(path, text)


def made(path: pathlib.Path) -> None:
    """Creates a folder on a disk; a bucket needs none."""
    if not is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder, in order; empty if there is no such folder."""
    if not is_bucket(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    found, left = [], [folder] if folder.exists() else []
    while left:  # Bucket paths have no recursive patterns.
        inside = list(left.pop().iterdir())
        left += [path for path in inside if path.is_dir()]
        found += [path for path in inside if not path.is_dir()]
    return sorted(found)


def names(folder: pathlib.Path) -> set[str]:
    """Names of the entries in a folder; empty if there is no such folder."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    """The path of a file relative to a folder above it.

    >>> relative(pathlib.Path("a/b/c"), pathlib.Path("a"))
    'b/c'
    """
    return re.sub(r"^/", "", str(path)[len(str(folder)) :].replace("\\", "/"))
