"""Settings of a training job: its mathematics and, separately, its hardware.

Each setting is declared here once, together with its range. Presets are instances of
these records. The command line changes single fields (``--training.learning-rate``).
The training code reads the records directly.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from sbr_jax import checks
from sbr_jax.checks import Range
from sbr_jax.typing import UserError

Record = TypeVar("Record")

Count = Annotated[int, Range(least=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, below=1)]


@dataclasses.dataclass(frozen=True)
class Training:
    """Mathematics of a training job; a working directory belongs to one job.

    Attributes:
      steps_per_domain: optimizer steps in each domain.
      batch_size: examples of one optimizer step, over all microbatches.
      learning_rate: peak of the schedule.
      warmup_fraction: share of the steps that are linear warm-up.
      final_fraction: end of the cosine decay, as a share of the peak (published:
        1e-6 of 2e-4).
      weight_decay: weight decay of AdamW.
      max_grad_norm: clipping threshold of the global gradient norm.
      lora_rank: r, rank of the adapters.
      lora_alpha: α of LoRA; the update is scaled by α / r.
      lora_dropout: dropout on the input of the adapters during training.
      lora_targets: regular expression for the adapted projections.
      repair_steps: E_repair, steps of one repair block.
      repair_blocks: most repair blocks (published: one, and at most one more).
      repair_learning_rate_scale: constant learning rate of the repair as a share of
        the peak (published: 2e-5 of 2e-4).
      replay_weight: β in L_task + β L_safe.
      tolerance: τ; repair when s_t < (1 − τ) s_0.
      monitor_rule: which estimate of (1 − τ) s_0 − s_t must be above 0 for a repair:
        the ``"point"`` estimate (published), its ``"lower"`` confidence bound (a fall
        is certain) or its ``"upper"`` bound (a fall cannot be ruled out).
      monitor_confidence: confidence of a bound, one-sided.
      fisher_examples: calibration examples in a Fisher (None: all).
      fisher_buffer: R, per-example gradients held before the weaker half is cut; with
        at most R examples the Fisher is exact.
      memory_budget: GiB for a Fisher's gradients, rows and basis (None: no budget).
        The budget then decides how many gradients are held, in place of
        `fisher_buffer`; at most `fisher_microbatch` are computed at once. Model and
        activations come on top.

    Raises:
      UserError: naming a field with a wrong type or a value out of range.

    >>> Training(learning_rate=1e-3).lora_rank
    16
    """

    steps_per_domain: Annotated[int, Range(least=1, most=2**31 - 1)] = 200
    batch_size: Count = 16
    learning_rate: Positive = 2e-4
    warmup_fraction: Fraction = 0.03
    final_fraction: Annotated[float, Range(least=0, most=1)] = 0.005
    weight_decay: NonNegative = 0.01
    max_grad_norm: Positive = 1.0
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Fraction = 0.0
    lora_targets: str = r"(q|k|v|o)_proj"
    repair_steps: Count = 200
    repair_blocks: Count = 2
    repair_learning_rate_scale: NonNegative = 0.1
    replay_weight: NonNegative = 1.0
    tolerance: Fraction = 0.05
    monitor_rule: Literal["point", "lower", "upper"] = "point"
    monitor_confidence: Annotated[float, Range(above=0.5, below=1)] = 0.95
    fisher_examples: Count | None = None
    fisher_buffer: Count = 512
    memory_budget: Positive | None = None

    def __post_init__(self):
        """Refuse values outside the declared types and ranges."""
        checks.fields(self, "training")

    @property
    def memory_bytes(self) -> float | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else self.memory_budget * 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How results are computed; it changes them by floating-point rounding only.

    There are four exceptions: the masks of LoRA dropout (`packing`, `accumulation`),
    tests on single microbatches (`accumulation` in SafeGrad and lazy), the number of
    safety examples in half a batch (`accumulation`, if it does not divide that number),
    and the place where a full Fisher buffer is cut (`fisher_microbatch`, with more
    examples than `fisher_buffer`).

    Attributes:
      mesh: all devices, by axis, ``"data=2,fsdp=4,tp=2"``; None for one device.
      accumulation: microbatches of one optimizer step; divides the batch size.
      checkpoint_every: steps between checkpoints inside a domain (None: only at its
        end).
      vmap_seeds: map all seeds into one program; ``"auto"`` does so on accelerators.
      fisher_microbatch: examples that a Fisher differentiates at once.
      log_every: steps between fetches of the metrics.
      packing: put several examples into one row of a step; ``"auto"`` does so if it
        saves a fifth of the places.
      remat: recompute layers in the backward pass; ``"auto"`` does so if they would not
        fit into a quarter of the device, and for chat models on a mesh.
      generation_batch: most answers generated at once (chat models).
      score_tokens: tokens whose keys and values are held at once while answers are
        generated or scored (chat models).

    Raises:
      UserError: naming a field with a wrong type or a value out of range.
    """

    mesh: str | None = None
    accumulation: Count = 1
    checkpoint_every: Count | None = None
    vmap_seeds: Literal["auto", "yes", "no"] = "auto"
    fisher_microbatch: Count = 32
    log_every: Count = 50
    packing: Literal["auto", "yes", "no"] = "auto"
    remat: Literal["auto", "yes", "no"] = "auto"
    generation_batch: Count = 16
    score_tokens: Count = 16_384

    def __post_init__(self):
        """Refuse values outside the declared types and ranges."""
        checks.fields(self, "hardware")


def restore(like: Record, written: Mapping[str, Any], where: str) -> Record:
    """Rebuild a tree of settings from its JSON form.

    Args:
      like: a frozen dataclass that gives the type of the result and the values of
        fields that ``written`` lacks.
      written: values by field; dataclasses are mappings, tuples are lists.
      where: put before messages.

    Raises:
      UserError: for a field that this version does not know.

    >>> restore(Training(), {"lora_rank": 4}, "training").lora_rank
    4
    """
    values: dict[str, Any] = {}
    record: Any = like
    known = {field.name for field in dataclasses.fields(record)}
    if strange := sorted(written.keys() - known):
        raise UserError(
            f"{where}: this version does not know {', '.join(strange)}: use the one "
            "that wrote it"
        )
    for name, value in written.items():
        own = getattr(like, name)
        if dataclasses.is_dataclass(own):
            value = restore(own, value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(record, **values)
