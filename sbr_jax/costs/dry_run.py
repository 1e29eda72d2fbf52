"""`--dry-run`: everything is checked, nothing is trained, and the cost is printed.

A preset with a `survey` builds its study without weights; the small models of the
others are simply loaded. Then sizes decide memory and hours, by
`sbr_jax.costs.forecast`.
`--device.memory-gb 24 --device.tflops 60 --device.gbps 600` names another device.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sbr_jax.costs import forecast, forecast_judge
from sbr_jax.costs.devices import DeviceOptions, make_device
from sbr_jax.costs.forecast import GIB, Device, Job
from sbr_jax.costs.rehearsal import rehearse
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.methods import Method, build
from sbr_jax.methods.base import Cost
from sbr_jax.reporting.tables import Table
from sbr_jax.studies.options import ChatOptions
from sbr_jax.typing import UserError

CARDS = (24, 40, 80)
"""Memories, in GB, that a peak is compared with where the device's is not known."""

START = "start model, once"
"""The line of what is measured before any row."""
FRAME, PER_CHARACTER = 30, 0.25
"""Tokens of a template, and of a character, in a prompt that was not encoded."""


# --- what is known of a study ---------------------------------------------------------


def job_of(plan: Any, study: Any) -> Job:
    """What a step of this plan costs, from its settings and the longest domain."""
    import jax

    options, training = plan.study, plan.config.training
    dtype = getattr(options, "dtype", None)
    if dtype is None:
        dtype = str(jax.tree.leaves(study.model.params)[0].dtype)
    chat = isinstance(options, ChatOptions)
    return Job(
        config=study.model.config,
        dtype=dtype,
        quantize=getattr(options, "quantize", None),
        rank=training.lora_rank,
        targets=training.lora_targets,
        batch=training.batch_size,
        accumulation=plan.config.hardware.accumulation,
        length=max(study.domains[name].train.length for name in plan.domains),
        remat=plan.config.hardware.remat if chat else study.model.hardware.remat,
    )


def parts_table(plan: Any, study: Any) -> Table:
    """Sizes and lengths of what is learnt and held."""
    training = plan.config.training
    steps, batch = training.steps_per_domain, training.batch_size
    sets = {f"train {name}": study.domains[name].train for name in plan.domains}
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
        epochs = f"{steps * batch / len(data):.1f}" if name.startswith("train") else "–"
        numbers = (len(data), data.length, data.truncated, data.dropped)
        rows.append((name, *(f"{n:,}" for n in numbers), epochs))
    for name, (count, characters) in getattr(study, "asked", {}).items():
        tokens = round(FRAME + PER_CHARACTER * characters)
        kind = name if name == "probe" else f"measured {name}"
        rows.append((kind, f"{count:,}", f"~{tokens}", "–", "–", "–"))
    head = ("part", "examples", "tokens", "answers cut", "too long", "epochs")
    return Table(head, tuple(rows))


def method_of(plan: Any, variant: str) -> Method:
    """The method of a variant, with the plan's hyper-parameters."""
    return build(variant, plan.config.methods)


def memory(plan: Any, study: Any, job: Job) -> dict[str, dict[str, float]]:
    """Bytes by part of each phase, on one device."""
    options, training, hardware = plan.study, plan.config.training, plan.config.hardware
    config, shards = job.config, _shards(hardware.mesh)
    base = {"weights": forecast.weight_bytes(config, job.dtype, job.quantize) / shards}
    base |= forecast_judge.held_bytes(options, job)
    columns = max(method_of(plan, name).cost.columns for name in plan.methods)
    held = dict(base)
    if columns:
        held["subspace, twice"] = forecast.subspace_bytes(job, columns)
        held["reference adapter"] = forecast.adapter_bytes(job)
    if getattr(study, "unaligned", None) or getattr(options, "unaligned_folder", None):
        held["weights before alignment"] = (
            forecast.weight_bytes(config, job.dtype) / shards
        )
    step = forecast.training_memory(job)
    phases = {"training step": {**held, **{k: v / shards for k, v in step.items()}}}
    if columns:
        examples = training.fisher_examples or len(study.calibration)
        shorter = dataclasses.replace(job, length=study.calibration.length)
        phases["Fisher"] = held | forecast.fisher_memory(
            shorter,
            min(examples, len(study.calibration)),
            hardware.fisher_microbatch,
            training.fisher_buffer,
        )
    if hasattr(study, "asked"):
        rows, new = hardware.generation_batch, options.max_new_tokens
        longest = max(FRAME + PER_CHARACTER * c for _, c in study.asked.values())
        cache = forecast.cache_bytes(job, math.ceil(rows * (longest + new)))
        phases["answers"] = {**held, "keys and values": cache}
        scored = forecast.cache_bytes(job, hardware.score_tokens)
        phases["likelihoods"] = {**held, "keys and values": scored}
    return phases


