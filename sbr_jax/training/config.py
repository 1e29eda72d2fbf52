"""Configuration of a training job, apart from what it is trained on."""

import dataclasses
from typing import Any

from sbr_jax.methods import Hyperparameters
from sbr_jax.settings import Hardware, Training
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """How a run trains, on what hardware, and every method's hyper-parameters.

    Attributes:
      training: mathematics.
      hardware: how it is computed.
      methods: a ``Hyperparameters``.

    Raises:
      UserError: for a batch that is no multiple of the microbatches.
    """

    training: Training = Training()
    hardware: Hardware = Hardware()
    methods: Any = Hyperparameters()

    def __post_init__(self):
        """Refuses a batch that does not fall into equal microbatches."""
        batch, parts = self.training.batch_size, self.hardware.accumulation
        if batch % parts:
            raise UserError(
                "expected training.batch_size to be a multiple of "
                f"hardware.accumulation ({parts}), got {batch}"
            )

    def mathematics(self) -> dict[str, Any]:
        """What decides the results, as plain values."""
        return {
            "training": dataclasses.asdict(self.training),
            "methods": dataclasses.asdict(self.methods),
        }
