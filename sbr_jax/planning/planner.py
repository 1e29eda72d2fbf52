"""Plans a job: tries layouts, compiles methods and puts the report together."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from sbr_jax.methods import build
from sbr_jax.planning import report
from sbr_jax.planning.case import Case
from sbr_jax.planning.chips import GIB, Topology
from sbr_jax.planning.compiler import (
    CompilerError,
    Found,
    compile_part,
    require_compiler,
)
from sbr_jax.planning.job import Job
from sbr_jax.planning.layouts import Layout, check_layout, layouts
from sbr_jax.planning.report import Planned
from sbr_jax.typing import UserError

QUICKLY = "compiled quickly: memory, and what is read of it, are upper bounds"
ALIKE = ("read", "write")
"""Parts that are the same for every method."""

Compile = Callable[[Case, Layout, Topology, str], Found]
"""``(case, layout, topology, part) -> found``."""


def plan(
    case: Case,
    methods: Sequence[str],
    topology: Topology,
    layout: Layout | None,
    job: Job,
    *,
    tries: int = 3,
    quick: bool = False,
    say: Callable[[str], None] = lambda line: None,
    compiled: Compile | None = None,
) -> str:
    """Compiles a job's programs for a slice and reports their needs.

    Without a layout, a few are compiled and the best is taken. Each is compiled in its
    own process, unless ``compiled`` replaces that.

    Raises:
        UserError: if the slice, the model or a method refuses, there is no compiler, or
            no layout could be compiled.
    """
    if layout is not None:
        check_layout(layout, topology, case.load)
    candidates = [layout] if layout else layouts(topology, case.load)[:tries]
    if compiled is None:
        require_compiler()
        compiled = functools.partial(compile_part, quick=quick)
    first = dataclasses.replace(case, method=methods[0])
    found: dict[Layout, Found] = {}
    tried = []
    for candidate in candidates:
        say(f"compiling {methods[0]}, step, for {topology}, mesh {candidate}")
        try:
            found[candidate] = compiled(first, candidate, topology, "step")
        except CompilerError as error:
            tried.append(f"mesh {candidate}: {error}")
        else:
            tried.append(f"mesh {candidate}: {_line(found[candidate], topology)}")
    if not found:
        raise UserError(f"no layout could be compiled: {'; '.join(tried)}")
    best = min(found, key=lambda x: _rank(found[x], topology))
    plans = [
        _planned(dataclasses.replace(case, method=x), best, topology, say, compiled)
        for x in methods
    ]
    heading = [f"layouts  {line}" for line in tried] if len(tried) > 1 else []
    heading += [QUICKLY] * quick
    return report.text(plans, topology, best, job, heading)


def _rank(found: Found, topology: Topology) -> tuple[bool, float]:
    """Layouts that fit first, then the fastest."""
    full = found.room is not None or found.peak > topology.chip.memory
    return full, found.peak if full else report.limits(found, topology).expected


def _line(found: Found, topology: Topology) -> str:
    """Describes one layout in one line."""
    peak, room = found.peak / GIB, topology.chip.memory / GIB
    if found.room is not None:
        return f"does not fit: {peak:.1f} of {room:.2f} GiB"
    own = report.limits(found, topology)
    return (
        f"{1e3 * own.expected:.0f} ms a step, bound by {own.bound}; {peak:.1f} of "
        f"{room:.2f} GiB"
    )


def _planned(
    case: Case,
    layout: Layout,
    topology: Topology,
    say: Callable[[str], None],
    compiled: Compile,
) -> Planned:
    """All parts of one method on a layout; parts alike for all methods are shared."""
    found, failed = {}, {}
    for part in parts_of(case):
        shared = dataclasses.replace(case, method="plain") if part in ALIKE else case
        say(f"compiling {case.method}, {part}")
        try:
            found[part] = compiled(shared, layout, topology, part)
        except CompilerError as error:
            failed[part] = str(error)
    return Planned(case, found, failed)


def parts_of(case: Case) -> tuple[str, ...]:
    """Names of the parts of a job."""
    columns = build(case.method, case.config().methods).cost.columns
    fisher = ("Fisher gradients", "Fisher basis") if columns else ()
    return ("step", *fisher, *ALIKE)
