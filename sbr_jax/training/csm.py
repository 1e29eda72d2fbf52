"""Cumulative safety monitoring (CSM): when to repair, and for how long.

SafeAnchor (arXiv:2604.17691), section 3.3. After domain t the monitor compares the
refusal rate s_t on a probe set with the aligned model's s_0. It asks for a repair when

    s_t < (1 − τ) s_0,    τ = 0.05.

A repair is one block of steps on L_task + β L_safe, and at most one further block.

Both rates come from n prompts, so the excess e = (1 − τ) s_0 − s_t is an estimate. The
published rule compares the estimate itself with 0; our two rules compare a confidence
bound of e (:func:`excess_bounds`).
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from sbr_jax import distributed
from sbr_jax.settings import Training
from sbr_jax.training import loop
from sbr_jax.training.finite import require_number
from sbr_jax.training.streams import Stream
from sbr_jax.training.track import Held, Outcome, Turn, deployed
from sbr_jax.typing import PyTree, UserError

Trained = TypeVar("Trained")

ROUNDING = 1e-9
"""Rounding error allowed in e, in percent, where e is exactly 0: 95 % of 20 of 85 are
19 of 85."""


def needs_repair(
    score: float, start_score: float, training: Training, count: int = 0
) -> bool:
    """Whether the excess e = (1 − τ) s_0 − s_t, or a bound of it, is above 0.

    - ``"point"`` (published): e itself.
    - ``"lower"``: its lower bound. It repairs only if a fall beyond τ is certain, so
      less often than the point rule.
    - ``"upper"``: its upper bound. It repairs unless a fall beyond τ can be ruled out,
      so more often.

    Args:
      score: s_t, 0 to 100.
      start_score: s_0 of the aligned model.
      training: has τ, the rule and its confidence.
      count: n, prompts behind each score; the point rule ignores it.

    >>> [needs_repair(score, 100.0, Training()) for score in (94.9, 95.0)]
    [True, False]
    >>> rules = (Training(monitor_rule=rule) for rule in ("lower", "upper"))
    >>> [needs_repair(92.0, 100.0, rule, count=64) for rule in rules]
    [False, True]
    """
    tolerance, rule = training.tolerance, training.monitor_rule
    if rule == "point":
        return bool((1.0 - tolerance) * start_score - score > ROUNDING)
    confidence = training.monitor_confidence
    lower, upper = excess_bounds(score, start_score, tolerance, count, confidence)
    return (lower if rule == "lower" else upper) > 0.0


def excess_bounds(
    score: float,
    start_score: float,
    tolerance: float,
    count: int,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Lower and upper confidence bounds of e = (1 − τ) s_0 − s_t, in percent.

    Newcombe's square-and-add method combines Wilson's bounds (l, u) of both rates for a
    weighted difference: ``e − √(((1 − τ)(s_0 − l_0))² + (u_t − s_t)²)``, and likewise
    above. It treats the rates as independent. Both come from the same prompts, so the
    bounds are cautious: if the two models tend to refuse the same prompts, e varies
    less. At s_0 = 100 this makes no difference.

    Args:
      score: s_t, 0 to 100.
      start_score: s_0.
      tolerance: τ.
      count: n, prompts behind each rate.
      confidence: of each one-sided bound.

    References:
      Newcombe, Statist. Med. 17 (1998), method 10; Zou and Donner, Statist. Med. 27
      (2008), for the weight

    >>> [round(x, 1) for x in excess_bounds(100.0, 100.0, 0.05, 64)]
    [-8.9, -0.9]
    """
    keep = 1.0 - tolerance
    before, now = (_wilson(x, count, confidence) for x in (start_score, score))
    excess = keep * start_score - score
    down = math.hypot(keep * (start_score - before[0]), now[1] - score)
    up = math.hypot(keep * (before[1] - start_score), score - now[0])
    return excess - down, excess + up


