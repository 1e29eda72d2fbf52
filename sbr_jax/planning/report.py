"""The plan as text: memory, work, hours, and what to change."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sbr_jax.costs import forecast
from sbr_jax.costs.dry_run import to_text
from sbr_jax.methods import build
from sbr_jax.methods.base import Cost
from sbr_jax.planning.case import Case
from sbr_jax.planning.chips import GIB, REACHED, Topology
from sbr_jax.planning.compiler import Found
from sbr_jax.planning.job import Job, hours
from sbr_jax.planning.layouts import Layout, smallest
from sbr_jax.planning.rooflines import LIMITS, Seconds, seconds
from sbr_jax.reporting.tables import Table

MOST_KINDS = 4
"""Kinds of communication that are listed separately."""
WORKING = "activations"
"""Label of memory that is not an argument of a program."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """The results of one method on one layout.

    Attributes:
        case: the job with this method.
        found: results by part; a part that failed is missing.
        failed: the compiler's message for each part that failed.
    """

    case: Case
    found: Mapping[str, Found]
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Bytes of the method's state, which stays on a chip whatever runs."""
        held = self.found["step"].held if "step" in self.found else {}
        # The step holds the basis twice, in the state and in the optimizer.
        return held.get("method", 0.0) + held.get("basis", 0.0) / 2

    def peak(self, part: str) -> float:
        """Most bytes of a chip while a part runs."""
        found = self.found[part]
        return found.peak + (0.0 if part == "step" else self.kept)

    @property
    def worst(self) -> str | None:
        """The part that needs the most memory; None if nothing was compiled."""
        return max(self.found, key=self.peak, default=None)

    @property
    def full(self) -> bool:
        """Whether a part was refused for lack of memory."""
        return any(found.room is not None for found in self.found.values())


def limits(found: Found, topology: Topology) -> Seconds:
    """The three limits of a compiled part."""
    return seconds(found.flops, found.bytes, found.link_bytes, topology)


def fits(planned: Planned, topology: Topology) -> bool:
    """Whether every compiled part has room on a chip."""
    room = topology.chip.memory
    return not planned.full and all(planned.peak(p) <= room for p in planned.found)


# --- tables ---------------------------------------------------------------------------


def memory_table(plans: Sequence[Planned], topology: Topology) -> Table:
    """GiB of a chip by content, a row for each method and part."""
    shown = [
        (_name(plans, planned, part), planned, part)
        for planned in plans
        for part in planned.found
    ]
    columns = list(
        dict.fromkeys(
            name
            for _, planned, part in shown
            for name, size in planned.found[part].held.items()
            if size >= GIB / 200
        )
    )
    rows = []
    for name, planned, part in shown:
        found, kept = planned.found[part], planned.peak(part) - planned.found[part].peak
        cells = [_gib(found.held.get(column, 0.0)) for column in columns]
        sum_ = planned.peak(part)
        word = "fits" if sum_ <= topology.chip.memory else "TOO MUCH"
        others = _gib(kept)
        rows.append((name, *cells, others, _gib(found.working), _gib(sum_), word))
    room = f"of {topology.chip.memory / GIB:.2f}"
    head = ("GiB of a chip", *columns, "state kept", WORKING, "sum", room)
    return Table(head, tuple(rows))


def work_table(plans: Sequence[Planned], topology: Topology) -> Table:
    """The work of one call of each part, and the least time by each limit."""
    plain = next((p for p in plans if p.case.method == "plain"), None)
    rows = []
    for planned in plans:
        for part, found in planned.found.items():
            if found.room is not None:
                continue
            own = limits(found, topology)
            over = _over_plain(planned, plain, topology) if part == "step" else "–"
            rows.append(
                (
                    _name(plans, planned, part),
                    f"{found.flops / 1e12:.2f}",
                    f"{found.bytes / 1e9:.1f}",
                    f"{found.link_bytes / 1e9:.1f}",
                    *(f"{1e3 * getattr(own, name):.0f}" for name in LIMITS),
                    own.bound,
                    f"{1e3 * own.expected:.0f}",
                    over,
                )
            )
    head = ("one call, one chip", "TFLOP", "memory GB", "link GB")
    head += (*(f"{name} ms" for name in LIMITS), "bound by", "expected ms", "× plain")
    return Table(head, tuple(rows))


