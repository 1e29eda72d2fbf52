"""Raters of the risk of learning an example: a judge of pairs, a probe of prompts.

Goel, Maji, Mazumder, arXiv:2602.17546. In one forward pass of the aligned model, both
give a risk per example along with the reference's states.
"""

import jax
import numpy as np

from sbr_jax.methods._compose import Rater
from sbr_jax.methods.base import Problem, unmixed
from sbr_jax.methods.probe import (
    activations,
    distinct_prompts,
    fit_probe,
    probe_risk,
    probe_shapes,
    stream_at,
)
from sbr_jax.methods.risk import Judge, judged
from sbr_jax.models import answers
from sbr_jax.typing import PyTree, UserError


def judge_rater(*, name: str) -> Rater:
    """A rater in which the study's judge rates every training pair, once per domain.

    Args:
      name: name of the method, for messages.

    Returns:
      The rater. Its ``init`` and ``mix`` raise :class:`UserError` without a judge.
    """

    def judge_of(problem: Problem) -> Judge:
        if problem.judge is None:
            raise UserError(
                f"{name}: expected a judge in the study, got none: give one, or use "
                "adaptive-probe"
            )
        return problem.judge

    def init(problem, base, adapter, key):
        judge_of(problem)
        return {}

    def mix(problem, domain, seed):
        return judged(judge_of(problem), domain)

    def assess(problem, base, state, batch):
        if "risk" not in batch:
            raise UserError(
                f'{name}: expected "risk" in the batch, got {", ".join(batch)}: draw '
                "batches from what the method's mix returns"
            )
        return answers.states(problem.apply_fn, base, None, batch), batch["risk"]

    return Rater(init, mix, assess, ratings=1)


def probe_rater(
    *, layers: tuple[int, ...] | None = None, l2: float = 1e-2, name: str
) -> Rater:
    """A rater in which a probe of the aligned model's activations rates every prompt.

    Args:
      layers: states of the residual stream to use; None for all.
      l2: penalty on the probe's weights.
      name: name of the method, for messages.

    Returns:
      The rater. Its ``init`` raises :class:`UserError` without both prompt sets.
    """

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        harmful = problem.harmful
        benign = problem.calibration_controls.get("benign")
        if harmful is None or benign is None:
            raise UserError(
                f"{name}: expected harmful and calibration_controls['benign'] in the "
                "study, got not both: the probe learns to tell their prompts apart"
            )
        parts = [
            activations(problem.apply_fn, base, None, distinct_prompts(data), layers)
            for data in (harmful, benign)
        ]
        labels = np.repeat([1, 0], [len(part) for part in parts])
        probe = fit_probe(np.concatenate(parts), labels, l2=l2, key=key)
        quality = {"auroc": probe.auroc, "calibration_error": probe.calibration_error}
        return {"probe": probe, "diagnostics": quality}

    def assess(problem, base, state, batch):
        reference, seen = answers.captured(problem.apply_fn, base, None, batch)
        last = answers.last_prompt(batch)
        features = stream_at(seen["residual"], last, layers)
        return reference, probe_risk(state["probe"], features)

    def outline(problem, base, adapter):
        return {"probe": probe_shapes(problem.apply_fn, base, layers)}

    return Rater(init, unmixed, assess, outline=outline)
