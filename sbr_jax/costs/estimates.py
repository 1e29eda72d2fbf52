"""Memory and time of a job, from its settings and its study's sizes.

A job is a `programs.job.Job`, or an object with its attributes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sbr_jax.costs import forecast, forecast_judge
from sbr_jax.costs.forecast import Device, Load
from sbr_jax.data.layout import choose, used_lengths
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.methods import Method, build
from sbr_jax.methods.base import Cost
from sbr_jax.settings import Hardware
from sbr_jax.subspace import sketch
from sbr_jax.training.recompute import is_recomputed

FRAME, PER_CHARACTER = 30, 0.25
"""Tokens of a template, and tokens a character, for prompts that are not encoded."""


def tokens_of(characters: float) -> int:
    """Tokens of a prompt with that many characters."""
    return round(FRAME + PER_CHARACTER * characters)


def load_of(job: Any, study: Any, memory: float | None = None) -> Load:
    """The cost of a step of this job, from its settings and the longest domain.

    Args:
        job: the job to forecast.
        study: the study that it runs.
        memory: bytes of the device; None for this machine's.
    """
    import jax

    options, training = job.study, job.config.training
    dtype = getattr(options, "dtype", None)
    if dtype is None:
        dtype = str(jax.tree.leaves(study.model.params)[0].dtype)
    hardware = job.config.hardware
    tokens, answers, keys = _mean_sizes(
        [study.domains[name].train for name in job.domains],
        training.batch_size,
        hardware,
    )
    return Load(
        config=study.model.config,
        dtype=dtype,
        quantize=getattr(options, "quantize", None),
        rank=training.lora_rank,
        targets=training.lora_targets,
        batch=training.batch_size,
        accumulation=hardware.accumulation,
        length=max(study.domains[name].train.length for name in job.domains),
        remat=is_recomputed(study, training, hardware, memory),
        tokens=tokens,
        answers=answers,
        keys=keys,
    )


def _mean_sizes(
    sets: Sequence[Any], batch: int, hardware: Hardware
) -> tuple[float, float, float | None]:
    """Tokens and answer places computed for an example, averaged over all domains.

    Also what attention computes for a token; None unless all domains are packed.
    """
    each, keys = [], []
    for data in sets:
        layout = choose(
            data, batch, packing=hardware.packing, parts=hardware.accumulation
        )
        if layout.packed:
            part = batch // hardware.accumulation
            text = part * float(used_lengths(data).mean())
            width = math.ceil(text / layout.unit) * layout.unit
            each.append((width / part, layout.places / part))
            keys.append(layout.reach * layout.tile)
        else:
            each.append((layout.length, layout.places))
    tokens, answers = zip(*each, strict=True)
    mean = sum(keys) / len(each) if len(keys) == len(each) else None
    return sum(tokens) / len(each), sum(answers) / len(each), mean


def steps_of(job: Any, study: Any) -> dict[str, int]:
    """Optimizer steps of each domain."""
    usual = job.config.training.steps_per_domain
    return {name: study.domains[name].steps or usual for name in job.domains}


def shards(mesh: str | None) -> int:
    """Devices of a mesh.

    >>> shards("fsdp=4,tp=2"), shards(None)
    (8, 1)
    """
    from sbr_jax.training.sharding import parse_mesh

    return 1 if mesh is None else math.prod(parse_mesh(mesh).values())


def memory(job: Any, study: Any, load: Load) -> dict[str, dict[str, float]]:
    """Bytes by part of each phase, on one device."""
    options, training, hardware = job.study, job.config.training, job.config.hardware
    config, parts = load.config, shards(hardware.mesh)
    base = {"weights": forecast.weight_bytes(config, load.dtype, load.quantize) / parts}
    base |= forecast_judge.held_bytes(options, load)
    columns = max(build(v, job.config.methods).cost.columns for v in job.methods)
    held = dict(base)
    if columns:
        held["subspace, twice"] = forecast.subspace_bytes(load, columns)
    if getattr(study, "unaligned", None) or getattr(options, "unaligned_folder", None):
        held["weights before alignment"] = (
            forecast.weight_bytes(config, load.dtype) / parts
        )
    step = forecast.training_memory(load)
    phases = {"training step": {**held, **{k: v / parts for k, v in step.items()}}}
    if columns:
        examples = training.fisher_examples or len(study.calibration)
        length = int(used_lengths(study.calibration).max())
        shorter = dataclasses.replace(
            load, length=length, tokens=None, answers=None, keys=None
        )
        count = forecast.adapter_parameters(config, load.rank, load.targets)
        sizes = sketch.plan(
            count,
            columns,
            hardware.fisher_microbatch,
            training.fisher_buffer,
            training.memory_bytes,
        )
        examples = min(examples, len(study.calibration))
        phases["Fisher"] = held | forecast.fisher_memory(
            shorter, examples, columns, sizes
        )
    if hasattr(study, "asked"):
        rows, new = hardware.generation_batch, options.max_new_tokens
        longest = FRAME + PER_CHARACTER * max(c for _, c in study.asked.values())
        cache = forecast.cache_bytes(load, math.ceil(rows * (longest + new)))
        phases["answers"] = {**held, "keys and values": cache}
        scored = forecast.cache_bytes(load, hardware.score_tokens)
        phases["likelihoods"] = {**held, "keys and values": scored}
    return phases


def start_seconds(job: Any, study: Any, load: Load, device: Device) -> dict[str, float]:
    """Seconds to measure the aligned model once, by part: everything, and the probe.

    Empty if the study does not say how much is asked.
    """
    found: dict[str, float] = {}
    for name in getattr(study, "asked", ()):
        part = "monitor" if name == "probe" else "measuring"
        seconds = _asked_seconds(job, study, load, device, name)
        found[part] = found.get(part, 0.0) + seconds
    return found


def _asked_seconds(
    job: Any, study: Any, load: Load, device: Device, name: str
) -> float:
    count, characters = study.asked[name]
    tokens = tokens_of(characters)
    benchmark = BENCHMARKS.get(name)
    if benchmark and benchmark.scores_only:
        flops = count * forecast.forward_flops(load, tokens, heads=8)
        return flops / (device.flops * device.count)
    options = job.study
    new = options.max_new_tokens
    if benchmark and benchmark.answer_tokens:
        new = benchmark.answer_tokens * benchmark.turns
    rows = job.config.hardware.generation_batch
    seconds = forecast.generation_seconds(load, device, count, tokens, new, rows)
    if name == "probe" or "judge" in study.notes["measurements"][name]:
        exchange = count, tokens + new
        seconds += forecast_judge.judging_seconds(options, load, device, *exchange)
    return seconds


def fisher_flops(job: Any, study: Any, load: Load, method: Method) -> float:
    """FLOPs of all examples that a method differentiates singly, with one seed."""
    training, cost = job.config.training, method.cost
    domains = [study.domains[name].train for name in job.domains]
    size = len(domains), training.steps_per_domain
    sets = [study.calibration] * forecast.calibration_fishers(method, *size)
    sets += domains * cost.own_fishers
    most = cost.fisher_examples or training.fisher_examples or math.inf
    return sum(min(len(x), most) * _example_flops(load, x) for x in sets)


def _example_flops(load: Load, data: Any) -> float:
    """FLOPs of the gradient of one example of a set's mean length."""
    answers = float((data.mask[:, 1:] > 0).sum(axis=1).mean())
    return forecast.train_flops(load, float(used_lengths(data).mean()), heads=answers)


def variant_seconds(
    job: Any, study: Any, load: Load, device: Device, variant: str
) -> dict[str, float]:
    """Seconds of a variant by part, with one seed."""
    training, domains = job.config.training, len(job.domains)
    speed = device.flops * device.count
    method = build(variant, job.config.methods)
    steps = sum(steps_of(job, study).values())
    flops = steps * forecast.step_flops(load, method.cost)
    flops += forecast.stage_flops(load, method.cost, training.steps_per_domain)
    found = {"training": flops / speed}
    if fisher := fisher_flops(job, study, load, method):
        found["Fisher"] = fisher / speed
    ratings = method.cost.ratings
    found |= forecast_judge.rating_seconds(job, study, load, device, ratings)
    # A variant is measured like the start model; only some have a monitor.
    for part, seconds in start_seconds(job, study, load, device).items():
        if part == "measuring" or method.monitored:
            found[part] = domains * seconds
    if method.monitored and study.probe is not None:
        repairs = domains * training.repair_blocks * training.repair_steps
        plain = forecast.step_flops(load, Cost())
        found["repairs, at most"] = repairs * 2 * plain / speed
    return found