def _over_plain(planned: Planned, plain: Planned | None, topology: Topology) -> str:
    """The ratio of a step to plain training's; from sizes if plain was not compiled."""
    if plain is None or "step" not in plain.found:
        load, method = planned.case.load, build(planned.case.method)
        ratio = forecast.step_flops(load, method.cost)
        return f"~{ratio / forecast.step_flops(load, Cost()):.2f}"
    own, least = (limits(x.found["step"], topology) for x in (planned, plain))
    return f"{own.expected / least.expected:.2f}"


def link_lines(plans: Sequence[Planned]) -> list[str]:
    """What a chip receives in a step, the largest kinds first."""
    lines = []
    for planned in plans:
        step = planned.found.get("step")
        if step is None or not step.link_bytes:
            continue
        links = sorted(step.links, key=lambda link: -link[2])[:MOST_KINDS]
        shown = ", ".join(f"{kind} of {n} {x / 1e9:.1f}" for kind, n, x in links)
        lines.append(f"{_name(plans, planned, 'step')}, link GB: {shown}")
    return lines


def hours_table(plans: Sequence[Planned], topology: Topology, job: Job) -> Table:
    """Hours of the whole job by part, and chip-hours."""
    found = {
        planned.case.method: hours(
            job,
            planned.case,
            {
                part: limits(x, topology).expected
                for part, x in planned.found.items()
                if x.room is None
            },
        )
        for planned in plans
    }
    parts = list(dict.fromkeys(part for own in found.values() for part in own))
    totals = {name: sum(x or 0.0 for x in own.values()) for name, own in found.items()}
    least = totals.get("plain")
    rows = []
    for name, own in found.items():
        cells = [_hours(own[part]) if part in own else "–" for part in parts]
        over = f"{totals[name] / least:.2f}" if least else "–"
        chip = f"{totals[name] * topology.chips:.4g}"
        rows.append((name, *cells, f"{totals[name]:.3g}", chip, over))
    head = ("hours", *parts, "all", "chip-hours", "× plain")
    return Table(head, tuple(rows))


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 200 else "–"


def _name(plans: Sequence[Planned], planned: Planned, part: str) -> str:
    """The name of a row: with a single method, only the part."""
    return part if len(plans) == 1 else f"{planned.case.method}: {part}"


# --- advice ---------------------------------------------------------------------------


def advice(planned: Planned, topology: Topology, layout: Layout) -> list[str]:
    """What to change, as lines; empty if the job fits and products bind it."""
    lines = []
    part = planned.worst
    if part is not None:
        found = smallest(topology.kind, planned.peak(part), planned.case.load, layout)
        lines.append(_smallest_line(planned, topology, found))
        if not fits(planned, topology):
            lines.append(f"to fit: {_remedy(planned, part)}")
    step = planned.found.get("step")
    if step is not None and step.room is None:
        lines += _small_batch(planned.case, limits(step, topology), topology, layout)
    return lines


def _smallest_line(planned: Planned, topology: Topology, found: Topology | None) -> str:
    method = planned.case.method
    if found is None:
        return f"{method}: no slice of {topology.kind} that is listed has room for it"
    if found.chips == topology.chips and fits(planned, topology):
        return f"{method}: {topology} is the smallest slice that fits, by arithmetic"
    return (
        f"{method}: the smallest slice that fits is {found}, by arithmetic; compile "
        f"it to be sure: --topology {found}"
    )


