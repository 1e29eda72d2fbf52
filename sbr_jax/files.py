"""Reads files whole or refuses them in one line; writes them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from sbr_jax.typing import UserError

DEPTH = 100
"""Deepest nesting of JSON: far above any real file, far below Python's limit."""
REMEDY = "fetch the file again"
MARK = "made by sbr_jax"
"""Marks every page, text and figure that a program may overwrite."""
EARLIER = (b"safety report</title>", b"Where each defence breaks</title>")
"""The equivalents in pages from before the mark existed."""
PARTIAL = ".partial"
"""Folder in an export for files that are not complete yet."""
BUCKET = re.compile(r"(gs|s3|az|abfs|hdfs)://?[^/]")
"""How a bucket's address begins; `Path` drops one of its slashes."""
LAST = ("config.json", "adapter_config.json")
"""Files without which nobody takes a folder for a model; they are moved last."""


def cache_folder() -> pathlib.Path:
    """The package's folder in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "sbr_jax"


def is_there(path: pathlib.Path) -> bool:
    """Whether a file exists; anything else of that name is refused.

    Args:
      path: of an optional file.

    Raises:
      UserError: for a folder, or a broken link.

    >>> is_there(pathlib.Path("no such file"))
    False
    """
    if path.is_file():
        return True
    if path.is_symlink() or path.exists():
        kind = "a folder" if path.is_dir() else "a link that leads to no file"
        raise UserError(f"expected a file in {path}, found {kind}: {REMEDY}")
    return False


def require_disk(place: str | pathlib.Path) -> None:
    """Refuses a bucket's address, which would become a local folder of that name.

    Raises:
      UserError: saying what to do instead.

    >>> require_disk("runs/demo")
    >>> require_disk(pathlib.Path("gs://bucket/run"))
    Traceback (most recent call last):
    sbr_jax.typing.UserError: expected a folder on a disk, got gs://bucket/run: mount \
the bucket (gcsfuse), or copy the folder to a disk first
    """
    if BUCKET.match(str(place)):
        raise UserError(
            f"expected a folder on a disk, got {address(place)}: mount the bucket "
            "(gcsfuse), or copy the folder to a disk first"
        )


def address(place: str | pathlib.Path) -> str:
    """A bucket's address as it was written, before `Path` dropped a slash."""
    return re.sub(r":/+", "://", str(place), count=1)


def read_text(path: pathlib.Path, remedy: str = REMEDY) -> str:
    """The text of a file in UTF-8.

    Raises:
      UserError: if it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected text in UTF-8 in {path}, got byte {error.object[error.start]:#x}"
            f" at place {error.start}: {remedy}"
        ) from error


def parse_json(
    text: str, where: str, remedy: str = REMEDY, *, unique: bool = False
) -> Any:
    """The value of a JSON text.

    Args:
      text: the JSON.
      where: its origin, for messages; the text itself is never quoted.
      remedy: what to do if it is not JSON.
      unique: whether to refuse a name that occurs twice in one object; otherwise the
        last one counts, as in most readers.

    Raises:
      UserError: if it is not JSON, or nested deeper than ``DEPTH``.

    >>> parse_json('{"a": [1, null]}', "a file")
    {'a': [1, None]}
    >>> parse_json("[" * 10**5, "a file")
    Traceback (most recent call last):
    sbr_jax.typing.UserError: expected JSON of at most 100 levels in a file, got more: \
fetch the file again
    """
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
        deep = _is_deep(value)
    except RecursionError:
        deep = True
    except json.JSONDecodeError as error:
        lines = ", as if it were JSON lines" if error.msg == "Extra data" else ""
        raise UserError(
            f"expected JSON in {where}, got something else at line {error.lineno}, "
            f"column {error.colno} ({error.msg}{lines}): {remedy}"
        ) from error
    except ValueError as error:  # Too many digits, or a duplicate name.
        raise UserError(f"expected JSON in {where}, got {error}: {remedy}") from error
    if deep:
        raise UserError(
            f"expected JSON of at most {DEPTH} levels in {where}, got more: {remedy}"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that stands twice in one object")
    return found


def read_object(path: pathlib.Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: if the file cannot be read, or does not hold an object.
    """
    found = parse_json(read_text(path, remedy), str(path), remedy)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UserError(f"expected a JSON object in {path}, got a {kind}: {remedy}")
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def is_ours(path: pathlib.Path) -> bool:
    """Whether one of our programs made this file."""
    content = path.read_bytes()
    return any(mark in content for mark in (MARK.encode(), *EARLIER))


def refuse_foreign(paths: Iterable[pathlib.Path]) -> None:
    """Refuses to overwrite files that none of our programs made.

    Raises:
      UserError: naming the first one.
    """
    for path in paths:
        if path.exists() and not (path.is_file() and is_ours(path)):
            raise UserError(
                f"expected to write {path}, found something there that this program "
                "has not made: choose another name, or move it away"
            )


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes a file beside its place, and moves it there once it is complete.

    Args:
      path: the place; a link's target is replaced.
      write: writes the whole file to the path it is given.

    Raises:
      OSError: naming the place, which is unchanged.
    """
    place = pathlib.Path(os.path.realpath(path))
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
    except OSError as error:
        said = error.strerror or str(error)
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def share(path: pathlib.Path) -> None:
    """Gives a file the permissions of any new file here: 0644 under the usual umask.

    Writers that use a temporary file make it readable by its owner only (0600).
    """
    beside = path.with_name(f".{path.name}.rights")
    try:
        beside.touch()  # Reading the umask would require changing it.
        shutil.copymode(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all; errors are those of `replace`."""
    replace(path, lambda place: place.write_text(text, encoding="utf-8"))


def is_free(folder: pathlib.Path) -> bool:
    """Whether a folder is new or empty, apart from an earlier failed export."""
    if not folder.exists():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {PARTIAL}


def require_place(folder: pathlib.Path, what: str) -> None:
    """Refuses a folder that could not be created, by creating one where it would be.

    Args:
        folder: the folder to be created later.
        what: its name at the beginning of the error.

    Raises:
        UserError: naming the place and the system's reason.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        pathlib.Path(tempfile.mkdtemp(prefix=".", dir=place)).rmdir()
    except OSError as error:
        raise UserError(
            f"{what}: expected a place that can be written to, got "
            f"'{error.strerror or error}' in {place}: choose another"
        ) from error


def fill_folder(
    folder: pathlib.Path,
    write: Callable[[pathlib.Path], object],
    refusals: tuple[type[Exception], ...] = (),
) -> None:
    """Writes a folder's files apart, and moves them there once all are complete.

    Args:
      folder: new or empty.
      write: writes all files into the folder it is given.
      refusals: exceptions that writing libraries raise for a full disk.

    Raises:
      OSError: if writing fails; the folder is as it was, or new and empty.
    """
    partial = folder / PARTIAL
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for path in sorted(partial.iterdir(), key=lambda path: path.name in LAST):
            path.replace(folder / path.name)
    except refusals as error:
        raise OSError(errno.EIO, str(error), str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
