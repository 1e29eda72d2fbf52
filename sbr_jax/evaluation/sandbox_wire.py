"""Calls a function of another process with plain data, trusting none of its answers.

Standard library only: both sides of the sandbox import this file.
"""

import builtins
import contextlib
import json
import os
import struct
from collections.abc import Callable
from typing import Any

MOST_BYTES = 64 * 2**20
"""Most bytes of one message; more is not read."""


class Gone(BaseException):
    """The other side has ended. Not an Exception, so that no check catches it."""


class Opaque:
    """A value that is not plain data: equal only to itself, perhaps iterable."""

    def __init__(self, name: str, items: list[Any] | None = None):
        """Keeps the name of its type."""
        self.name, self.items = name, items

    def __iter__(self):
        """Iterates over the items that were sent."""
        if self.items is None:
            raise TypeError(f"'{self.name}' object is not iterable")
        return iter(self.items)

    def __repr__(self) -> str:
        """Shows only the type."""
        return f"<{self.name}>"


# A subclass is sent as its built-in type, without its own methods.
_Plain = Callable[[Any], Any]
_ATOMS: tuple[tuple[type, _Plain], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
)
_BYTES: tuple[tuple[type, _Plain], ...] = (
    (bytes, bytes.hex),
    (bytearray, bytearray.hex),
)
_GROUPS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


_END = object()


def _name(value: Any) -> str:
    # Not by attribute access, which a metaclass may answer arbitrarily.
    return vars(type)["__name__"].__get__(type(value))


def _opened(value: Any) -> tuple[str | None, Any]:
    """A container's kind and iterator; or None and a token for any other value."""
    if value is None or value is True or value is False:
        return None, value
    for kind, plain in _ATOMS:
        if isinstance(value, kind):
            atom = plain(value)
            # Python refuses to convert long integers to or from decimals.
            long = kind is int and atom.bit_length() > 64
            return None, {"int": hex(atom)} if long else atom
    for name, kind in _GROUPS.items():
        if isinstance(value, kind):
            return name, kind.__iter__(value)
    if isinstance(value, dict):
        return "dict", (part for pair in dict.items(value) for part in pair)
    for kind, plain in _BYTES:
        if isinstance(value, kind):
            return None, {kind.__name__: plain(value)}
    if isinstance(value, complex):
        return None, {"complex": [value.real, value.imag]}
    if hasattr(value, "__iter__"):
        try:
            return "opaque", iter(value)
        except TypeError:  # A class has its instances' __iter__.
            pass
    return None, {"opaque": [_name(value), None]}


def encode(value: Any) -> list[Any]:
    """A value as JSON: built-in types exactly, everything else as :class:`Opaque`.

    The list is flat: parts come first, then their container with the number of parts,
    so no nesting is too deep. Inside itself, a container is opaque.

    >>> encode([1, (2.5, "x")])
    [1, 2.5, 'x', {'tuple': 2}, {'list': 2}]
    >>> decode(encode({1: (2.5, "x"), None: {True}}))
    {1: (2.5, 'x'), None: {True}}
    """
    tokens: list[Any] = []
    # Kind, iterator, parts so far, and the value itself, which keeps its id in use.
    around: list[list[Any]] = [["", iter((value,)), 0, None]]
    open_ids: set[int] = set()
    while around:
        kind, parts, count, holder = around[-1]
        part = next(parts, _END)
        if part is _END:
            around.pop()
            open_ids.discard(id(holder))
            if kind:
                opaque = kind == "opaque"
                tokens.append({kind: [_name(holder), count] if opaque else count})
            continue
        around[-1][2] += 1
        if id(part) in open_ids:
            tokens.append({"opaque": [_name(part), None]})
            continue
        kind, found = _opened(part)
        if kind is None:
            tokens.append(found)
        else:
            open_ids.add(id(part))
            around.append([kind, found, 0, part])
    return tokens


