"""The settings of a training job: mathematics apart from hardware."""

import dataclasses
import math
from typing import Any

from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does (mathematics) and what it runs on (hardware).

    The mathematical fields decide the results and are written to ``config.json``; a
    working directory with other values is refused. The hardware fields do not change
    results beyond floating-point rounding.

    Attributes:
      steps_per_domain: optimizer steps in each domain.
      batch_size: examples of one optimizer step, over all microbatches.
      learning_rate: peak of the schedule.
      warmup_fraction: share of the steps with a linear warm-up.
      final_fraction: end of the cosine decay, as a share of the peak (published:
        1e-6 of 2e-4).
      weight_decay: of AdamW.
      max_grad_norm: clipping threshold.
      lora_rank: r.
      lora_alpha: α of LoRA; the update is scaled by α / r.
      lora_dropout: on the input of the adapters, while training.
      lora_targets: regular expression of the adapted projections.
      repair_steps: E_repair, steps of one repair block.
      repair_blocks: how many blocks at most (published: one and at most one more).
      repair_learning_rate_scale: constant learning rate of the repair as a share of
        the peak (published: 2e-5 of 2e-4).
      replay_weight: β of L_task + β L_safe.
      tolerance: τ; repair when s_t < (1 − τ) s_0.
      fisher_examples: calibration examples in a Fisher (None: all).
      fisher_buffer: R, per-example gradients held before the lesser half is cut; exact
        for no more examples than that.
      mesh: hardware: ``"fsdp=4,tp=2"``, or None for one device.
      accumulation: hardware: microbatches of one optimizer step.
      checkpoint_every: hardware: steps between checkpoints inside a domain (None:
        only at its end).
      vmap_seeds: hardware: ``"auto"`` (on accelerators), ``"yes"`` or ``"no"``.
      fisher_microbatch: hardware: per-example gradients held at once.
      log_every: hardware: steps between fetches of the metrics.
    """

    steps_per_domain: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-4
    warmup_fraction: float = 0.03
    final_fraction: float = 0.005
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str = r"(q|k|v|o)_proj"
    repair_steps: int = 200
    repair_blocks: int = 2
    repair_learning_rate_scale: float = 0.1
    replay_weight: float = 1.0
    tolerance: float = 0.05
    fisher_examples: int | None = None
    fisher_buffer: int = 512
    # Hardware.
    mesh: str | None = None
    accumulation: int = 1
    checkpoint_every: int | None = None
    vmap_seeds: str = "auto"
    fisher_microbatch: int = 32
    log_every: int = 50

    def __post_init__(self):
        """Refuses values that cannot be meant.

        Raises:
          UserError: naming the field.
        """
        for field in dataclasses.fields(self):
            _require_type(field.name, getattr(self, field.name), str(field.type))
        for name in ("steps_per_domain", "batch_size", "lora_rank", "accumulation"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in (
            "repair_steps",
            "repair_blocks",
            "fisher_buffer",
            "fisher_microbatch",
            "log_every",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "replay_weight", "repair_learning_rate_scale"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("warmup_fraction", "lora_dropout", "tolerance"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < 1, "in [0, 1)")
        _require(
            "final_fraction",
            self.final_fraction,
            0 <= self.final_fraction <= 1,
            "in [0, 1]",
        )
        for name in ("checkpoint_every", "fisher_examples"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "at least 1, or None")
        _require(
            "batch_size",
            self.batch_size,
            self.batch_size % self.accumulation == 0,
            f"a multiple of accumulation ({self.accumulation})",
        )
        known = ("auto", "yes", "no")
        _require(
            "vmap_seeds", self.vmap_seeds, self.vmap_seeds in known, "auto, yes or no"
        )

    def mathematics(self) -> dict[str, Any]:
        """The fields that decide the results."""
        everything = dataclasses.asdict(self)
        return {k: v for k, v in everything.items() if k not in HARDWARE}

    def hardware(self) -> dict[str, Any]:
        """The fields that only decide how the results are computed."""
        return {k: getattr(self, k) for k in HARDWARE}


HARDWARE = (
    "mesh",
    "accumulation",
    "checkpoint_every",
    "vmap_seeds",
    "fisher_microbatch",
    "log_every",
)


def _require_type(name: str, value: Any, annotation: str) -> None:
    kinds = {"int": int, "float": (int, float), "str": str, "None": type(None)}
    wanted = [
        part.strip().removeprefix("<class '").removesuffix("'>")
        for part in annotation.split("|")
    ]
    fits = any(isinstance(value, kinds[kind]) for kind in wanted)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not fits or not finite or isinstance(value, bool):
        raise UserError(
            f"settings: {name}: expected a finite {' or '.join(wanted)}, got {value!r}"
        )


def _require(name: str, value: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise UserError(f"settings: {name}: expected {expected}, got {value!r}")