def _shards(mesh: str | None) -> int:
    from sbr_jax.training.sharding import parse_mesh

    return 1 if mesh is None else math.prod(parse_mesh(mesh).values())


def on_mesh(device: Device, mesh: str | None) -> Device:
    """The device, as many times as the mesh has it, whatever its axes.

    Raises:
        UserError: for another `device.count`.
    """
    if mesh is None:
        return device
    if device.count not in (1, shards := _shards(mesh)):
        raise UserError(
            f"--device.count {device.count}: expected {shards}, the devices of the "
            f"mesh {mesh}: leave one of the two out"
        )
    return dataclasses.replace(device, count=shards)


def memory_table(phases: Mapping[str, Mapping[str, float]]) -> Table:
    """GiB by part, a row per phase, its sum last."""
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


# --- time -----------------------------------------------------------------------------


def start_seconds(plan: Any, study: Any, job: Job, device: Device) -> dict[str, float]:
    """Of the aligned model, measured once before all rows: everything and the probe.

    Nothing where the study does not say what is asked.
    """
    found: dict[str, float] = {}
    for name in getattr(study, "asked", ()):
        part = "monitor" if name == "probe" else "measuring"
        seconds = _asked_seconds(plan, study, job, device, name)
        found[part] = found.get(part, 0.0) + seconds
    return found


def _asked_seconds(plan: Any, study: Any, job: Job, device: Device, name: str) -> float:
    count, characters = study.asked[name]
    tokens = round(FRAME + PER_CHARACTER * characters)
    benchmark = BENCHMARKS.get(name)
    if benchmark and benchmark.scores_only:
        flops = count * forecast.forward_flops(job, tokens, heads=8)
        return flops / (device.flops * device.count)
    options = plan.study
    new = options.max_new_tokens
    if benchmark and benchmark.answer_tokens:
        new = benchmark.answer_tokens * benchmark.turns
    rows = plan.config.hardware.generation_batch
    seconds = forecast.generation_seconds(job, device, count, tokens, new, rows)
    if name == "probe" or "judge" in study.notes["measurements"][name]:
        exchange = count, tokens + new
        seconds += forecast_judge.judging_seconds(options, job, device, *exchange)
    return seconds


def fisher_flops(plan: Any, study: Any, job: Job, row: str) -> float:
    """Of every example that a row differentiates on its own, with one seed."""
    settings, method = plan.config.training, method_of(plan, row)
    domains = [study.domains[name].train for name in plan.domains]
    size = len(domains), settings.steps_per_domain
    sets = [study.calibration] * forecast.calibration_fishers(method, *size)
    sets += domains * method.cost.own_fishers
    most = method.cost.fisher_examples or settings.fisher_examples or math.inf
    each = (min(len(x), most) * forecast.train_flops(job, x.length) for x in sets)
    return sum(each)


