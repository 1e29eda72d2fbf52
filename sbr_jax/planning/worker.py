"""Compiles one program for a slice, in a process of its own.

    python -m sbr_jax.planning.worker < request.json

A TPU compiler may crash, takes gigabytes and starts only once in a process. The request
comes in as JSON, and the result goes out as one line of JSON.
"""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from sbr_jax.planning.chips import Topology, parse_topology
from sbr_jax.planning.layouts import Layout

FULL = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
QUICK = {"exec_time_optimization_effort": -1.0}
"""Compiler options that skip planning of near memory: a few times faster."""
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def devices_of(topology: Topology) -> list[Any]:
    """The chips of a slice, described without being there."""
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    found = topologies.get_topology_desc(str(topology), "tpu", **options)
    return list(found.devices)


def compiled(request: Mapping[str, Any]) -> dict[str, Any]:
    """The compiler's result for one part of a job on a slice.

    Args:
        request: `case`, `layout`, `topology`, `part` and `quick`.

    Returns:
        Counts and bytes of one chip; or, if it does not fit, `full` and `room`, the
        bytes that it would take and those available.
    """
    import jax

    from sbr_jax.planning import aot
    from sbr_jax.planning.compiler import case_of

    # A described slice is not a backend, so code that asks for the backend gets "tpu".
    jax.default_backend = lambda: "tpu"
    topology = parse_topology(request["topology"])
    layout = Layout(**request["layout"])
    given = aot.shapes_of(case_of(request["case"]), layout, devices_of(topology))
    part = aot.PARTS[request["part"]](given)
    try:
        program = part.lowered.compile(QUICK if request["quick"] else None)
    except jax.errors.JaxRuntimeError as error:
        found = FULL.search(str(error))
        if found is None:
            raise
        used, room = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        full = used + sum(part.beside.values())
        return {"full": full, "room": room, "held": part.sizes}
    return described(part, program)


def described(part: Any, program: Any) -> dict[str, Any]:
    """Counts of a compiled program, and its memory by use, on one device.

    Args:
        part: an `aot.Lowered`.
        program: the program compiled from it.
    """
    from sbr_jax.costs.devices import planned_bytes
    from sbr_jax.planning.counting import count

    found = count(program.as_text(), rounds=part.rounds)
    return {
        "flops": found.flops,
        "bytes": found.bytes,
        "links": [[*link, size] for link, size in sorted(found.links.items())],
        "unknown": dict(found.unknown),
        "held": part.sizes,
        "peak": planned_bytes(program) + sum(part.beside.values()),
    }


def main() -> int:
    """Answers the request on standard input."""
    found = compiled(json.load(sys.stdin))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
