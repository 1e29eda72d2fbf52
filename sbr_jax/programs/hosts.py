"""Programs on several hosts: their option, and checks that all hosts agree."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sbr_jax import distributed, storage
from sbr_jax.typing import UserError

OPTION = "--distributed"
LIBRARIES = ("jax", "jaxlib", "optax", "orbax-checkpoint")
PACKAGE = Path(__file__).parents[1]


def joined(
    arguments: Any, words: Sequence[str], folder: Path | None = None
) -> contextlib.AbstractContextManager[None]:
    """Joins the processes that a command line names.

    Args:
        arguments: parsed; `distributed` is the option.
        words: the unparsed words, which must be the same in all processes.
        folder: must be visible to all; None for the arguments' `workdir`.
    """
    place = folder or getattr(arguments, "workdir", None)
    return distributed.joined(
        arguments.distributed,
        place and storage.folder(place),
        lambda: {
            "command line": list(_shared(words)),
            "code": code(),
            "set of libraries": [f"{x} {metadata.version(x)}" for x in LIBRARIES],
        },
    )


def _shared(words: Sequence[str]) -> Iterator[str]:
    """The words that all processes share: all but the option itself.

    >>> list(_shared(["demo", "--distributed", "a:1,2,0", "--quiet"]))
    ['demo', '--quiet']
    """
    left = iter(words)
    for word in left:
        if word == OPTION:
            next(left, None)
        elif not word.startswith(f"{OPTION}="):
            yield word


def code() -> str:
    """A digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def require_one(arguments: Any, what: str = "this program") -> None:
    """Refuses several processes if only one can do the work."""
    if arguments.distributed != "off":
        raise UserError(
            f"{OPTION} {arguments.distributed}: {what} is the work of one process: "
            "drop it, and do that on one host"
        )
