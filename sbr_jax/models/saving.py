"""Writes base weights as a Hugging Face checkpoint, in one file or in shards."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sbr_jax.models.config import ModelConfig
from sbr_jax.models.tensors import write_tensors
from sbr_jax.models.weights import INDEX, SINGLE, Source, sources
from sbr_jax.typing import PyTree, UserError


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, not yet fetched from its array's device."""

    name: str
    size: int
    """In bytes."""
    read: Callable[[], np.ndarray]


def _tensors(config: ModelConfig, base: PyTree) -> Iterator[_Tensor]:
    """The file's tensors that the arrays of the tree are stored as."""

    def part(leaf: Any, source: Source, layer: int) -> np.ndarray:
        values = np.asarray(leaf)
        values = values[layer] if source.stacked else values
        return values.T if source.transposed else values

    def reader(parts: list[tuple[Any, Source, int]]) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            values = [part(*one) for one in parts]
            whole = values[0] if len(values) == 1 else np.concatenate(values)
            return np.ascontiguousarray(whole)

        return read

    leaves = jax.tree.structure(sources(config)).flatten_up_to(base)
    found: dict[str, list[tuple[Any, Source, int]]] = {}
    for source, leaf in zip(jax.tree.leaves(sources(config)), leaves, strict=True):
        for layer, name in enumerate(source.names):
            found.setdefault(name, []).append((leaf, source, layer))
    for name, parts in found.items():
        parts.sort(key=lambda one: one[1].rows or (0, 0))
        sizes = (x.size * x.dtype.itemsize // len(s.names) for x, s, _ in parts)
        yield _Tensor(name, sum(sizes), reader(parts))


def _shards(tensors: list[_Tensor], limit: float) -> list[list[_Tensor]]:
    """Tensors in order, each shard filled until the next would pass the limit."""
    shards: list[list[_Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def save_weights(
    folder: str | pathlib.Path,
    config: ModelConfig,
    base: Mapping[str, Any],
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes the base weights under Hugging Face's names.

    Writes ``model.safetensors``, or, if that is larger than ``max_shard_bytes``, shards
    with an index; the host holds only one shard at a time. Older weights under these
    names are removed: transformers would read an old ``model.safetensors`` rather than
    the new index.

    Args:
      folder: an existing folder.
      config: the model's settings.
      base: the weights.
      max_shard_bytes: limit of one file; a larger tensor gets a file of its own.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise UserError(
            f"expected max_shard_bytes of at least 1 or None, got {max_shard_bytes}"
        )
    folder = pathlib.Path(folder)
    limit = math.inf if max_shard_bytes is None else max_shard_bytes
    shards = _shards(list(_tensors(config, base)), limit)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        tensors = {tensor.name: tensor.read() for tensor in shard}
        write_tensors(folder / file, tensors)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(t.size for shard in shards for t in shard)},
            "weight_map": {
                tensor.name: file
                for file, shard in zip(files, shards, strict=True)
                for tensor in shard
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
        files.append(INDEX)
    for pattern in (SINGLE, INDEX, "model-*-of-*.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in files:
                path.unlink()