def _remedy(planned: Planned, part: str) -> str:
    """What would shrink the largest item in memory."""
    found = planned.found[part]
    sizes = {**found.held, WORKING: found.working, "method": planned.kept}
    largest = max(sizes, key=lambda name: sizes[name])
    return {
        "weights": "more chips over fsdp or tp, or a quantised base",
        "adapter, moments": "a lower --rank",
        "basis": "more chips, or fewer columns (max_rank)",
        "method": "fewer or shorter calibration examples (--calibration, --answers)",
        "rows": "more chips, or a Fisher buffer of fewer rows",
        "cache": "fewer answers at once (--rows)",
        WORKING: "more microbatches (--accumulation), a shorter --length, or more rows "
        "of the mesh (data, fsdp)",
    }.get(largest, "more chips")


def _small_batch(
    case: Case, own: Seconds, topology: Topology, layout: Layout
) -> list[str]:
    """If links bind the step: the batch or slice that would avoid it."""
    ratio = own.links / REACHED["links"] / (own.products / REACHED["products"] or 1.0)
    if own.bound != "links":
        return []
    ratio = round(ratio, 2)
    batch = case.training.batch_size
    enough = 2 ** math.ceil(math.log2(batch * ratio))
    fewer = 2 ** math.floor(math.log2(topology.chips / ratio))
    return [
        f"{case.method}: bound by links: {batch} examples on {topology.chips} chips "
        f"leave each too little to compute ({ratio:.1f} × longer on links than at "
        f"products): --batch {enough}, a slice of {max(fewer, 1)} chips, or another "
        f"--mesh than {layout}"
    ]


# --- the whole ------------------------------------------------------------------------


def text(
    plans: Sequence[Planned],
    topology: Topology,
    layout: Layout,
    job: Job,
    tried: Sequence[str] = (),
) -> str:
    """The plan of some methods on one layout."""
    case = plans[0].case
    load = case.load
    billions = forecast.parameter_count(load.config) / 1e9
    size = forecast.weight_bytes(load.config, load.dtype) / 1e9
    accumulated = f", {load.accumulation} microbatches" * (load.accumulation > 1)
    verdict = "fits" if all(fits(p, topology) for p in plans) else "DOES NOT FIT"
    shares = ", ".join(f"{100 * share:.0f} % of {n}" for n, share in REACHED.items())
    blocks = [
        f"{case.model} on {topology}: {verdict}\n"
        f"model    {load.config.model_type}, {billions:.3g} B parameters, {size:.3g} "
        f"GB in {load.dtype}; adapter of rank {load.rank} on {load.targets}\n"
        f"slice    {topology.chips} chips, mesh {layout}\n"
        f"step     {load.batch} examples of {load.length} tokens{accumulated}\n"
        "compiled ahead of time for a slice that is not there; nothing ran",
        "\n".join(tried),
        to_text(memory_table(plans, topology)),
        "\n".join(
            f"{p.case.method}, {part}: {said}"
            for p in plans
            for part, said in p.failed.items()
        ),
        to_text(work_table(plans, topology)),
        "\n".join(link_lines(plans)),
        f"job      {job.domains} domains of {job.examples:,} examples, {job.epochs:g} "
        f"epochs; {job.prompts:,} prompts answered at the start and after each domain; "
        f"{job.seeds} seed{'s' * (job.seeds > 1)}\n"
        f"         the longest of the three limits, at {shares} of a chip's figures\n"
        + to_text(hours_table(plans, topology, job)),
        "\n".join(line for p in plans for line in advice(p, topology, layout)),
        _unknown(plans),
    ]
    return "\n\n".join(block for block in blocks if block)


def _unknown(plans: Sequence[Planned]) -> str:
    """A note about loops whose number of rounds depends on data."""
    parts = {part: x for p in plans for part, x in p.found.items() if x.unknown}
    if not parts:
        return ""
    return (
        f"loops that end when data say so ({', '.join(parts)}) are counted to their "
        "longest"
    )