def decode(tokens: Any) -> Any:
    """Rebuilds the value that :func:`encode` wrote, from Python's own types only.

    Raises:
      ValueError: for anything else.
    """
    if not isinstance(tokens, list):
        raise ValueError("no list")
    made: list[Any] = []

    def taken(count: int) -> list[Any]:
        if type(count) is not int or not 0 <= count <= len(made):
            raise ValueError(f"{count!r} parts of {len(made)}")
        place = len(made) - count
        parts = made[place:]
        del made[place:]
        return parts

    for token in tokens:
        if isinstance(token, list):
            raise ValueError("a bare list")
        if not isinstance(token, dict):
            made.append(token)
            continue
        ((name, content),) = token.items()
        if name in ("list", "tuple"):
            made.append(_GROUPS[name](taken(content)))
        elif name in ("set", "frozenset"):
            made.append(_GROUPS[name](map(_hashable, taken(content))))
        elif name == "dict":
            parts = taken(content)
            keys = map(_hashable, parts[::2])
            made.append(dict(zip(keys, parts[1::2], strict=True)))
        elif name == "int":
            made.append(int(content, 16))
        elif name in ("bytes", "bytearray"):
            made.append(getattr(builtins, name).fromhex(content))
        elif name == "complex":
            made.append(complex(*content))
        elif name == "opaque":
            kind, count = content
            made.append(Opaque(str(kind), None if count is None else taken(count)))
        else:
            raise ValueError(f"unknown kind of value {name!r}")
    (value,) = made
    return value


def _hashable(value: Any) -> Any:
    """A value that can be hashed; opaque if only its own class could hash it."""
    try:
        hash(value)
    except TypeError:
        return Opaque(_name(value), list(value))
    return value


def send(pipe: int, message: Any) -> None:
    """Writes one message.

    Raises:
      Gone: if nobody reads any more.
      RuntimeError: if the message is longer than is read; nothing is written then.
    """
    text = json.dumps(message).encode()
    _check_size(len(text))
    data = memoryview(struct.pack("<Q", len(text)) + text)
    try:
        while data:
            data = data[os.write(pipe, data) :]
    except BrokenPipeError:
        raise Gone from None


def receive(pipe: int) -> Any:
    """Reads one message.

    Raises:
      Gone: if nobody writes any more.
      RuntimeError: if it is not a message.
    """
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    _check_size(size)
    text = _exactly(pipe, size)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"no message: {error}") from None


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise RuntimeError(f"a message of {size} bytes, more than {MOST_BYTES}")


def _exactly(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(pipe, min(size - len(data), 2**20))
        if not piece:
            raise Gone
        data += piece
    return bytes(data)


def complaint(error: BaseException) -> dict[str, list[str]]:
    """An exception as a message: the name of its type and its text."""
    try:
        said = str(error)[:500]
    except BaseException:  # The exception's own code may do anything.
        said = ""
    return {"raised": [_name(error), said]}


def answer(call: Callable[[], Any]) -> Any:
    """Calls a function and returns the message: its value or its exception."""
    try:
        return {"value": encode(call())}
    except BaseException as error:  # Any exception is the result.
        return complaint(error)


def raise_again(name: str, said: str) -> None:
    """Raises the other side's exception as one of Python's own."""
    kind = getattr(builtins, str(name), None)
    error: Exception | None = None
    # Nothing that would end this process, such as SystemExit.
    if isinstance(kind, type) and issubclass(kind, Exception):
        # Types such as UnicodeDecodeError need more than a message.
        with contextlib.suppress(TypeError):
            error = kind(said)
    if error is None:
        plain = str(name).replace("\0", "").encode(errors="replace").decode()
        error = type(plain, (Exception,), {})(said)
    raise error


def value_of(message: Any) -> Any:
    """The value in an answer.

    Raises:
      Exception: the other side's, or RuntimeError if it is not an answer.
    """
    if isinstance(message, dict) and len(message) == 1:
        if "value" in message:
            try:
                return decode(message["value"])
            except (ValueError, TypeError, ArithmeticError) as error:
                raise RuntimeError(f"no plain data: {error}") from None
        if isinstance(said := message.get("raised"), list) and len(said) == 2:
            raise_again(*said)
    raise RuntimeError("the program's process sent what is no answer")


def remote(inbox: int, outbox: int) -> Callable[..., Any]:
    """A function that runs in the process at the other end of two pipes.

    Returns:
      The function; it takes and returns copies.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        send(outbox, [encode(list(args)), encode(kwargs)])
        return value_of(receive(inbox))

    return call
