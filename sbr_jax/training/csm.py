"""Cumulative safety monitoring (CSM): when to repair, and for how long.

SafeAnchor (arXiv:2604.17691), section 3.3. After domain t the refusal rate s_t on a
probe set is compared with the aligned model's s_0; repair is asked for when

    s_t < (1 − τ) s_0,    τ = 0.05,

as one block of steps on L_task + β L_safe, and at most one further block.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from sbr_jax import distributed
from sbr_jax.training import loop
from sbr_jax.training.finite import require_number
from sbr_jax.training.track import Held, Outcome, Turn, deployed
from sbr_jax.typing import PyTree

Trained = TypeVar("Trained")


def needs_repair(score: float, start_score: float, tolerance: float = 0.05) -> bool:
    """Whether s_t < (1 − τ) s_0; equality asks for no repair.

    Args:
      score: s_t, in the units of ``start_score``.
      start_score: s_0 of the aligned model.
      tolerance: τ in [0, 1).

    >>> needs_repair(94.9, 100.0), needs_repair(95.0, 100.0), needs_repair(0.0, 0.0)
    (True, False, False)
    """
    return bool(score < (1.0 - tolerance) * start_score)


def monitor(
    trained: Trained,
    probe: Callable[[Trained], float],
    repair: Callable[[Trained, int], Trained],
    start_score: float,
    *,
    tolerance: float = 0.05,
    max_blocks: int = 2,
    where: str = "monitor",
) -> tuple[Trained, list[float]]:
    """Probes, and repairs while the rule says so, at most ``max_blocks`` times.

    Args:
      trained: what was trained on the domain (an adapter).
      probe: its refusal rate on the probe set.
      repair: ``(trained, block) -> trained``, one block of repair steps.
      start_score: s_0.
      tolerance: τ.
      max_blocks: one block and, as published, at most one further.
      where: names the run in messages.

    Returns:
      What is left, and the probe's score before and after each block: a list of
      length 1 means that no repair was needed.

    Raises:
      UserError: for a score that is not finite, which would ask for no repair.

    >>> monitor(0, lambda x: 90.0 + 6 * x, lambda x, block: x + 1, 100.0)
    (1, [90.0, 96.0])
    """

    def measured() -> float:
        found = probe(trained)
        # Hosts that differ in the last bit must not go different ways.
        return require_number(distributed.decide(lambda: found), f"{where}, probe")

    scores = [measured()]
    for block in range(max_blocks):
        if not needs_repair(scores[-1], start_score, tolerance):
            break
        trained = repair(trained, block)
        scores.append(measured())
    return trained, scores


def repair(turn: Turn, held: Held) -> Outcome:
    """The monitor, and repair blocks where it asks for them."""
    track, job = turn.track, turn.track.job
    training, probe, start_score = job.config.training, job.study.probe, job.start_score
    assert probe is not None  # Without one there is no such stage.
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
        tolerance=training.tolerance,
        max_blocks=training.repair_blocks,
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
    """Steps on L_task + β L_safe: the adapter after them, and L_safe."""
    track, job, program = turn.track, turn.track.job, turn.track.program
    training, name = job.config.training, f"{turn.domain}/repair{count}"
    safe = track.batches(job.study.calibration, f"{name}/safe", packed=False)
    task, key = track.batches(turn.examples(state), name), track.key(5, name)
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
