"""Reads and writes safetensors files of finite floating-point numbers."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sbr_jax.files import share
from sbr_jax.typing import UserError

FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of weights; codes mean nothing without their decoder."""
_BLOCK = 2**22


def open_tensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """A handle of a safetensors file, closed with the stack.

    Raises:
      UserError: if the file is not one, or truncated.
    """
    try:
        return stack.enter_context(safe_open(path, "numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no safetensors file, or it is cut short "
            f"({' '.join(str(error).split()):.200}); fetch it again"
        ) from error


def not_floats(kinds: Mapping[str, str]) -> list[str]:
    """Describes the tensors that do not hold floating-point numbers.

    >>> not_floats({"norm": "F32", "q_proj": "U8"})
    ['q_proj holds U8, expected F16, BF16, F32 or F64']
    """
    wanted = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
    return [
        f"{shown(name)} holds {kind}, expected {wanted}"
        for name, kind in sorted(kinds.items())
        if kind not in FLOATS
    ]


def read_tensors(
    path: pathlib.Path, dtype: Any = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Args:
      path: the file.
      dtype: to convert to; None keeps the file's.

    Raises:
      UserError: for a damaged file, and for tensors that do not hold finite numbers
        only.
    """
    with contextlib.ExitStack() as stack:
        file = open_tensors(path, stack)
        names = list(file.keys())
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
        if wrong := not_floats(kinds):
            raise UserError(f"the tensors of {path}: {some(wrong)}")
        found = {
            name: as_finite(file.get_tensor(name), dtype, name, path) for name in names
        }
        return found, file.metadata() or {}


def as_finite(
    values: np.ndarray, dtype: Any, name: str, where: str | pathlib.Path
) -> np.ndarray:
    """Converts weights to a device's dtype and checks that all are finite.

    Args:
      values: the weights as read.
      dtype: to convert to; None keeps theirs.
      name: the tensor's name, for messages.
      where: the file, for messages.

    Raises:
      UserError: for NaN, infinity, or values that overflow in this dtype.

    >>> as_finite(np.ones(2, np.float32), jnp.bfloat16, "norm", "a file").dtype.name
    'bfloat16'
    """
    dtype = float_dtype(values.dtype if dtype is None else dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.astype(dtype, copy=False)
    if not is_finite(values):
        raise UserError(
            f"{shown(name)} in {where} holds a weight that is not finite (as {dtype}); "
            "one such weight spoils every result, so fetch or repair the file"
        )
    return values


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file with the permissions of any new file."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    share(path)


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype that weights get here; float64 becomes float32 unless JAX has it.

    >>> float_dtype("float64")
    dtype('float32')
    """
    try:
        found = jax.dtypes.canonicalize_dtype(np.dtype(dtype))
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise UserError(
            f"dtype: expected float32, bfloat16 or float16, got {dtype!r:.60}"
        )
    return found


def is_finite(values: np.ndarray) -> bool:
    """True if every number is finite, that is, no exponent is all ones.

    It looks at bits, since NumPy has no fast loop for bfloat16, and works in blocks, so
    that no second array of that size is held.

    >>> is_finite(np.array([1.0, 65504.0], np.float16)), is_finite(np.array([np.inf]))
    (True, False)
    """
    info = jnp.finfo(values.dtype)
    ones = ((1 << info.nexp) - 1) << info.nmant
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    blocks = range(0, bits.size, _BLOCK)
    return not any(np.any((bits[i : i + _BLOCK] & ones) == ones) for i in blocks)


def shown(name: str) -> str:
    """A name as a message shows it, on one line."""
    return name if name.isprintable() else repr(name)


def some(things: Iterable[str]) -> str:
    """The first five of several things, and how many more there are."""
    things = list(things)
    text = ", ".join(map(shown, things[:5]))
    return text + (f" and {len(things) - 5} more" if len(things) > 5 else "")
