"""Counts how often a job runs each of its programs, and sums up the hours.

The numbers of steps, Fisher estimates and repairs come from `sbr_jax.costs`; the time
of each comes from a compiled program.
"""

import dataclasses
import math
from collections.abc import Mapping

from sbr_jax.costs import forecast
from sbr_jax.methods import build
from sbr_jax.methods.base import Cost
from sbr_jax.models.lora import select_targets
from sbr_jax.planning.case import Case
from sbr_jax.settings import Count, Positive


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained and measured, as far as it decides how often programs run.

    Attributes:
        domains: how many are learnt, one after another.
        examples: of each domain.
        epochs: how often each is learnt.
        prompts: answered by the start model and after each domain.
        seeds: repetitions of everything but the start model's part.
    """

    domains: Count = 3
    examples: Count = 5000
    epochs: Positive = 3.0
    prompts: Count = 1050
    seeds: Count = 1


def calls(job: Job, case: Case) -> dict[str, dict[str, float]]:
    """Calls of each program, by part of the job, with one seed.

    Returns:
        Calls by program for ``"training"``, ``"Fisher"``, ``"answers"`` and, if the
        method is monitored, ``"repairs, at most"``.

    >>> calls(Job(domains=2, examples=160, epochs=1, prompts=64), Case("llama2-7b"))
    {'training': {'step': 20}, 'answers': {'read': 21, 'write': 3}}
    """
    method, training = build(case.method, case.config().methods), case.training
    steps = math.ceil(job.examples * job.epochs / training.batch_size)
    found: dict[str, dict[str, float]] = {"training": {"step": job.domains * steps}}
    estimates = forecast.calibration_fishers(method, job.domains, steps)
    if estimates:
        batches = math.ceil(case.calibration / case.fisher)
        found["Fisher"] = {
            "Fisher gradients": estimates * batches,
            "Fisher basis": estimates * len(select_targets(training.lora_targets)),
        }
    written = (1 + job.domains) * math.ceil(job.prompts / case.rows)
    reads = math.ceil(case.rows / case.read_rows)
    found["answers"] = {"read": written * reads, "write": written}
    if method.monitored:
        # A repair's step costs two plain ones, estimated by sizes from the method's.
        plain = forecast.step_flops(case.load, Cost())
        share = 2 * plain / forecast.step_flops(case.load, method.cost)
        repairs = job.domains * training.repair_blocks * training.repair_steps
        found["repairs, at most"] = {"step": repairs * share}
    return found


def hours(
    job: Job, case: Case, seconds: Mapping[str, float]
) -> dict[str, float | None]:
    """Hours of all seeds, by part of the job.

    Args:
        job: what is done.
        case: sizes, and the method.
        seconds: of one call, by program; a part with a program missing here is None.
    """
    found: dict[str, float | None] = {}
    for part, programs in calls(job, case).items():
        known = all(name in seconds for name in programs)
        total = sum(n * seconds.get(name, 0.0) for name, n in programs.items())
        found[part] = job.seeds * total / 3600 if known else None
    return found
