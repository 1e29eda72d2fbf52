"""`--dry-run`: checks everything, trains nothing and prints the cost.

The study of a chat model is built without weights; the small models of other studies
are loaded. Then `sbr_jax.costs.estimates` derives memory and hours from sizes.
`--device.memory-gb 24 --device.tflops 60 --device.gbps 600` names another device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sbr_jax.costs import estimates, forecast
from sbr_jax.costs.devices import DeviceOptions, make_device
from sbr_jax.costs.forecast import GIB, Device, Load
from sbr_jax.costs.rehearsal import rehearse
from sbr_jax.errors import counted
from sbr_jax.progress import duration
from sbr_jax.reporting.tables import Table
from sbr_jax.typing import UserError

CARDS = (24, 40, 80)
"""Memory sizes in GB to compare a peak with, if the device's is unknown."""

START = "start model, once"
"""Label of the line of measurements before all variants."""


def parts_table(job: Any, study: Any) -> Table:
    """Sizes and lengths of the sets that are learnt and held."""
    batch = job.config.training.batch_size
    steps = estimates.steps_of(job, study)
    sets = {f"train {name}": study.domains[name].train for name in job.domains}
    sets |= {
        "calibration": study.calibration,
        **{f"{n} control": x for n, x in study.calibration_controls.items()},
        "safety mix": study.safety_mix,
        "harmful": study.harmful,
    }
    rows = []
    for name, data in sets.items():
        if data is None:
            continue
        own = steps.get(name.removeprefix("train "))
        epochs = f"{own * batch / len(data):.1f}" if own else "–"
        numbers = (len(data), data.length, data.truncated, data.dropped)
        rows.append((name, *(f"{n:,}" for n in numbers), epochs))
    for name, (count, characters) in getattr(study, "asked", {}).items():
        tokens = estimates.tokens_of(characters)
        kind = name if name == "probe" else f"measured {name}"
        rows.append((kind, f"{count:,}", f"~{tokens}", "–", "–", "–"))
    head = ("part", "examples", "tokens", "answers cut", "too long", "epochs")
    return Table(head, tuple(rows))


def on_mesh(device: Device, mesh: str | None) -> Device:
    """The device, counted as often as the mesh has it, whatever its axes.

    Raises:
        UserError: if `device.count` says otherwise.
    """
    if mesh is None:
        return device
    if device.count not in (1, shards := estimates.shards(mesh)):
        raise UserError(
            f"--device.count {device.count}: expected {shards}, the devices of the "
            f"mesh {mesh}: leave one of the two out"
        )
    return dataclasses.replace(device, count=shards)


def memory_table(phases: Mapping[str, Mapping[str, float]]) -> Table:
    """GiB by part: a row for each phase, with its sum last."""
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    rows = [
        (
            name,
            *(f"{phase[p] / GIB:.2f}" if p in phase else "–" for p in parts),
            f"{sum(phase.values()) / GIB:.2f}",
        )
        for name, phase in phases.items()
    ]
    return Table(("GiB", *parts, "sum"), tuple(rows))


def time_table(job: Any, study: Any, load: Load, device: Device) -> Table:
    """Times of each variant with one seed, and of all variants and seeds.

    The start model is measured once for all of them and has a line of its own.
    """
    start = estimates.start_seconds(job, study, load, device)
    found = {
        variant: estimates.variant_seconds(job, study, load, device, variant)
        for variant in job.methods
    }
    parts = dict.fromkeys(part for x in (*found.values(), start) for part in x)
    lines = []
    for name, seconds in {START: start, **found}.items():
        if seconds:
            cells = (duration(seconds[p], 3) if p in seconds else "–" for p in parts)
            lines.append((name, *cells, duration(sum(seconds.values()), 3)))
    seeds, once = len(job.seeds), sum(start.values())
    total = sum(sum(seconds.values()) for seconds in found.values())
    whole = duration(total * seeds + once, 3)
    lines.append((f"all, {counted(seeds, 'seed')}", *("" for _ in parts), whole))
    return Table(("time", *parts, "one seed"), tuple(lines))


def to_text(table: Table) -> str:
    """Aligned columns, the first to the left.

    >>> print(to_text(Table(("a", "n"), (("row", "1"),))))
    a    n
    row  1
    """
    lines = (table.head, *table.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def execute(job: Any, device: DeviceOptions = DeviceOptions()) -> str:
    """Checks a job against its files and returns its cost.

    Raises:
        UserError: for anything that the run itself would refuse.
    """
    from sbr_jax.training import pipeline

    chosen = on_mesh(make_device(device), job.config.hardware.mesh)
    study = job.make_study(weights=False)
    pipeline.check(study, job.methods, job.seeds, job.domains, job.config)
    rehearse(job, study)
    load = estimates.load_of(job, study, chosen.memory)
    config, settings = load.config, job.config.training
    phases = estimates.memory(job, study, load)
    peak = max(sum(phase.values()) for phase in phases.values())
    billions = forecast.parameter_count(config) / 1e9
    size = forecast.weight_bytes(config, load.dtype, load.quantize) / 1e9
    trained = forecast.adapter_parameters(config, load.rank, load.targets) / 1e6
    lines = [
        f"{job.preset}: nothing was trained, no weights of a large model were read",
        "",
        f"model    {config.model_type}, {billions:.3g} B parameters, {size:.3g} GB in "
        f"{load.quantize or load.dtype}; context {config.context}; adapter "
        f"{trained:.3g} M, rank {load.rank}",
        f"steps    {settings.steps_per_domain} a domain of {load.batch} examples "
        f"({load.microbatch} at a time), domains {' → '.join(job.domains)}",
        f"leaks    {len(study.leak_check)} pairs of sets compared, 0 prompts shared",
        *_data_lines(study.notes.get("data", {})),
        "",
        to_text(parts_table(job, study)),
        "",
        "memory of one device, the least that must be alive at once",
        to_text(memory_table(phases)),
        _fit(peak, chosen.memory),
        "",
        f"time on {chosen.name}: {chosen.flops / 1e12:.3g} TFLOP/s, "
        f"{chosen.bandwidth / 1e9:.4g} GB/s, {chosen.count} of them"
        + (" with equal shares and free communication" if chosen.count > 1 else "")
        + "; without compilation",
        to_text(time_table(job, study, load, chosen)),
    ]
    return "\n".join(lines)


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    lines = []
    if "sources" in data:
        sources = {**data["sources"], "calibration": data["calibration"]}
        lines.append("data     " + ", ".join(f"{k}: {v}" for k, v in sources.items()))
    if data.get("left out"):
        found = ", ".join(f"{k}: {v}" for k, v in data["left out"].items())
        lines.append(f"left out for being in two sets (of the first)  {found}")
    return lines


def _fit(peak: float, limit: float | None) -> str:
    if limit is not None:
        word = "fits into" if peak < limit else "DOES NOT FIT into"
        return f"peak {peak / GIB:.1f} GiB: {word} {limit / GIB:.1f} GiB"
    fits = [f"{card} GB" for card in CARDS if peak < card * 1e9]
    shown = ", ".join(fits) or "none of 24, 40, 80 GB"
    return f"peak {peak / GIB:.1f} GiB: fits into {shown} (--device.memory-gb N)"
