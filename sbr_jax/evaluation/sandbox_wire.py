"""Calls a function of another process with plain data, and trusts nothing it says.

Standard library only: both sides of the sandbox import this file.
"""

import builtins
import json
import os
import struct
from collections.abc import Callable
from typing import Any

MOST_BYTES = 64 * 2**20
"""Of one message; more is not read."""


class Gone(BaseException):
    """The other side has ended; no check can catch this by accident."""


class Opaque:
    """A value that is no plain data: equal to nothing but itself, maybe iterable."""

    def __init__(self, name: str, items: list[Any] | None = None):
        """Names what it was.

        Args:
          name: of its type.
          items: what iterating it gave.
        """
        self.name, self.items = name, items

    def __iter__(self):
        """Goes over what was sent."""
        if self.items is None:
            raise TypeError(f"'{self.name}' object is not iterable")
        return iter(self.items)

    def __repr__(self) -> str:
        """Shows the type only."""
        return f"<{self.name}>"


# Subclasses are sent as what they are in Python's eyes, without their own methods.
_ATOMS = ((int, int.__int__), (float, float.__float__), (str, str.__str__))
_GROUPS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """A value as JSON: exact types of Python's own, all else as :class:`Opaque`.

    >>> decode(encode({1: (2.5, "x"), None: {True}}))
    {1: (2.5, 'x'), None: {True}}
    """
    if value is None or value is True or value is False:
        return value
    for kind, plain in _ATOMS:
        if isinstance(value, kind):
            return plain(value)
    for name, kind in _GROUPS.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in dict.items(value)]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    name = type(value).__name__
    if hasattr(value, "__iter__"):
        return {"opaque": [name, [encode(item) for item in value]]}
    return {"opaque": [name, None]}


def decode(value: Any) -> Any:
    """What :func:`encode` wrote, made of Python's own types only.

    Raises:
      ValueError: for anything else.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a bare list")
        return value
    ((name, content),) = value.items()
    if name in _GROUPS:
        return _GROUPS[name](decode(item) for item in content)
    if name == "dict":
        return {decode(k): decode(v) for k, v in content}
    if name in ("bytes", "bytearray"):
        return getattr(builtins, name).fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "opaque":
        kind, items = content
        return Opaque(str(kind), None if items is None else [decode(i) for i in items])
    raise ValueError(f"unknown kind of value {name!r}")


def send(pipe: int, message: Any) -> None:
    """Writes one message.

    Raises:
      Gone: if nobody reads any more.
    """
    data = json.dumps(message).encode()
    data = struct.pack("<Q", len(data)) + data
    try:
        while data:
            data = data[os.write(pipe, data) :]
    except BrokenPipeError:
        raise Gone from None


def receive(pipe: int) -> Any:
    """Reads one message.

    Raises:
      Gone: if nobody writes any more.
      ValueError: for what is no message.
    """
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    if size > MOST_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(pipe, size))


def _exactly(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(pipe, min(size - len(data), 2**20))
        if not piece:
            raise Gone
        data += piece
    return bytes(data)


def complaint(error: BaseException) -> dict[str, list[str]]:
    """An exception as a message: its type's name and what it says."""
    try:
        said = str(error)[:500]
    except BaseException:  # Its own code may do anything.
        said = ""
    return {"raised": [type(error).__name__, said]}


def answer(call: Callable[[], Any]) -> Any:
    """Does what is asked and returns the message about it: a value or an exception."""
    try:
        return {"value": encode(call())}
    except BaseException as error:  # Whatever it was, it is the result.
        return complaint(error)


def raise_again(name: str, said: str) -> None:
    """Raises an exception of the other side as one of Python's own.

    Args:
      name: of its type.
      said: its message.
    """
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(said)
        except TypeError:  # UnicodeDecodeError and its like need more than a message.
            kind = None
    else:  # Nothing that would end this process, SystemExit least of all.
        kind = None
    raise error if kind else type(str(name).replace("\0", ""), (Exception,), {})(said)


def value_of(message: Any) -> Any:
    """The value of an answer.

    Raises:
      Exception: the other side's, or RuntimeError for what is no answer.
    """
    if isinstance(message, dict) and len(message) == 1:
        if "value" in message:
            try:
                return decode(message["value"])
            except (ValueError, TypeError, AttributeError) as error:
                raise RuntimeError(f"no plain data: {error}") from None
        if isinstance(said := message.get("raised"), list) and len(said) == 2:
            raise_again(*said)
    raise RuntimeError("the program's process sent what is no answer")


def remote(inbox: int, outbox: int) -> Callable[..., Any]:
    """A function that is called in the process at the other end of two pipes.

    Args:
      inbox: where its answers are read.
      outbox: where calls are written.

    Returns:
      The function; it takes and returns copies.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        send(outbox, [encode(list(args)), encode(kwargs)])
        return value_of(receive(inbox))

    return call
