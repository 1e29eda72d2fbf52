"""A study: the model, the domains and the evaluations that a pipeline runs over."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.models import Model, ModelConfig
from sbr_jax.models.lora import select_targets
from sbr_jax.settings import Training
from sbr_jax.typing import PyTree, UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """One domain of a sequence.

    Attributes:
      train: training examples.
      evaluate: ``(base, adapter) -> accuracy`` on its test set, 0 to 100.
      steps: optimizer steps in this domain; None for the job's number.
    """

    train: TokenDataset
    evaluate: Callable[[PyTree, PyTree], float]
    steps: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Everything that a preset builds; the pipeline treats every model alike.

    Attributes:
      model: the aligned model.
      domains: by name, in their default order.
      calibration: the safety calibration set D_safe; None for methods that use none.
      calibration_controls: ``"benign"`` and ``"random"`` sets of the same size.
      safety_mix: for methods that interleave safety examples.
      harmful: the defender's harmful requests with compliant answers.
      unaligned: base weights before alignment, where they are known.
      judge: ``judge(dataset) -> risk [N]`` in [0, 1].
      evaluate: ``(base, adapter) -> metrics``, 0 to 100, including ``"composite"``.
      probe: ``(base, adapter) -> refusal rate`` on the probe set, 0 to 100; None
        switches monitoring off.
      probe_size: n, prompts in the probe set; a rule with a confidence bound needs it.
      fingerprint: of data and model; a working directory belongs to one.
      leak_check: number of examples that a pair of sets shares, e.g.
        ``{"calibration/probe": 0}``; any number above 0 is refused.
      notes: JSON values that decide what the numbers mean (judges and their agreement
        with people, variants of tasks); they go into ``config.json``.
    """

    model: Model
    domains: Mapping[str, Domain]
    calibration: Any
    evaluate: Callable[[PyTree, PyTree], Mapping[str, float]]
    calibration_controls: Mapping[str, TokenDataset] = dataclasses.field(
        default_factory=dict
    )
    safety_mix: TokenDataset | None = None
    harmful: TokenDataset | None = None
    unaligned: PyTree | None = None
    judge: Callable[[TokenDataset], np.ndarray] | None = None
    probe: Callable[[PyTree, PyTree], float] | None = None
    probe_size: int = 0
    fingerprint: str = ""
    leak_check: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_sizes(study: Study, domains: Sequence[str], training: Training) -> None:
    """Refuses empty sets, and sizes that the data or the model cannot meet.

    Raises:
      UserError: for the first such set or size.
    """
    if study.calibration is not None and len(study.calibration) == 0:
        raise UserError(
            "expected a safety calibration set with at least one example, got none"
        )
    for name in domains:
        size, batch = len(study.domains[name].train), training.batch_size
        if size == 0:
            raise UserError(f"expected training examples in domain {name}, got none")
        # A set may be smaller than a batch, but no step may see all of it twice.
        if batch >= 2 * size:
            raise UserError(
                f"expected training.batch_size to be less than {2 * size}, twice the "
                f"{size} training examples of domain {name}, got {batch}"
            )
    check_rank(study.model.config, training)


def check_rank(model: ModelConfig, training: Training) -> None:
    """Refuses an adapter of a higher rank than a projection that it adapts."""
    targets = select_targets(training.lora_targets)
    least = min(targets, key=lambda name: min(model.projection(name)))
    if training.lora_rank > (side := min(model.projection(least))):
        raise UserError(
            f"expected training.lora_rank to be at most {side}, the smaller side of "
            f"{least}, got {training.lora_rank}: lower it, or change lora_targets"
        )
