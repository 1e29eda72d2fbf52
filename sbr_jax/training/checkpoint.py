"""Saving and restoring pytrees: the only module that knows Orbax.

Small trees only (adapter, optimizer and method state), written synchronously: a few
tens of milliseconds. A save is atomic: Orbax writes beside the target and renames.
"""

import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax import distributed, storage
from sbr_jax.training.records import unwritable, writing
from sbr_jax.typing import PyTree, UserError

EMPTY = "empty"
"""A file in a bucket's checkpoint of a tree without arrays."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the logs and warnings of Orbax."""
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save(folder: str | pathlib.Path, tree: PyTree) -> None:
    """Writes a pytree of arrays and replaces the content of ``folder``.

    Args:
      folder: target; its parent must exist.
      tree: arrays and Python numbers. Orbax's standard handler refuses typed PRNG
        keys: save the integer they were made from.

    Raises:
      UserError: if the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    folder = _whole(folder)
    arrays = _arrays(tree)
    size = sum(x.nbytes for x in arrays) if arrays else None
    # One process clears the place before any process writes.
    distributed.decide(lambda: _clear(folder, size))
    if not arrays:  # Orbax refuses an empty tree.
        return
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(folder, args=ocp.args.StandardSave(arrays))
    except (ValueError, OSError) as error:
        # TensorStore raises one type for everything; its text has the system's errno.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = error.errno if isinstance(error, OSError) else code and int(code[1])
        if number is None:
            raise
        raise unwritable(folder, os.strerror(number)) from error


def _clear(folder: pathlib.Path, size: int | None) -> None:
    """Clears a checkpoint's place and checks free space; None makes an empty one."""
    with writing(folder):
        for path in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
            _delete(path)  # Left by a kill or a full disk.
        if folder.exists():
            _delete(folder)
        if size is None:
            _make_empty(folder)
        # Checked before: Orbax writes arrays in parallel, and each would complain.
        elif storage.is_bucket(folder):
            return
        elif shutil.disk_usage(folder.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _whole(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder as Orbax wants it: absolute, or a bucket's address."""
    found = storage.folder(folder)
    return found if storage.is_bucket(found) else found.resolve()


def _delete(folder: pathlib.Path) -> None:
    if storage.is_bucket(folder):
        storage.remove(folder)
    else:
        shutil.rmtree(folder)


def _make_empty(folder: pathlib.Path) -> None:
    if storage.is_bucket(folder):  # A bucket has no empty folders.
        (folder / EMPTY).write_text("")
    else:
        folder.mkdir()


def restore(folder: str | pathlib.Path, like: PyTree) -> PyTree:
    """Reads back, bit for bit, what :func:`save` wrote, placed like ``like``.

    ``like`` is a tree of the same structure; its leaves are arrays, or shapes with
    shardings.

    Raises:
      UserError: if the folder is missing or holds another structure.
    """
    import orbax.checkpoint as ocp

    folder = _whole(folder)
    if not folder.is_dir():
        raise UserError(f"expected a checkpoint at {folder}, found none")
    target = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for x in _arrays(like)
    ]
    if not target:
        return like
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            found = reader.restore(folder, args=ocp.args.StandardRestore(target))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"checkpoint {folder} does not hold what is expected "
            f"({str(error).splitlines()[0][:200]}); it is damaged or of another "
            "version: delete its stage folder to compute it again"
        ) from error
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _arrays(tree: PyTree) -> list[Any]:
    """The leaves, numbered: Orbax need not know our node types."""
    return [
        leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
        for leaf in jax.tree.leaves(tree)
    ]
