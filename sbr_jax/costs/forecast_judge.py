"""The cost of a guard model that judges answers or rates training pairs.

The guard is read dense, whole and on one device, whatever model is trained.
"""

from typing import Any

from sbr_jax.costs import forecast
from sbr_jax.costs.forecast import Device, Load


def guard_of(options: Any, load: Load) -> Load | None:
    """The guard as a load of forward passes; None for a judge without weights.

    Args:
        options: the study's options.
        load: the run's load, for its dtype.

    Raises:
        UserError: for a folder without a known model.
    """
    folder = getattr(options, "judge_folder", None)
    if folder is None:
        return None
    from sbr_jax.models import hf_config
    from sbr_jax.studies.chat.checkpoints import locate

    place = locate(folder, weights=False, setting="study.judge-folder")
    return Load(hf_config.read(place), load.dtype, rank=0)


def held_bytes(options: Any, load: Load) -> dict[str, int]:
    """Bytes of the guard by name; empty without a guard."""
    guard = guard_of(options, load)
    if guard is None:
        return {}
    return {"guard's weights": forecast.weight_bytes(guard.config, guard.dtype)}


def judging_seconds(
    options: Any, load: Load, device: Device, count: int, tokens: int
) -> float:
    """Seconds of one forward pass of the guard over exchanges; 0 without a guard."""
    guard = guard_of(options, load)
    if guard is None:
        return 0.0
    return count * forecast.forward_flops(guard, tokens, heads=1) / device.flops


def rating_seconds(
    job: Any, study: Any, load: Load, device: Device, ratings: int
) -> dict[str, float]:
    """Seconds of a guard's passes over all training pairs of each domain, by part.

    Empty for a defence without ratings, or a judge without weights.
    """
    options = job.study
    if not ratings or guard_of(options, load) is None:
        return {}
    sets = (study.domains[name].train for name in job.domains)
    each = (judging_seconds(options, load, device, len(x), x.length) for x in sets)
    return {"ratings": ratings * sum(each)}
