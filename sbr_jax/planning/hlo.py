"""Parses the text of a compiled program into computations and instructions.

After optimisation XLA prints a program as named *computations* of *instructions*
``%name = type opcode(operands), attributes``. We keep only what counting needs: types,
operands, and attributes as text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from sbr_jax.typing import UserError

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_BRACKETS = {"(": ")", "{": "}", "[": "]"}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
        dtype: in XLA's spelling.
        dims: sizes of its axes.
        space: memory space; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without padding.

        >>> Array("bf16", (2, 3)).bytes, Array("s4", (3,)).bytes
        (12.0, 1.5)
        """
        return self.size * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in its computation.
        opcode: the operation.
        arrays: the result's arrays, in order if it is a tuple.
        operands: names of other instructions of the computation.
        inside: the text between the parentheses.
        attributes: the text after them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def bytes(self) -> float:
        """Bytes of its result."""
        return sum(array.bytes for array in self.arrays)

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """An attribute that is a list of integers; empty if it is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def target(self) -> str | None:
        """What a custom call asks of the compiler."""
        found = re.search(r'\bcustom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else None

    @property
    def index(self) -> int:
        """Place of a parameter, or of the element taken from a tuple."""
        if self.opcode == "parameter":
            return int(self.inside)
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in the order of the text; one is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by place."""
        return {x.index: x for x in self if x.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program.

    Attributes:
        computations: by name.
        entry: the name of the entry computation.
        devices: how many run it.
    """

    computations: Mapping[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    >>> module = parse('''HloModule f, num_partitions=2
    ... ENTRY %main (a: f32[2]) -> f32[2] {
    ...   %a = f32[2]{0} parameter(0)
    ...   ROOT %b = f32[2]{0} negate(%a)
    ... }''')
    >>> module.entry, module.computations["main"].root, module.devices
    ('main', 'b', 2)
    """
    computations: dict[str, Computation] = {}
    entry, name, root = None, "", ""
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if inside is None:
            if not line.startswith(" ") and (head := _HEAD.match(line)):
                name, inside, root = head[2], {}, ""
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, inside, root)
            inside = None
        elif found := _NAME.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            inside[instruction.name] = instruction
            root = instruction.name if found[1] or not root else root
    if entry is None or entry not in computations:
        raise UserError(
            "expected the text of a compiled program, got one without ENTRY: give "
            "compiled.as_text()"
        )
    devices = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, rest: str) -> Instruction:
    """An instruction from the text after its name."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise UserError(f"expected an instruction of XLA, got {rest[:80]!r}")
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    return Instruction(
        name=name,
        opcode=opcode[1],
        arrays=tuple(_arrays(rest[:end])),
        operands=tuple(_OPERAND.findall(inside)),
        inside=inside,
        attributes=rest[close:],
    )


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at ``start``."""
    opening, closing = text[start], _BRACKETS[text[start]]
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == opening) - (text[place] == closing)
        if not depth:
            return place + 1
    raise UserError(f"expected {closing} in an instruction of XLA, got {text[:80]!r}")


def _arrays(text: str) -> Iterator[Array]:
    """The arrays of a type."""
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = (int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Array(dtype, tuple(sizes), int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    """Bits of one number; a token has none."""
    if dtype == "pred":
        return 8
    found = _BITS.match(dtype)
    return int(found[1]) if found else 0
