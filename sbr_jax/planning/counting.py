"""Counts products, memory and link traffic of a compiled program, loops included.

XLA's own ``cost_analysis`` counts the body of a loop once, however often it runs: for a
model whose layers are scanned it reports a thirtieth. So we walk through the program's
text and count each body as often as its loop runs. The text describes one device, so
all numbers are for one device.

- *FLOPs*: those of matrix products, 2 for a multiplication and addition. Elementwise
  work is left out, as in `sbr_jax.costs.forecast`.
- *Bytes*: what instructions read from main memory and write to it. Data inside a fusion
  or in a nearer memory is not counted; if an array is sliced or updated in place, only
  the slice counts.
- *Link bytes*: what a device receives over links, by kind and number of participating
  devices. For n devices with x bytes each: (n − 1) x for a gather, 2 (n − 1)/n x for a
  reduction, half as much for one that leaves each its share, x for a permutation.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable

from sbr_jax.planning.hlo import Array, Computation, Instruction, Module, parse
from sbr_jax.planning.products import flops
from sbr_jax.planning.trips import trips

Link = tuple[str, int]
"""A kind of communication, and the number of participating devices."""

_SHARES: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda x, n: (n - 1) * x,
    "all-reduce": lambda x, n: 2 * (n - 1) / n * x,
    "reduce-scatter": lambda x, n: (n - 1) / n * x,
    "all-to-all": lambda x, n: (n - 1) / n * x,
    "ragged-all-to-all": lambda x, n: (n - 1) / n * x,
    "collective-broadcast": lambda x, n: x,
    "collective-permute": lambda x, n: x,
}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier"}
_FREE |= {"copy-done", "async-done", "async-update", "send-done", "recv-done"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_PASSED = {"bitcast", "reshape"}


@dataclasses.dataclass(frozen=True)
class Counts:
    """The work of a program on one device.

    Attributes:
        flops: of matrix products.
        bytes: read from and written to main memory.
        links: bytes received over links.
        unknown: loops whose number of rounds depends on data: how often each is
            entered, by name.

    >>> two = Counts(1.0, 2.0, Counter({("all-reduce", 4): 3.0})) * 2
    >>> (two + Counts(1.0)).flops, two.link_bytes
    (3.0, 6.0)
    """

    flops: float = 0.0
    bytes: float = 0.0
    links: Counter[Link] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def link_bytes(self) -> float:
        """Bytes received over links, of all kinds."""
        return sum(self.links.values())

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.flops + other.flops,
            self.bytes + other.bytes,
            _sum(self.links, other.links),
            _sum(self.unknown, other.unknown),
        )

    def __mul__(self, times: float) -> "Counts":
        links = Counter({name: times * x for name, x in self.links.items()})
        unknown = Counter({name: times * x for name, x in self.unknown.items()})
        return Counts(times * self.flops, times * self.bytes, links, unknown)


def _sum(one: Counter, other: Counter) -> Counter:
    """Adds all entries, including zeros."""
    found = Counter(one)
    found.update(other)
    return found


def count(text: str, *, rounds: int = 1) -> Counts:
    """Counts the work of a compiled program.

    Args:
        text: from ``jax.stages.Compiled.as_text()``.
        rounds: the most rounds of a loop whose number of rounds depends on data, such
            as one that writes until a stop token.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    >>> thrice = lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ x, x)
    >>> count(jax.jit(thrice).lower(x).compile().as_text()).flops
    384.0
    """
    counter = _Counter(parse(text), rounds)
    return counter.executed(counter.module.entry)


class _Counter:
    """Walks through one program; each computation is counted once."""

    def __init__(self, module: Module, rounds: int):
        self.module, self.rounds = module, rounds
        self.begun = {
            _channel(computation.instructions[name]): computation.name
            for computation in module.computations.values()
            for instruction in computation
            if instruction.target == "AsyncCollectiveStart"
            for name in instruction.operands
        }
        self.executed = functools.cache(self._executed)
        self.fused = functools.cache(self._fused)

    def _executed(self, name: str) -> Counts:
        """Counts a computation whose instructions access memory."""
        computation, found = self.module.computations[name], Counts()
        for instruction in computation:
            found += self._one(computation, instruction)
        return found

    def _fused(self, name: str) -> Counts:
        """Counts a computation inside a fusion: products and links only."""
        computation, found = self.module.computations[name], Counts()
        for instruction in computation:
            found += self._products(computation, instruction)
        return found

    def _one(self, computation: Computation, instruction: Instruction) -> Counts:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(computation, instruction)
        if opcode == "conditional":
            return self._branches(instruction)
        called = instruction.called("calls") or instruction.called("to_apply")
        if called and opcode in ("call", "async-start"):
            return self.executed(called)
        if opcode in _FREE or opcode.endswith("-done"):
            return Counts()
        products = self._products(computation, instruction)
        return products + Counts(bytes=self._traffic(computation, instruction))

    def _products(self, computation: Computation, instruction: Instruction) -> Counts:
        if instruction.opcode == "fusion":
            return self.fused(str(instruction.called("calls")))
        operands = [computation.instructions[x] for x in instruction.operands]
        kind = instruction.opcode.removesuffix("-start")
        if kind in _SHARES:
            if self._continues(computation, instruction):
                return Counts()
            size = sum(operand.bytes for operand in operands)
            devices = _group(instruction, self.module.devices)
            moved = _SHARES[kind](size, devices) if devices > 1 else 0.0
            return Counts(links=Counter({(kind, devices): moved}))
        return Counts(flops=flops(instruction, operands))

    def _continues(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether a communication began in another computation.

        A TPU's compiler spreads a gather over the products that run meanwhile, and
        repeats its instruction in the fusion of each of them and in the last.
        """
        begun = self.begun.get(_channel(instruction))
        return begun is not None and begun != computation.name

    def _loop(self, computation: Computation, loop: Instruction) -> Counts:
        body, condition = (self.executed(str(loop.called(x))) for x in _LOOP)
        count = trips(self.module, computation, loop)
        if count is not None:
            return body * count + condition * (count + 1)
        once = (body + condition) * self.rounds
        return once + Counts(unknown=Counter({loop.name: 1}))

    def _branches(self, instruction: Instruction) -> Counts:
        """The branch with the most work."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        both = ("true_computation", "false_computation")
        names += [x for x in map(instruction.called, both) if x]
        found = [self.executed(name) for name in names]
        return max(found, key=lambda x: (x.flops, x.bytes), default=Counts())

    # --- memory -----------------------------------------------------------------------

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction reads from main memory and writes to it."""
        if instruction.target == "AllocateBuffer":
            return 0.0
        read = 0.0
        for place, name in enumerate(instruction.operands):
            operand = computation.instructions[name]
            if _main(operand.arrays):
                read += min(_main(operand.arrays), self._read(instruction, place))
        return read + self._written(computation, instruction)

    def _read(self, instruction: Instruction, place: int) -> float:
        """The most bytes that an instruction reads of an operand."""
        opcode = instruction.opcode
        if opcode in _SLICES and place == 0:
            return instruction.bytes
        if opcode == "dynamic-update-slice" and place == 0:
            return 0.0
        if opcode == "fusion":
            inner = self.module.computations[str(instruction.called("calls"))]
            return self._touched(inner, inner.parameters[place])
        return math.inf

    def _touched(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes of an instruction's result that its users read."""
        total = 0.0
        for user in computation.users.get(instruction.name, ()):
            for place, name in enumerate(user.operands):
                if name != instruction.name:
                    continue
                if user.opcode in _PASSED:
                    total += self._touched(computation, user)
                else:
                    total += self._read(user, place)
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction writes to main memory."""
        arrays = instruction.arrays
        if instruction.opcode in ("copy-start", "collective-permute-start"):
            # Such a type holds the operand and a flag beside the result.
            arrays = arrays[:1] if instruction.opcode == "copy-start" else arrays[1:2]
        if instruction.opcode == "all-gather-start":
            arrays = arrays[len(instruction.operands) :]
        results = self._results(computation, instruction)
        if len(results) != len(arrays):
            return _main(arrays)
        pairs = zip(arrays, results, strict=True)
        return sum(min(x.bytes, own) for x, own in pairs if not x.space)

    def _results(self, computation: Computation, instruction: Instruction) -> list:
        """New bytes in each array of a result; for an update, only the update's."""
        if instruction.opcode == "fusion":
            inner = self.module.computations[str(instruction.called("calls"))]
            return self._results(inner, inner.instructions[inner.root])
        operands = [computation.instructions[x] for x in instruction.operands]
        if instruction.opcode == "tuple":
            parts = (self._results(computation, operand) for operand in operands)
            return [size for part in parts for size in part]
        if instruction.opcode == "dynamic-update-slice":
            return [operands[1].bytes]
        if instruction.opcode in _PASSED:
            return self._results(computation, operands[0])
        return [array.bytes for array in instruction.arrays]


_LOOP = ("body", "condition")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{}]*\))? \{([^}]*)\}"
)


def _main(arrays: tuple[Array, ...]) -> float:
    """Bytes of the arrays that lie in main memory."""
    return sum(array.bytes for array in arrays if not array.space)


def _channel(instruction: Instruction) -> str:
    """The number of a communication in its program; the instruction's name if none."""
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else instruction.name


def _group(instruction: Instruction, devices: int) -> int:
    """How many devices take part in a communication.

    They are listed, or generated (``[groups,size]<=[...]``), or given as axes of a mesh
    (``mesh['a'=2,'b'=4] {'b'}``, perhaps with the order of its devices in between). No
    groups, or none named, means all devices.

    Raises:
        ValueError: for groups in another form: counted as all devices, they would
            multiply the bytes of a gather.
    """
    attributes = instruction.attributes
    if "source_target_pairs=" in attributes:
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(_MESH_GROUPS, attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r"replica_groups=(?!\{\})\S+", attributes):
        raise ValueError(f"expected replica groups in a known form, got {found[0]}")
    return devices