def _wilson(score: float, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's score bounds for a rate in percent."""
    z, p = statistics.NormalDist().inv_cdf(confidence), score / 100.0
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    half /= 1 + z**2 / count
    return 100.0 * max(middle - half, 0.0), 100.0 * min(middle + half, 1.0)


def check_rule(training: Training, count: int) -> None:
    """Refuses a rule that has too few prompts to decide anything.

    The upper bound would repair even a model that refuses all n prompts if n is below
    z² (1 − τ) / τ: 52 prompts at τ = 0.05 and a confidence of 0.95.

    Raises:
      UserError: for a probe set that is too small, or of unknown size.
    """
    rule = training.monitor_rule
    if rule == "point":
        return
    if count < 1:
        raise UserError(
            f"training.monitor_rule={rule}: expected a study that tells how many "
            "prompts its probe set has (probe_size), got none: use monitor_rule=point"
        )
    if rule == "upper" and needs_repair(100.0, 100.0, training, count):
        raise UserError(
            f"training.monitor_rule=upper: expected a probe set that can rule out a "
            f"fall of {training.tolerance:g} at a confidence of "
            f"{training.monitor_confidence:g}, got {count} prompts: take more, or "
            "raise training.tolerance"
        )


def monitor(
    trained: Trained,
    probe: Callable[[Trained], float],
    repair: Callable[[Trained, int], Trained],
    start_score: float,
    training: Training,
    *,
    count: int = 0,
    where: str = "monitor",
) -> tuple[Trained, list[float]]:
    """Probes, then repairs while the rule asks for it, at most ``repair_blocks`` times.

    Args:
      trained: the adapter after training on the domain.
      probe: measures its refusal rate on the probe set.
      repair: ``(trained, block) -> trained``, one block of repair steps.
      start_score: s_0.
      training: has the rule and the largest number of blocks.
      count: n, see :func:`needs_repair`.
      where: names the run in messages.

    Returns:
      The adapter after any repair, and the probe scores: the first, then one after each
      block. A list of length 1 means that no repair was needed.

    Raises:
      UserError: for a score that is not finite; no rule would ask for a repair.

    >>> monitor(0, lambda x: 90.0 + 6 * x, lambda x, block: x + 1, 100.0, Training())
    (1, [90.0, 96.0])
    """

    def measured() -> float:
        found = probe(trained)
        # Hosts whose scores differ in the last bit must still decide alike.
        return require_number(distributed.decide(lambda: found), f"{where}, probe")

    scores = [measured()]
    for block in range(training.repair_blocks):
        if not needs_repair(scores[-1], start_score, training, count):
            break
        trained = repair(trained, block)
        scores.append(measured())
    return trained, scores


def repair(turn: Turn, held: Held) -> Outcome:
    """The repair stage: runs the monitor, and the repair blocks that it asks for."""
    track, job = turn.track, turn.track.job
    training, probe, start_score = (
        job.config.training,
        job.study.probe,
        job.start_score(),
    )
    assert probe is not None  # A study without a probe has no repair stage.
    assert start_score is not None
    losses: list[float] = []

    def block(adapter: PyTree, count: int) -> PyTree:
        adapter, loss = _repair_block(turn, adapter, held.state, count)
        losses.append(loss)
        return adapter

    adapter, scores = monitor(
        held.adapter,
        lambda adapter: probe(*deployed(track, adapter, held.state)),
        block,
        start_score,
        training,
        count=job.study.probe_size,
        where=turn.where,
    )
    metrics = {
        "probe_start": start_score,
        "probe": scores[0],
        "probe_after": scores[-1],
        "blocks": len(losses),
    }
    if losses:
        metrics["safety_loss"] = losses[-1]
    return Outcome(metrics, adapter if losses else None)


def _repair_block(
    turn: Turn, adapter: PyTree, state: dict[str, Any], count: int
) -> tuple[PyTree, float]:
    """Trains on L_task + β L_safe; returns the adapter and L_safe."""
    track, job, program = turn.track, turn.track.job, turn.track.program
    training, name = job.config.training, f"{turn.domain}/repair{count}"
    safe = track.batches(job.study.calibration, f"{name}/safe", packed=False)
    task = track.batches(turn.examples(state), name)
    key = track.key(Stream.REPAIR, name)
    weight = np.float32(training.replay_weight)
    done = loop.train(
        lambda train, state, step: program.repair_step(
            track.base, train, state, task(step), key, safe(step), weight
        ),
        loop.Progress(program.start(adapter, state, repair=True), state),
        training.repair_steps,
        where=f"{turn.where}, repair",
        log_every=job.config.hardware.log_every,
        quiet=job.quiet,
    )
    return done.train.adapter, loop.summarise(done.history)["safety_loss"]
