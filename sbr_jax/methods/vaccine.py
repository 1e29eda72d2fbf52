"""Vaccine: align under the worst small disturbance of the attention outputs.

Huang, Hu, Liu, arXiv:2402.01109. This is an alignment stage with two passes per step:

    g_l = ∂L_safe / ∂h_l                       at e = 0
    e_l = ρ g_l / (‖(g_1 … g_L)‖ + 1e-7)       ρ = 2
    step from ∇_w L_safe(w; h_l + e_l)         e held constant

h_l is layer l's attention output, after the output projection and before the residual
sum; the norm runs over all layers, examples and positions at once. Published: 2,000
safe examples, 50 epochs of batches of 5 (20,000 steps), learning rate 1e-3 with 10 %
warm-up and a cosine, weight decay 0.1, LoRA r 8. Here the stage uses the study's
adapter shape and by default lasts as long as one domain;
:mod:`sbr_jax.methods._alignment_stage` lists the other differences.

One choice is ours: both passes share a dropout mask, so that the disturbance belongs to
the function that is then trained.

Symbols: L layers, B examples, T tokens, D width, w the adapter.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbr_jax.checks import checked
from sbr_jax.methods._alignment_stage import Stage, make_realign
from sbr_jax.methods.base import Method, Problem, task_loss
from sbr_jax.models import answers
from sbr_jax.settings import Count, NonNegative, Positive
from sbr_jax.typing import Batch, PyTree


@checked
def vaccine(
    *,
    radius: NonNegative = 2.0,
    steps: Count | None = None,
    batch_size: Count | None = None,
    learning_rate: Positive = 1e-3,
    weight_decay: NonNegative = 0.1,
    monitored: bool = False,
) -> Method:
    """Vaccine's alignment stage, then plain fine-tuning.

    Args:
      radius: ρ ≥ 0; 0 is alignment without a disturbance.
      steps: steps of the stage (None: as many as one domain has; published: 20,000).
      batch_size: safety examples of a step (None: the study's; published: 5).
      learning_rate: peak learning rate of the stage.
      weight_decay: weight decay of the stage.
      monitored: run CSM.

    Returns:
      The method. Its ``prepare`` trains on ``problem.calibration``.
    """
    stage = Stage("vaccine", learning_rate, "cosine", weight_decay, steps, batch_size)

    def rule(problem, base, adapter, batches, key):
        return vaccine_gradient(problem, base, adapter, batches["safe"], key, radius)

    realign = make_realign(rule, stage)

    def prepare(
        problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> PyTree:
        return realign(problem, base, adapter, {"safe": problem.calibration}, key)

    return Method("vaccine", monitored, stage.cost(2.0), prepare=prepare)


def vaccine_gradient(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    batch: Batch,
    key: jax.Array,
    radius: float,
) -> tuple[PyTree, jax.Array]:
    """∇_w L(w; h + e) and L, with the worst e of norm ρ held constant."""
    shift = perturbation(problem, base, adapter, batch, key, radius)
    loss, grads = jax.value_and_grad(
        lambda a: shifted_loss(problem, base, a, batch, key, shift)
    )(adapter)
    return grads, loss


def perturbation(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    batch: Batch,
    key: jax.Array,
    radius: float,
) -> jax.Array:
    """e_l = ρ g_l / (‖g‖ + 1e-7), ``[L, B, T, D]``: where the loss rises fastest.

    In the dtype of the residual stream. Its norm is ρ, up to a share 1e-7 / ‖g‖, and it
    is 0 at places that affect no answer token.
    """
    depth = base["layers"]["q_proj"].shape[0]
    embed = base["embed"]
    nothing = jnp.zeros((depth, *batch["tokens"].shape, embed.shape[1]), embed.dtype)
    gradient = jax.grad(
        lambda shift: shifted_loss(problem, base, adapter, batch, key, shift)
    )(nothing).astype(jnp.float32)
    norm = jnp.linalg.norm(gradient.ravel())
    return (radius / (norm + 1e-7) * gradient).astype(embed.dtype)


def shifted_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    batch: Batch,
    key: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    """L_task with ``shift [L, B, T, D]`` added to the attention outputs."""
    apply_fn = answers.Changed(problem.apply_fn, attention_shift=shift)
    shifted = dataclasses.replace(problem, apply_fn=apply_fn)
    return task_loss(shifted, base, adapter, batch, key)
