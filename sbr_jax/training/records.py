"""Records: JSON files sealed by a digest of their own content.

A record is written whole or not at all. A record that was cut, edited, moved or copied
is refused when read, in one line that says what to delete.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax import storage
from sbr_jax.typing import UserError

DIGEST = "digest"


class DamagedError(UserError):
    """A file of a run is no longer as it was written.

    Attributes:
      reason: what was expected, and what was found.
      redo: path to delete so that the same command computes it again.
    """

    def __init__(
        self, reason: str, redo: pathlib.Path, more: Sequence["DamagedError"] = ()
    ):
        """Makes one line of this error and of ``more`` errors of the same kind."""
        self.reason, self.redo = reason, redo
        paths = dict.fromkeys([redo, *(error.redo for error in more)])
        whole = [p for p in paths if not any(q in p.parents for q in paths)]
        others = f" (and {len(more)} more of the kind)" if more else ""
        super().__init__(f"{reason}{others}: {again(*whole)}")


def again(*paths: pathlib.Path) -> str:
    """Advice to delete files or folders, which the same command then makes anew."""
    named = shlex.join(map(str, paths))
    return f"delete {named} and run the same command again"


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns the system's refusal to write (a full disk, say) into one line.

    Raises:
      UserError: naming the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error.strerror or str(error)) from error


def unwritable(path: pathlib.Path, reason: str) -> UserError:
    """The error for a place that cannot be written."""
    return UserError(
        f"cannot write {path} ({reason}); what is finished is kept: make room or mend "
        "the folder, and run the same command again"
    )


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is either whole or absent.

    Raises:
      UserError: if it cannot be written.
    """
    with writing(path):
        storage.write_text(path, text)


def write_record(
    path: pathlib.Path, content: Mapping[str, Any], *, indent: int | None = None
) -> None:
    """Writes JSON with a digest of its content; see :func:`write_atomically`."""
    whole = {**content, DIGEST: digest_of(content)}
    write_atomically(path, json.dumps(whole, indent=indent) + "\n")


def read_json(
    path: pathlib.Path, remedy: str | None = None, *, sealed: bool = False
) -> dict[str, Any]:
    """Reads a file that a run wrote, and checks and removes its digest.

    Args:
      path: of the file.
      remedy: what to do if it is damaged; None for "delete it and run again".
      sealed: whether to refuse a file without a digest. Files of older versions have
        none and can still be reported.

    Raises:
      UserError: if it is damaged.
    """
    found, complaint = _content(path, sealed=sealed)
    if complaint:
        raise UserError(f"{complaint}: {again(path) if remedy is None else remedy}")
    return found


def read_record(path: pathlib.Path, redo: pathlib.Path) -> dict[str, Any]:
    """Reads only what :func:`write_record` wrote.

    Raises:
      DamagedError: if it is damaged or has no digest; it says to delete ``redo``.
    """
    found, complaint = _content(path, sealed=True)
    if complaint:
        raise DamagedError(complaint, redo)
    return found


def _content(path: pathlib.Path, *, sealed: bool) -> tuple[dict[str, Any], str]:
    """A file's content, and what is wrong with it, if anything."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except OSError as error:
        return {}, f"cannot read {path} ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return {}, (
            f"expected JSON in {path}, got something else ({error}); it was damaged "
            "after it was written"
        )
    digest = found.pop(DIGEST, None)
    if digest is None and sealed:
        return {}, (
            f"expected a digest in {path}, found none; it was written by an older "
            "version, or damaged"
        )
    if digest not in (None, digest_of(found)):
        return {}, (
            f"expected {path} as it was written, found a content that its digest is "
            "not of; it was changed after it was written"
        )
    return found, ""


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their layout in a file.

    >>> digest_of({"a": 1, "b": (2,)}) == digest_of({"b": [2], "a": 1})
    True
    """
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a folder by relative path; empty for no folder.

    Raises:
      UserError: for a file that cannot be read.
    """
    found = {}
    for path in storage.below(folder):
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({error.strerror}): make it readable, and run the "
                "same command again"
            ) from error
        found[storage.relative(path, folder)] = digest
    return found


def plain_numbers(tree: Any) -> Any:
    """Converts a tree for JSON: arrays to lists, floats to six digits, NaN to null."""
    if isinstance(tree, Mapping):
        return {str(k): plain_numbers(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain_numbers(v) for v in tree]
    if isinstance(tree, (bool, str, int)) or tree is None:
        return tree
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if math.isfinite(tree) else None
    return plain_numbers(np.asarray(tree).tolist())
