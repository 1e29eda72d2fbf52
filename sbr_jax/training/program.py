"""The compiled program of a variant: its optimizers and steps.

Programs are cached by variant, study and config, never by seed or domain. So a second
seed, a second domain or a second call in the same process compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sbr_jax import models
from sbr_jax.methods import build
from sbr_jax.methods.base import Method, Problem
from sbr_jax.training import sharding
from sbr_jax.training.config import Config
from sbr_jax.training.recompute import training_apply_fn
from sbr_jax.training.step import TrainState, compiled_step, make_step
from sbr_jax.training.streams import Stream, key_of
from sbr_jax.training.study import Study
from sbr_jax.transforms import replace_subspace
from sbr_jax.transforms.schedules import learning_rate_schedule
from sbr_jax.typing import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One variant, ready to run.

    Attributes:
      method: the variant's hooks.
      problem: the argument that all hooks get.
      mesh: None on one device.
      optimizer: of a domain.
      begin: ``(adapter, held) -> TrainState``; compiled on a mesh, so that no split
        array is ever whole on one device; see :func:`fresh`.
      step: compiled; see :func:`sbr_jax.training.step.make_step`.
      mapped_step: ``step`` over stacked seeds.
      repair_begin: ``begin`` of a repair, whose learning rate is constant.
      repair_step: compiled; also takes a safety batch and β.
    """

    method: Method
    problem: Problem
    mesh: Mesh | None
    optimizer: optax.GradientTransformationExtraArgs
    begin: Callable[..., TrainState]
    step: Callable[..., Any]
    mapped_step: Callable[..., Any]
    repair_begin: Callable[..., TrainState]
    repair_step: Callable[..., Any]

    def start(
        self, adapter: PyTree, state: Mapping[str, Any], *, repair: bool = False
    ) -> TrainState:
        """A fresh training state whose optimizer holds the method's subspace.

        Every array is a copy, so donating the state leaves the arguments alive.
        """
        held = {name: state[name] for name in HELD if state.get(name) is not None}
        return (self.repair_begin if repair else self.begin)(adapter, held)


HELD = ("subspace", "coefficients")
"""Entries of a method's state that its optimizer holds as a copy."""


def insert(opt_state: PyTree, state: Mapping[str, Any]) -> PyTree:
    """Puts a method's subspace and coefficients, if any, into an optimizer state."""
    if state.get("subspace") is None:
        return opt_state
    return replace_subspace(opt_state, state["subspace"], state.get("coefficients"))


def fresh(
    optimizer: optax.GradientTransformationExtraArgs, adapter: PyTree, held: PyTree
) -> TrainState:
    """A training state before its first step; everything in it is a copy."""
    adapter = jax.tree.map(jnp.copy, adapter)
    opt_state = insert(optimizer.init(adapter), held)
    return TrainState(adapter, opt_state, jnp.zeros((), jnp.int32))


@functools.lru_cache(maxsize=64)
def make_program(
    variant: str, study: Study, config: Config, mesh: Mesh | None = None
) -> Program:
    """Builds a variant's program; nothing is compiled before its first use.

    Args:
      variant: a name from ``METHODS`` or ``VARIANTS``.
      study: compared by identity in the cache.
      config: of the run.
      mesh: to compile for; its devices need not be present. None for the mesh that the
        configuration names, on this job's devices.

    Raises:
      UserError: for hyper-parameters that the method or its optimizer refuses.
    """
    method = build(variant, config.methods)
    mesh = sharding.mesh_of(config.hardware) if mesh is None else mesh
    training = config.training
    problem = Problem(
        apply_fn=training_apply_fn(study, training, config.hardware),
        calibration=study.calibration,
        training=training,
        hardware=config.hardware,
        calibration_controls=study.calibration_controls,
        safety_mix=study.safety_mix,
        harmful=study.harmful,
        unaligned=study.unaligned,
        judge=study.judge,
        answer=functools.partial(_answers, study.model),
    )
    # Shapes alone: an optimizer may hold a subspace's worth of them.
    adapter = jax.eval_shape(lambda: init_adapter(study, config, 0))
    schedule = learning_rate_schedule(
        training.learning_rate,
        training.steps_per_domain,
        warmup_fraction=training.warmup_fraction,
        final_fraction=training.final_fraction,
    )
    repair_rate = training.repair_learning_rate_scale * training.learning_rate

    def phase(gradient: Callable[..., Any], rate: optax.Schedule) -> tuple[Any, ...]:
        """An optimizer, its first state, and the step before it is compiled."""
        optimizer = method.optimizer(problem, adapter, rate)
        parts = config.hardware.accumulation
        step = make_step(problem, gradient, optimizer, accumulation=parts, mesh=mesh)
        begin = functools.partial(fresh, optimizer)
        if mesh is None:
            return optimizer, begin, step, compiled_step(step)
        train = jax.eval_shape(lambda adapter: fresh(optimizer, adapter, {}), adapter)
        placed = sharding.state_shardings(mesh, train)
        shardings = (placed, NamedSharding(mesh, PartitionSpec()))
        begin = jax.jit(begin, out_shardings=placed)
        return optimizer, begin, step, compiled_step(step, out_shardings=shardings)

    repair_schedule = optax.constant_schedule(repair_rate)
    optimizer, begin, step, compiled = phase(method.gradient, schedule)
    _, repair_begin, _, repair_step = phase(method.replay_gradient, repair_schedule)
    return Program(
        method=method,
        problem=problem,
        mesh=mesh,
        optimizer=optimizer,
        begin=begin,
        step=compiled,
        mapped_step=compiled_step(step, vmap_seeds=True),
        repair_begin=repair_begin,
        repair_step=repair_step,
    )


def _answers(
    model: models.Model,
    base: PyTree,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Greedy answers of the model without adapter, cut before a stop token."""
    return models.generate(model, base, None, prompts, max_new_tokens=most, stops=stops)


def init_adapter(study: Study, config: Config, seed: int) -> PyTree:
    """The adapter that a seed starts from."""
    return models.init_adapter(
        key_of(seed, Stream.ADAPTER),
        study.model.config,
        rank=config.training.lora_rank,
        alpha=config.training.lora_alpha,
        targets=config.training.lora_targets,
    )
