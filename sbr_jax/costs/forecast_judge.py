"""What a guard model costs that judges answers or rates training pairs.

It is read dense, whole and on one device, whatever the model that is trained is.
"""

from typing import Any

from sbr_jax.costs import forecast
from sbr_jax.costs.forecast import Device, Job
from sbr_jax.methods import resolve


def guard_of(options: Any, job: Job) -> Job | None:
    """The guard as a job of forward passes; None for a judge without weights.

    Args:
        options: of the study.
        job: of the run, for its dtype.

    Raises:
        UserError: for a folder without a known model.
    """
    folder = getattr(options, "judge_folder", None)
    if folder is None:
        return None
    from sbr_jax.models import hf_config
    from sbr_jax.studies.chat.checkpoints import locate

    place = locate(folder, weights=False, option="study.judge-folder")
    return Job(hf_config.read(place), job.dtype, rank=0)


def held_bytes(options: Any, job: Job) -> dict[str, int]:
    """Bytes of the guard by name, nothing without one."""
    guard = guard_of(options, job)
    if guard is None:
        return {}
    return {"guard's weights": forecast.weight_bytes(guard.config, guard.dtype)}


def judging_seconds(
    options: Any, job: Job, device: Device, count: int, tokens: int
) -> float:
    """Of one forward pass of the guard over so many exchanges, 0 without a guard."""
    guard = guard_of(options, job)
    if guard is None:
        return 0.0
    return count * forecast.forward_flops(guard, tokens, heads=1) / device.flops


def rates_pairs(variant: str, methods: Any = None) -> bool:
    """Whether a variant asks the judge about every training pair.

    >>> rates_pairs("adaptive-judge"), rates_pairs("unified")
    (True, False)
    """
    method, options = resolve(variant, methods)
    return method == "adaptive-judge" or vars(options).get("risk") == "judge"


def rating_seconds(
    plan: Any, study: Any, job: Job, device: Device, row: str
) -> dict[str, float]:
    """Of a guard's pass over every training pair, once per domain, by part.

    Nothing for a row that asks no judge, and for a judge without weights.
    """
    options = plan.study
    asks = rates_pairs(row, plan.config.methods)
    if not asks or guard_of(options, job) is None:
        return {}
    sets = (study.domains[name].train for name in plan.domains)
    each = (judging_seconds(options, job, device, len(x), x.length) for x in sets)
    return {"ratings": sum(each)}
