"""The sizes that decide what is compiled: a model, a method and a job, without data.

Of a study's data, only the number and length of examples affect shapes. So stand-ins of
the same sizes suffice; their tokens are never read.
"""

import dataclasses
from typing import Any

import numpy as np

from sbr_jax import models
from sbr_jax.costs.forecast import Load
from sbr_jax.data import TokenDataset
from sbr_jax.data.batches import batch
from sbr_jax.data.layout import answer_places
from sbr_jax.methods.base import Method, Problem
from sbr_jax.models.buckets import bucket
from sbr_jax.models.config import Hardware as Execution
from sbr_jax.models.generate import READ_AT_ONCE
from sbr_jax.planning.layouts import Layout
from sbr_jax.planning.shapes import read_shape
from sbr_jax.settings import Hardware, Training
from sbr_jax.training.config import Config
from sbr_jax.training.study import Study

MIXED = 64
"""Examples of a domain, enough to replace any share of them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A job, as far as its programs depend on it.

    Attributes:
        model: a name of `planning.shapes`, or a file.
        method: a method or a variant.
        training: the mathematics of training.
        accumulation: microbatches of a step.
        length: tokens of an example.
        calibration: examples of the safety calibration set.
        answers: tokens of their answers; a training example is all answer.
        fisher: examples that a Fisher differentiates at once.
        rows: answers written at once.
        prompt: tokens of a prompt.
        new: tokens of a written answer.
        dtype: of the frozen weights and activations.
    """

    model: str
    method: str = "plain"
    training: Training = Training()
    accumulation: int = 1
    length: int = 512
    calibration: int = 500
    answers: int = 128
    fisher: int = 16
    rows: int = 64
    prompt: int = 384
    new: int = 256
    dtype: str = "bfloat16"

    @property
    def load(self) -> Load:
        """The cost of one step, for the forecast from sizes."""
        return Load(
            config=read_shape(self.model),
            dtype=self.dtype,
            rank=self.training.lora_rank,
            targets=self.training.lora_targets,
            batch=self.training.batch_size,
            accumulation=self.accumulation,
            length=self.length,
        )

    @property
    def read_rows(self) -> int:
        """Prompts that are read at once, before answers are written."""
        return min(self.rows, max(READ_AT_ONCE // bucket(self.prompt), 1))

    def config(self, layout: Layout | None = None) -> Config:
        """Settings of the job, on a mesh of this layout."""
        hardware = Hardware(
            mesh=None if layout is None else str(layout),
            accumulation=self.accumulation,
            fisher_microbatch=self.fisher,
            packing="no",
            remat="yes",
        )
        return Config(training=self.training, hardware=hardware)

    def study(self) -> Study:
        """A study of these sizes, without weights."""
        config = read_shape(self.model)
        # Accelerators roll the loop over layers, whatever device this process has.
        model = models.make_model(
            config, None, hardware=Execution(remat=True, unroll=1)
        )
        safe = self._examples(self.calibration, self.answers)
        return Study(
            model=model,
            domains={},
            calibration=safe,
            evaluate=_never,
            calibration_controls={"benign": safe, "random": safe},
            safety_mix=safe,
            harmful=safe,
            judge=_harmless,
        )

    def batch(self, method: Method, problem: Problem) -> dict[str, np.ndarray]:
        """A step's batch in which every place counts as an answer's."""
        size, answers = self.training.batch_size, self.length - 1
        data = self._examples(size, answers)
        tokens, mask = np.asarray(data.tokens), np.asarray(data.mask)
        rows = {"tokens": tokens, "mask": mask, **answer_places(tokens, mask)}
        kinds = {"mask": np.float32, "shares": np.float32}
        laid = {k: x.astype(kinds.get(k, np.int32)) for k, x in rows.items()}
        mixed = method.mix(problem, self._examples(MIXED + size, answers), 0)
        return {**batch(mixed, size, 0, 0), **laid}

    def _examples(self, count: int, answers: int) -> TokenDataset:
        """``count`` distinct examples of the full length."""
        answers = min(answers, self.length - 1)
        tokens = np.ones((count, self.length), np.int32)
        tokens[:, 0] = 1 + np.arange(count)
        mask = np.zeros((count, self.length), np.float32)
        mask[:, self.length - answers :] = 1
        return TokenDataset(tokens, mask)


def _harmless(examples: TokenDataset) -> np.ndarray:
    """The risk of stand-ins, which affects no shape."""
    return np.zeros(len(examples), np.float32)


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is measured of what is only compiled")
