"""Booster: align so that a step of harmful fine-tuning gains little.

Huang, Hu, Ilhan, Tekin, Liu, arXiv:2409.01586. This alignment stage minimises
f(w) + λ (h(w) − h(w − α ∇h / ‖∇h‖)), with the Jacobian of the inner step replaced by
the identity:

    g = ∇f(w) + λ (∇h(w) − ∇h(w'))          λ = 5
    w' = w − α ∇h(w) / (‖∇h(w)‖ + 1e-7)     α = 0.1

f is the loss on safe data, h the loss on harmful data, and ‖·‖ runs over the whole
adapter. A step takes three backward passes. Published: 5,000 safe and 5,000 harmful
examples, 20 epochs of batches of 10 (10,000 steps), constant learning rate 5e-4, weight
decay 0.1, LoRA r 32 on q, k, v. Here the stage uses the study's adapter shape and by
default lasts as long as one domain. :mod:`sbr_jax.methods._alignment_stage` lists the
other differences.

One choice is ours: both passes of h share a dropout mask, so that their difference
comes from the inner step and not from the masks.

Symbols: w the adapter.
"""

import jax
import jax.numpy as jnp
import optax

from sbr_jax.checks import checked
from sbr_jax.methods._alignment_stage import Stage, make_realign
from sbr_jax.methods.base import Method, Problem, task_loss
from sbr_jax.settings import Count, NonNegative, Positive
from sbr_jax.typing import Batch, PyTree, UserError


@checked
def booster(
    *,
    regulariser: NonNegative = 5.0,
    inner_rate: NonNegative = 0.1,
    steps: Count | None = None,
    batch_size: Count | None = None,
    learning_rate: Positive = 5e-4,
    weight_decay: NonNegative = 0.1,
    monitored: bool = False,
) -> Method:
    """Booster's alignment stage, then plain fine-tuning.

    Args:
      regulariser: λ ≥ 0; 0 is alignment on safe data alone.
      inner_rate: α ≥ 0, the length of the inner step.
      steps: steps of the stage (None: as many as one domain has; published: 10,000).
      batch_size: safe examples of a step, with equally many harmful ones (None: the
        study's; published: 10).
      learning_rate: learning rate of the stage, constant.
      weight_decay: weight decay of the stage.
      monitored: run CSM.

    Returns:
      The method. Its ``prepare`` trains on ``problem.calibration`` and
      ``problem.harmful``, and raises a UserError if the latter is missing.
    """
    stage = Stage("booster", learning_rate, "constant", weight_decay, steps, batch_size)

    def rule(problem, base, adapter, batches, key):
        return booster_gradient(
            problem,
            base,
            adapter,
            batches["safe"],
            batches["harmful"],
            key,
            regulariser=regulariser,
            inner_rate=inner_rate,
        )

    realign = make_realign(rule, stage)

    def prepare(
        problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> PyTree:
        if problem.harmful is None:
            raise UserError(
                "booster: expected harmful requests with compliant answers in "
                "problem.harmful, got None; give the study a harmful set"
            )
        data = {"safe": problem.calibration, "harmful": problem.harmful}
        return realign(problem, base, adapter, data, key)

    return Method("booster", monitored, stage.cost(3.0), prepare=prepare)


def booster_gradient(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    safe: Batch,
    harmful: Batch,
    key: jax.Array,
    *,
    regulariser: float,
    inner_rate: float,
) -> tuple[PyTree, jax.Array]:
    """The gradient of a step, ∇f(w) + λ (∇h(w) − ∇h(w')), and f(w).

    ``safe`` is the batch of f, ``harmful`` the batch of h, λ is ``regulariser``, and α
    is ``inner_rate``.
    """
    safe_key, harmful_key = jax.random.split(key)
    loss, aligned = jax.value_and_grad(
        lambda a: task_loss(problem, base, a, safe, safe_key)
    )(adapter)
    harm = jax.grad(lambda a: task_loss(problem, base, a, harmful, harmful_key))

    here = harm(adapter)
    length = inner_rate / (optax.tree.norm(here) + 1e-7)
    stepped = jax.tree.map(lambda w, g: w - length.astype(w.dtype) * g, adapter, here)
    there = harm(stepped)

    weight = jnp.float32(regulariser)
    grads = jax.tree.map(
        lambda f, h, ahead: f + weight.astype(f.dtype) * (h - ahead),
        aligned,
        here,
        there,
    )
    return grads, loss
