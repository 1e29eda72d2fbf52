"""Checkpoints inside a stage, written from a copy on the host while it trains.

A domain changes little: adapter, moments, and the few entries of a method's state that
a refresh replaces. Only these are saved. The optimizer's copies of bases are restored
from the method's state, and the rest from the stage before.
"""

import concurrent.futures
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sbr_jax import storage
from sbr_jax.distributed import arrays
from sbr_jax.subspace import Subspace
from sbr_jax.training.records import writing
from sbr_jax.training.sharding import place
from sbr_jax.typing import PyTree

FILE = "arrays.npz"


class Writer:
    """A thread that does one piece of work at a time.

    >>> done = []
    >>> writer = Writer()
    >>> writer.start(lambda: done.append(1))
    >>> writer.wait()
    >>> done
    [1]
    """

    def __init__(self):
        """Starts without open work; the thread is made when it is needed."""
        self._open: list[concurrent.futures.Future[None]] = []

    def start(self, work: Callable[[], None]) -> None:
        """Starts work; the caller must have waited for the work before it."""
        assert not self._open, "waited for what was open"
        pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._open.append(pool.submit(work))
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until no work is open.

        Raises:
          UserError: if the work raised it; only once.
        """
        while self._open:
            concurrent.futures.wait(self._open[:1])
            self._open.pop(0).result()


def changed(train: PyTree, state: PyTree, before: PyTree = None) -> dict[str, Any]:
    """The arrays of a training state and a method's state to save, by name.

    Subspaces in the training state are left out: they are copies of the method's. An
    array of the method's state is left out if it is the one from ``before``, when the
    stage began; with None, all are included.

    >>> x = jnp.zeros(2)
    >>> sorted(changed({"a": x, "b": x}, {"c": x, "d": x + 1}, {"c": x, "d": x}))
    ['state 1', 'train 0', 'train 1']
    """
    nodes = jax.tree.leaves(train, is_leaf=_is_subspace)
    found = {f"train {i}": x for i, x in enumerate(nodes) if not _is_subspace(x)}
    leaves = jax.tree.leaves(state)
    old = [None] * len(leaves) if before is None else jax.tree.leaves(before)
    pairs = enumerate(zip(leaves, old, strict=True))
    return found | {f"state {i}": x for i, (x, own) in pairs if x is not own}


def put_back(
    found: Mapping[str, Any], train: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    """Puts arrays saved by :func:`changed` into the trees that the stage began with."""
    nodes, treedef = jax.tree.flatten(train, is_leaf=_is_subspace)
    nodes = [_like(found.get(f"train {i}"), x) for i, x in enumerate(nodes)]
    leaves, structure = jax.tree.flatten(state)
    leaves = [_like(found.get(f"state {i}"), x) for i, x in enumerate(leaves)]
    return treedef.unflatten(nodes), structure.unflatten(leaves)


def _is_subspace(node: Any) -> bool:
    return isinstance(node, Subspace)


def _like(array: Any, old: Any) -> Any:
    """An array placed like an older one; the older one if there is none."""
    if array is None:
        return old
    own = getattr(old, "sharding", None)
    if isinstance(own, NamedSharding):
        return place(array, own)
    # Uncommitted, like freshly computed arrays, to share their compiled program.
    return jnp.asarray(np.asarray(array))


def apart(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates arrays whole on every device (copied to the host) from split ones.

    All processes must call it.
    """
    split = {
        name: x
        for name, x in tree.items()
        if isinstance(x, jax.Array) and not x.is_fully_replicated
    }
    whole = {name: x for name, x in tree.items() if name not in split}
    # The next step reuses a CPU's buffer, so a view of it would change.
    return {k: np.array(x) for k, x in arrays.fetch(whole).items()}, split


def write(folder: pathlib.Path, found: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into one file of a folder.

    Raises:
      UserError: if it cannot be written.
    """
    with writing(folder):
        storage.made(folder)
        with (folder / FILE).open("wb") as file:
            bits: dict[str, Any] = {name: _plain(x) for name, x in found.items()}
            np.savez(file, **bits)


def _plain(x: np.ndarray) -> np.ndarray:
    """The same bits in one of NumPy's built-in types."""
    return x if x.dtype.isbuiltin == 1 else x.view(f"u{x.dtype.itemsize}")


def read(folder: pathlib.Path, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads what :func:`write` wrote, in the dtypes of ``like``."""
    with np.load(io.BytesIO((folder / FILE).read_bytes())) as file:
        return {name: file[name].view(like[name].dtype) for name in file.files}