def row_seconds(
    plan: Any, study: Any, job: Job, device: Device, row: str
) -> dict[str, float]:
    """Of one row with one seed: training, Fisher, measurements, monitor, repairs."""
    settings, domains = plan.config.training, len(plan.domains)
    speed = device.flops * device.count
    method = method_of(plan, row)
    steps = domains * settings.steps_per_domain
    plain = forecast.step_flops(job, Cost())
    flops = steps * forecast.step_flops(job, method.cost)
    flops += forecast.stage_flops(job, method.cost, settings.steps_per_domain)
    found = {"training": flops / speed}
    if fisher := fisher_flops(plan, study, job, row):
        found["Fisher"] = fisher / speed
    found |= forecast_judge.rating_seconds(
        plan, study, job, device, method.cost.ratings
    )
    # A row is measured as the start model is; only some rows have a monitor.
    for part, seconds in start_seconds(plan, study, job, device).items():
        if part == "measuring" or method.monitored:
            found[part] = domains * seconds
    if method.monitored and study.probe is not None:
        repairs = domains * settings.repair_blocks * settings.repair_steps
        found["repairs, at most"] = repairs * 2 * plain / speed
    return found


def time_table(plan: Any, study: Any, job: Job, device: Device) -> Table:
    """Hours of each row with one seed, and of all rows and seeds.

    The start model, which is measured once for all of them, has a line of its own.
    """
    rows = {row: row_seconds(plan, study, job, device, row) for row in plan.methods}
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    start, seeds = start_seconds(plan, study, job, device), len(plan.seeds)
    parts += [part for part in start if part not in parts]
    lines = []
    for row, found in {START: start, **rows}.items():
        if not found:
            continue
        cells = (f"{found[p] / 3600:.3g}" if p in found else "–" for p in parts)
        lines.append((row, *cells, f"{sum(found.values()) / 3600:.3g}"))
    total = sum(sum(found.values()) for found in rows.values())
    whole = f"{(total * seeds + sum(start.values())) / 3600:.3g}"
    lines.append((f"all, {seeds} seeds", *("" for _ in parts), whole))
    return Table(("hours", *parts, "one seed"), tuple(lines))


# --- what is printed ------------------------------------------------------------------


def to_text(table: Table) -> str:
    """Columns in line, the first to the left.

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


def execute(plan: Any, device: DeviceOptions = DeviceOptions()) -> str:
    """Check a plan against its files and return what it will cost.

    Raises:
        UserError: for what the run itself would refuse.
    """
    from sbr_jax.training import pipeline

    chosen = on_mesh(make_device(device), plan.config.hardware.mesh)
    study = plan.make_study(weights=False)
    pipeline.check(study, plan.methods, plan.seeds, plan.domains, plan.config)
    rehearse(plan, study)
    job = job_of(plan, study)
    config, settings = job.config, plan.config.training
    phases = memory(plan, study, job)
    peak = max(sum(phase.values()) for phase in phases.values())
    billions = forecast.parameter_count(config) / 1e9
    size = forecast.weight_bytes(config, job.dtype, job.quantize) / 1e9
    trained = forecast.adapter_parameters(config, job.rank, job.targets) / 1e6
    lines = [
        f"{plan.preset}: nothing was trained, no weights of a large model were read",
        "",
        f"model    {config.model_type}, {billions:.3g} B parameters, {size:.3g} GB in "
        f"{job.quantize or job.dtype}; context {config.context}; adapter {trained:.3g} "
        f"M, rank {job.rank}",
        f"steps    {settings.steps_per_domain} a domain of {job.batch} examples "
        f"({job.microbatch} at a time), domains {' → '.join(plan.domains)}",
        f"leaks    {len(study.leak_check)} pairs of sets compared, 0 prompts shared",
        *_data_lines(study.notes.get("data", {})),
        "",
        to_text(parts_table(plan, study)),
        "",
        "memory of one device, the least that must be alive at once",
        to_text(memory_table(phases)),
        _fit(peak, chosen.memory),
        "",
        f"time on {chosen.name}: {chosen.flops / 1e12:.3g} TFLOP/s, "
        f"{chosen.bandwidth / 1e9:.4g} GB/s, {chosen.count} of them"
        + (" with equal shares and free communication" if chosen.count > 1 else "")
        + "; without compilation",
        to_text(time_table(plan, study, job, chosen)),
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
