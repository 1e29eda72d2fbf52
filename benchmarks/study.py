"""Made-up studies over random Llamas of any size, for benchmarks without a peer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shapes
from sbr_jax import fisher_subspace, models
from sbr_jax.costs.devices import planned_bytes
from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.data.layout import Layout, arrange
from sbr_jax.methods.base import LAYER_AXES, task_loss
from sbr_jax.settings import Hardware, Training
from sbr_jax.training.config import Config
from sbr_jax.training.program import Program, init_adapter, make_program
from sbr_jax.training.study import Domain, Study


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its steps."""

    shape: shapes.Shape
    length: int = 128
    batch: int = 16
    rank: int = 16
    calibration: int = 32
    """Examples of the safety calibration set."""


SMOKE = Size(shapes.SHAPES["smoke"], length=16, batch=4, rank=2, calibration=8)
TESTBED = Size(shapes.SHAPES["testbed"], length=40, rank=8)
SMALL = Size(shapes.SHAPES["small"])


def dataset(size: Size, count: int, seed: int) -> TokenDataset:
    """Full rows; the last half of each is the answer."""
    source = np.random.default_rng(seed)
    tokens = source.integers(1, size.shape.vocab_size, (count, size.length))
    mask = np.zeros(tokens.shape, np.float32)
    mask[:, size.length // 2 :] = 1
    return TokenDataset(tokens.astype(np.int32), mask)


def judge(data: Any) -> np.ndarray:
    """A made-up risk: the first token's position in its range."""
    first = np.asarray(data.tokens[:, 0], np.float32)
    return first / (first.max(initial=0) + 1)


def make(size: Size, **training: Any) -> tuple[Study, Config]:
    """A study with every part that any method needs, and its settings."""
    config = size.shape.ours()
    params = models.init_params(jax.random.key(0), config)
    hardware = models.Hardware(remat=False)
    calibration = dataset(size, size.calibration, 1)
    moved = jax.tree.map(
        lambda x: (
            x + 0.01 * jax.random.normal(jax.random.key(6), x.shape, x.dtype)
            if x.ndim > 2
            else x
        ),
        params["layers"],
    )
    study = Study(
        model=models.make_model(config, params, hardware=hardware),
        domains={"one": Domain(dataset(size, 4 * size.batch, 2), lambda *_: 0.0)},
        calibration=calibration,
        evaluate=lambda *_: {"composite": 50.0, "refusal": 50.0},
        calibration_controls={
            "benign": dataset(size, size.calibration, 3),
            "random": dataset(size, size.calibration, 4),
        },
        safety_mix=calibration,
        harmful=dataset(size, size.calibration, 5),
        unaligned={**params, "layers": moved},
        judge=judge,
        probe=lambda *_: 50.0,
        fingerprint="benchmark",
    )
    settings = Training(
        steps_per_domain=4,
        batch_size=size.batch,
        lora_rank=size.rank,
        lora_alpha=2.0 * size.rank,
        **training,
    )
    how = Hardware(fisher_microbatch=min(8, size.calibration))
    return study, Config(settings, how)


def batch_of(size: Size, data: Any) -> dict[str, np.ndarray]:
    """A step's examples of a set, laid out as the trainer lays out full rows."""
    answers = int(data.mask.sum(axis=1).max())
    layout = Layout(size.length, False, answers)
    return arrange([batch(data, size.batch, 0, 0)], layout)[0]


class Steps:
    """A compiled step of one variant, and its inputs.

    Args:
      variant: of ``METHODS`` or ``VARIANTS``.
      size: of model and step.
      made: a result of :func:`make`, to share between variants.
      seeds: how many are mapped into one program; 0 for a plain step.
    """

    def __init__(
        self,
        variant: str,
        size: Size,
        made: tuple[Study, Config] | None = None,
        seeds: int = 0,
    ):
        """Prepares the method and compiles its step once."""
        study, config = made or make(size)
        self.program: Program = make_program(variant, study, config)
        method, problem = self.program.method, self.program.problem
        adapter, key = init_adapter(study, config, 0), jax.random.key(0)
        self.base = method.prepare(problem, study.model.params, adapter, key)
        state = method.init(problem, self.base, adapter, key)
        state = {k: v for k, v in state.items() if k != "diagnostics"}
        drawn: Any = batch_of(size, method.mix(problem, study.domains["one"].train, 0))
        train = self.program.start(adapter, state)
        step: Any = self.program.step
        if seeds:
            step = self.program.mapped_step
            key = jax.random.split(key, seeds)
            train, state, drawn = jax.tree.map(
                lambda x: jnp.stack([x] * seeds), (train, state, drawn)
            )
        self._rest = (state, drawn, key)
        self._compiled = step.lower(self.base, train, *self._rest).compile()
        self.bytes = planned_bytes(self._compiled)
        self._train = train

    def __call__(self) -> Any:
        """Takes one step; the state is consumed and replaced."""
        self._train, metrics = self._compiled(self.base, self._train, *self._rest)
        return metrics["loss"], jax.tree.leaves(self._train)


def batch_loss(adapter: Any, rows: Any, base: Any, problem: Any) -> jax.Array:
    """The loss of some examples, as a plain step differentiates it."""
    return task_loss(problem, base, adapter, rows, jax.random.key(0))


def example_loss(adapter: Any, example: Any, base: Any, problem: Any) -> jax.Array:
    """The loss of one example, as a Fisher pass differentiates it."""
    rows = {name: x[None] for name, x in example.items()}
    return batch_loss(adapter, rows, base, problem)


class Calibration:
    """Passes over the calibration set, eight examples at a time.

    Args:
      size: of model and set.
      columns: K, columns of the subspace.
    """

    def __init__(self, size: Size, columns: int):
        """Makes the set and an adapter."""
        study, config = make(size)
        problem = make_program("plain", study, config).problem
        self._base, self._columns = study.model.params, columns
        self._adapter = models.init_adapter(
            jax.random.key(0), study.model.config, rank=size.rank, alpha=2.0 * size.rank
        )
        rows = {"tokens": study.calibration.tokens, "mask": study.calibration.mask}
        self._batches = [
            jax.tree.map(lambda x, i=i: x[i : i + 8], rows)
            for i in range(0, size.calibration, 8)
        ]
        self._loss = functools.partial(example_loss, problem=problem)
        self._gradient = jax.jit(
            jax.grad(functools.partial(batch_loss, problem=problem))
        )

    def fisher(self) -> Any:
        """A subspace of the set's gradients."""
        found = fisher_subspace(
            self._loss,
            self._adapter,
            self._batches,
            max_rank=self._columns,
            unit=models.is_lora_pair,
            layer_axes=LAYER_AXES,
            args=(self._base,),
        )
        return jax.tree.leaves(found)

    def gradients(self) -> Any:
        """As many plain gradients, batched alike."""
        return [
            self._gradient(self._adapter, rows, self._base) for rows in self._batches
        ]
