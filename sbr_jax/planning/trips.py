"""Finds how often a loop of a compiled program runs, from its counters.

A scan counts an integer up to a constant. If XLA states the count, it is used;
otherwise condition and body are evaluated on their integers alone, iteration by
iteration. A loop that waits for data (a stop token, convergence) has no such count.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sbr_jax.planning.hlo import Computation, Instruction, Module

MOST = 100_000
"""Iterations after which a loop counts as endless."""

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DIRECTION = re.compile(r"direction=(\w+)")
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")
_SAME += ("optimization-barrier",)
_TWO = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARED = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


def trips(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Iterations of a ``while``; None if they depend on data."""
    if found := _KNOWN.search(loop.attributes):
        return int(found[1])
    names = loop.called("condition"), loop.called("body")
    condition, body = (module.computations[str(name)] for name in names)
    state = _value(module, caller, loop.operands[0], (), {})
    for count in range(MOST):
        going = _value(module, condition, condition.root, (state,), {})
        if going is None:
            return None
        if not going:
            return count
        state = _value(module, body, body.root, (state,), {})
    return None


def _value(
    module: Module,
    computation: Computation,
    name: str,
    given: Sequence[Any],
    known: dict[str, Any],
) -> Any:
    """An integer, a list of them for a tuple, or None for anything else."""
    if name not in known:
        instruction = computation.instructions[name]
        known[name] = _evaluated(module, computation, instruction, given, known)
    return known[name]


def _evaluated(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    given: Sequence[Any],
    known: dict[str, Any],
) -> Any:
    opcode = instruction.opcode
    # Only integers matter; a tuple may hold some, an array of several numbers none.
    if len(instruction.arrays) == 1 and instruction.arrays[0].size != 1:
        return None
    if opcode == "parameter":
        return given[instruction.index] if instruction.index < len(given) else None
    if opcode == "constant":
        return _constant(instruction.inside)
    values = [
        _value(module, computation, name, given, known) for name in instruction.operands
    ]
    if opcode == "tuple":
        return values
    if opcode == "get-tuple-element":
        return values[0][instruction.index] if isinstance(values[0], list) else None
    if opcode in _SAME:
        return values[0]
    if called := instruction.called("calls" if opcode == "fusion" else "to_apply"):
        if opcode not in ("fusion", "call"):
            return None
        inner = module.computations[called]
        return _value(module, inner, inner.root, values, {})
    if not values or any(not isinstance(value, int) for value in values):
        return None
    return _arithmetic(instruction, values)


def _arithmetic(instruction: Instruction, values: Sequence[int]) -> int | None:
    opcode = instruction.opcode
    if opcode == "compare":
        direction = _DIRECTION.search(instruction.attributes)
        return _COMPARED[direction[1]](*values) if direction else None
    if opcode == "select":
        return values[1] if values[0] else values[2]
    if opcode == "not":
        return not values[0]
    return _TWO[opcode](*values) if opcode in _TWO else None


def _constant(text: str) -> int | None:
    """An integer or a truth value; None for any other constant.

    >>> _constant("5"), _constant("false"), _constant("0.5")
    (5, False, None)
    """
    words: Mapping[str, bool] = {"true": True, "false": False}
    text = text.strip("{} ")
    if text in words:
        return words[text]
    return int(text) if re.fullmatch(r"-?\d+", text) else None
