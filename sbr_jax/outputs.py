"""Files that a program makes: whole or not at all, and never over somebody else's."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from sbr_jax.typing import UserError

MARK = "made by sbr_jax"
"""Stands in every page, text and figure that a program may write anew."""
EARLIER = (b"safety report</title>", b"Where each defence breaks</title>")
"""What pages of before the mark have in its place."""
PARTIAL = ".partial"
"""In a folder of an export: what is not whole yet."""
LAST = ("config.json", "adapter_config.json")
"""Without these nobody takes a folder for a model."""


def is_ours(path: Path) -> bool:
    """Whether a program of ours has made this file."""
    content = path.read_bytes()
    return any(mark in content for mark in (MARK.encode(), *EARLIER))


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Refuse to write over files that no program of ours has made.

    Raises:
        UserError: naming the first.
    """
    for path in paths:
        if path.exists() and not (path.is_file() and is_ours(path)):
            raise UserError(
                f"expected to write {path}, found something there that this program "
                "has not made: choose another name, or move it away"
            )


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and put it there once it is whole.

    Args:
        path: the place; a link's target is replaced.
        write: writes the whole file to the path it is given.

    Raises:
        OSError: naming the place, which is as it was.
    """
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        write(temporary)
        temporary.replace(place)
    except OSError as error:
        said = error.strerror or str(error)
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    replace(path, lambda place: place.write_text(text, encoding="utf-8"))


def is_free(folder: Path) -> bool:
    """Whether a folder is new or empty, but for an earlier try at filling it."""
    if not folder.exists():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {PARTIAL}


def fill_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Have a folder's files written apart, and put them there once all are whole.

    Args:
        folder: new or empty.
        write: writes all files into the folder it is given.

    Raises:
        OSError: if they cannot be written; the folder is as it was, or new and empty.
    """
    partial = folder / PARTIAL
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    from safetensors import SafetensorError

    try:
        write(partial)
        for path in sorted(partial.iterdir(), key=lambda path: path.name in LAST):
            path.replace(folder / path.name)
    except SafetensorError as error:  # What a full disk is to that library.
        raise OSError(errno.EIO, str(error), str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
