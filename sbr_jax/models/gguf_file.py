"""Reads a GGUF file's container: settings, and tensors in blocks of few bits.

The layout is ggml's: magic, version, counts, key-value pairs, tensor infos, then the
data, aligned. Every size is compared with the file's before anything of that size is
allocated, and nothing in a file is run.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from sbr_jax.typing import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
"""NumPy's names for the types of settings."""
_LONGEST_NAME, _MOST_DIMENSIONS = 2**16, 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor as the header describes it."""

    shape: tuple[int, ...]
    """In NumPy's order: the file's first dimension is the last here."""
    kind: Any
    """``gguf.GGMLQuantizationType``."""
    data: np.ndarray
    """Its bytes, not copied."""

    def dense(self) -> np.ndarray:
        """The values in float32."""
        # Blocks run along the last dimension.
        rows = self.data.reshape(-1, self.data.size // math.prod(self.shape[:-1]))
        name = {"F32": "<f4", "F16": "<f2"}.get(self.kind.name)
        values = rows.view(name) if name else _gguf().dequantize(rows, self.kind)
        return np.asarray(values, np.float32).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Settings and tensors of a file."""

    path: pathlib.Path
    fields: dict[str, Any]
    """Settings by name; each 32-bit float as the shortest decimal that rounds to it."""
    tensors: dict[str, Tensor]


class _Reader:
    """A position in a file's bytes that never passes their end."""

    def __init__(self, path: pathlib.Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def fail(self, said: str) -> UserError:
        return UserError(f"{self.path} is no whole GGUF file: {said}; fetch it again")

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise self.fail(
                f"expected {size} bytes at {self.at} of its header, got "
                f"{len(self.data) - self.at}"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, longest: int | None = None) -> str:
        size = self.number("Q")
        if longest is not None and size > longest:
            raise self.fail(f"expected a name of at most {longest} bytes, got {size}")
        return self.decoded(self.take(size))

    def decoded(self, data: memoryview) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a text before {self.at} is not UTF-8") from error

    def values(self, kind: int, count: int) -> list[Any]:
        """Reads ``count`` numbers of a type."""
        name = _NUMBERS[kind]
        raw = np.frombuffer(self.take(np.dtype(name).itemsize * count), name)
        # A 1e-5 that was rounded to 32 bits becomes 1e-5 again.
        if name == "<f4":
            return [float(str(x)) for x in raw]
        return raw.tolist()

    def setting(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.values(kind, 1)[0]
        if kind != _ARRAY:
            raise self.fail(f"unknown type {kind} of a setting at {self.at - 4}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return self.values(kind, count)
        if kind != _STRING:
            raise self.fail(f"unsupported type {kind} in a list at {self.at - 12}")
        # Each text takes at least the eight bytes of its length.
        if count > (len(self.data) - self.at) // 8:
            raise self.fail(f"a list of {count} texts at {self.at} has no room")
        return [self.text() for _ in range(count)]


def read_gguf(path: pathlib.Path) -> GgufFile:
    """Reads the header of a file; tensors stay on disk until they are used.

    Raises:
      UserError: for another format or version, a truncated file, sizes that do not fit
        into the file, and tensor types that cannot be decoded.
    """
    sizes = _block_sizes()
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
    reader = _Reader(path, data)
    if (magic := bytes(data[:4])) != MAGIC:
        raise reader.fail(f"expected {MAGIC!r} at its start, got {magic!r}")
    reader.at = 4
    if (version := reader.number("I")) not in VERSIONS:
        raise reader.fail(f"expected version 2 or 3, got {version}")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    for name, count in (("tensors", tensors), ("settings", pairs)):
        # The smallest entry of either kind: a name's length, a type and one byte.
        if count > len(data) // 13:
            raise reader.fail(f"its header tells of {count} {name}, more than it holds")
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        _add(fields, reader.text(_LONGEST_NAME), reader.setting, reader)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        _add(infos, reader.text(_LONGEST_NAME), lambda: _info(reader), reader)
    step = fields.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1 or step & (step - 1):
        raise reader.fail(f"expected a power of two as general.alignment, got {step!r}")
    start = -(-reader.at // step) * step
    places = {
        name: _place(reader, name, info, start, sizes) for name, info in infos.items()
    }
    return GgufFile(path, fields, places)


def _add(
    found: dict[str, Any], name: str, read: Callable[[], Any], reader: _Reader
) -> None:
    if name in found:
        raise reader.fail(f"{name!r:.80} is there twice")
    found[name] = read()


def _info(reader: _Reader) -> tuple[tuple[int, ...], int, int]:
    """Shape, type and offset of a tensor."""
    count = reader.number("I")
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise reader.fail(f"expected a tensor of 1 to 4 dimensions, got {count}")
    shape = tuple(reader.number("Q") for _ in range(count))
    return shape[::-1], reader.number("I"), reader.number("Q")


def _place(
    reader: _Reader,
    name: str,
    info: tuple[tuple[int, ...], int, int],
    start: int,
    sizes: dict[int, tuple[Any, int, int]],
) -> Tensor:
    """A tensor's bytes, which must lie in the file and fill whole blocks."""
    shape, kind, offset = info
    if kind not in sizes:
        raise UserError(
            f"unsupported type {kind} of {name!r:.80} in {reader.path}: the installed "
            "gguf package cannot decode it; update it, or take another quantisation"
        )
    what, block, size = sizes[kind]
    if 0 in shape or shape[-1] % block:
        raise reader.fail(
            f"{name!r:.80} of shape {shape} is not of whole blocks of {block}"
        )
    count = math.prod(shape) // block * size
    first = start + offset
    if first + count > len(reader.data):
        raise reader.fail(
            f"expected {count} bytes of {name!r:.80} at {first}, which is beyond its "
            f"end at {len(reader.data)}"
        )
    return Tensor(shape, what, np.frombuffer(reader.data, np.uint8, count, first))


def _gguf() -> Any:
    """The optional ``gguf`` package."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            "a .gguf file needs the package gguf, which is not installed: pip install "
            "'sbr_jax[gguf]'"
        ) from error


def _block_sizes() -> dict[int, tuple[Any, int, int]]:
    """The types we can decode, by number: type, values and bytes of a block."""
    gguf = _gguf()

    def decodes(kind: Any, size: int) -> bool:
        # float64 and integers are no weights; the package leaves them as they are.
        if kind.name in ("F64", "I8", "I16", "I32", "I64"):
            return False
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return kind.name in ("F32", "F16")
        return True

    table = gguf.GGML_QUANT_SIZES.items()
    return {int(k): (k, n, size) for k, (n, size) in table if decodes(k, size)}
