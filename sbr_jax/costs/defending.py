"""Compares a defence's cost with plain training's, in lines to read beforehand."""

from typing import Any

from sbr_jax.costs import estimates, forecast
from sbr_jax.costs.devices import this_machine
from sbr_jax.methods import build
from sbr_jax.methods.base import Cost
from sbr_jax.progress import duration

PLAIN = "plain"
LEAST = 60.0
"""Seconds below which compiling and starting take longer than all that is counted."""


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
    start = sum(estimates.start_seconds(job, study, load, device).values())
    times = {}
    for name in dict.fromkeys((PLAIN, variant)):
        parts = estimates.variant_seconds(job, study, load, device, name)
        times[name] = {**parts, "start model": start}
    total = {name: sum(parts.values()) for name, parts in times.items()}
    if total[variant] < LEAST:
        return ["less than a minute, besides compiling the programs"]
    found = []
    if variant != PLAIN:
        cost = build(variant, job.config.methods).cost
        plain = forecast.step_flops(load, Cost())
        ratio = f"{forecast.step_flops(load, cost) / plain:.2g}"
        times_of = "" if ratio == "1" else f"{ratio} times "
        found += [f"a step of {variant} costs {times_of}as much as a plain one"]
    found.append(
        f"about {duration(total[variant])} in all"
        + (f", {duration(total[PLAIN])} without a defence" if variant != PLAIN else "")
        + f" ({device.flops / 1e9:.0f} GFLOP/s here; compiling not counted)"
    )
    own = times[variant].items()
    return found + [f"  {part} {duration(time)}" for part, time in own if time >= 1]
