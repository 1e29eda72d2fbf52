"""Checkpoints inside a stage, written beside its steps from a copy on the host.

What a domain changes is small: adapter, moments, and the few entries of a method's
state that a refresh makes anew. Bases that an optimizer copies from the state are put
back from there, and what a stage began with is read from the stage that left it.
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
    """A thread that does one piece of work after the other; at most one is open.

    >>> done = []
    >>> writer = Writer()
    >>> writer.start(lambda: done.append(1))
    >>> writer.wait()
    >>> done
    [1]
    """

    def __init__(self):
        """Nothing is open; the thread is made when it is needed."""
        self._open: list[concurrent.futures.Future[None]] = []

    def start(self, work: Callable[[], None]) -> None:
        """Does it from now on; what was open must have been waited for."""
        assert not self._open, "waited for what was open"
        pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._open.append(pool.submit(work))
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until nothing is open.

        Raises:
          UserError: what the work raised, once.
        """
        while self._open:
            concurrent.futures.wait(self._open[:1])
            self._open.pop(0).result()


def changed(train: PyTree, state: PyTree, before: PyTree = None) -> dict[str, Any]:
    """What is to be kept of a training state and a method's, by name.

    Subspaces of the training state are copies of the method's, and are not. Of the
    method's state what is not as it was ``before``, when the stage began; None for
    whatever may be kept.

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
    """Trees as they were by :func:`changed`; those given are as the stage began."""
    nodes, treedef = jax.tree.flatten(train, is_leaf=_is_subspace)
    nodes = [_like(found.get(f"train {i}"), x) for i, x in enumerate(nodes)]
    leaves, structure = jax.tree.flatten(state)
    leaves = [_like(found.get(f"state {i}"), x) for i, x in enumerate(leaves)]
    return treedef.unflatten(nodes), structure.unflatten(leaves)


def _is_subspace(node: Any) -> bool:
    return isinstance(node, Subspace)


def _like(array: Any, old: Any) -> Any:
    """An array where another lies; the other for none."""
    if array is None:
        return old
    own = getattr(old, "sharding", None)
    if isinstance(own, NamedSharding):
        return place(array, own)
    # Uncommitted, as freshly computed arrays are: the same compiled program.
    return jnp.asarray(np.asarray(array))


def apart(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is whole on every device, as copies on the host, and what is split.

    All processes must ask for it.
    """
    split = {
        name: x
        for name, x in tree.items()
        if isinstance(x, jax.Array) and not x.is_fully_replicated
    }
    whole = {name: x for name, x in tree.items() if name not in split}
    # A view of a CPU's buffer would change with the next step, which takes it over.
    return {k: np.array(x) for k, x in arrays.fetch(whole).items()}, split


def write(folder: pathlib.Path, found: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into one file of a folder.

    Raises:
      UserError: where it cannot be written.
    """
    with writing(folder):
        storage.made(folder)
        with (folder / FILE).open("wb") as file:
            bits: dict[str, Any] = {name: _plain(x) for name, x in found.items()}
            np.savez(file, **bits)


def _plain(x: np.ndarray) -> np.ndarray:
    """The same bits in a type that NumPy has by itself."""
    return x if x.dtype.isbuiltin == 1 else x.view(f"u{x.dtype.itemsize}")


def read(folder: pathlib.Path, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads what :func:`write` wrote, in the dtypes of ``like``."""
    with np.load(io.BytesIO((folder / FILE).read_bytes())) as file:
        return {name: file[name].view(like[name].dtype) for name in file.files}
