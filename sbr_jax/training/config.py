"""Configuration of a training job, without its model and data."""

import dataclasses
from typing import Any

from sbr_jax.methods import Hyperparameters
from sbr_jax.settings import Hardware, Training
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """How a run trains, on what hardware, and every method's hyper-parameters.

    Attributes:
      training: the mathematics, which decides the results.
      hardware: how the job is computed.
      methods: a ``Hyperparameters``.

    Raises:
      UserError: if the batch size is not a multiple of the number of microbatches.
    """

    training: Training = Training()
    hardware: Hardware = Hardware()
    methods: Any = Hyperparameters()

    def __post_init__(self):
        """Refuses a batch that does not split into equal microbatches."""
        batch, parts = self.training.batch_size, self.hardware.accumulation
        if batch % parts:
            raise UserError(
                "expected training.batch_size to be a multiple of "
                f"hardware.accumulation ({parts}), got {batch}"
            )

    def mathematics(self) -> dict[str, Any]:
        """The settings that decide the results, as plain values."""
        return {
            "training": dataclasses.asdict(self.training),
            "methods": dataclasses.asdict(self.methods),
        }
