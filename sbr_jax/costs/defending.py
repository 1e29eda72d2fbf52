"""Compares a defence's cost with plain training's, in lines to read beforehand."""

from typing import Any

from sbr_jax.costs import estimates, forecast
from sbr_jax.costs.devices import this_machine
from sbr_jax.methods import build
from sbr_jax.methods.base import Cost
from sbr_jax.progress import duration

PLAIN = "plain"


def lines(job: Any, study: Any) -> list[str]:
    """The cost of a step relative to plain training's, and an estimate of all time.

    Args:
        job: with `config`, `domains`, `methods` (one), `seeds` and `study`.
        study: the study that the job runs.

    Returns:
        Lines without line ends.
    """
    load = estimates.load_of(job, study)
    device = this_machine(load.dtype)
    (variant,) = job.methods
    method = build(variant, job.config.methods)
    step = forecast.step_flops(load, method.cost) / forecast.step_flops(load, Cost())
    found = []
    if variant != PLAIN:
        found += [f"a step of {variant} is {step:.2g} times one of plain training"]
    start = estimates.start_seconds(job, study, load, device)
    times = {}
    for name in dict.fromkeys((PLAIN, variant)):
        parts = estimates.variant_seconds(job, study, load, device, name)
        times[name] = {**parts, "start model": sum(start.values())}
    shown = {name: duration(sum(parts.values())) for name, parts in times.items()}
    found.append(
        f"about {shown[variant]} in all"
        + (f", {shown[PLAIN]} of it without a defence" if variant != PLAIN else "")
        + f" ({device.flops / 1e9:.0f} GFLOP/s here; compiling not counted)"
    )
    own = times[variant]
    found += [f"  {part} {duration(seconds)}" for part, seconds in own.items()]
    return found
