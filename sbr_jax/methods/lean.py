"""Lean: a few rows of every batch tie the model to the aligned model.

This method is ours. Of the B rows of a batch, r come from the calibration set. They are
held, not learnt. The other rows are the task's:

    L = mean over the others of NLL + (γ / r) Σ over the r of KL_k(p_θ₀ ‖ p_θ)

One forward and one backward pass over B rows give both terms. The reference is cached
once, as top tokens (:mod:`sbr_jax.methods._reference`). Compared with a plain step,
lean also computes the divergence at the held places, and costs more if held rows are
longer than the task's. It differs from interleaving (arXiv:2604.17691) in two ways:
safe rows are held at the aligned model's distributions, not learnt as texts, and their
weight does not depend on their share of the batch.

γ = 3 was chosen on the validation split; r = 2, k = 32 and τ = 0.5 were set when the
method was written. The variant's ε = 3·10⁻⁵ is a sixth of what q reaches without a
trust region, on the validation split.

Symbols: θ adapter, θ₀ the aligned model, B rows of a batch, r ``safe_rows``, γ
``kl_weight``, k ``top_tokens``, τ ``self_answers``, ε ``epsilon``.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.checks import Range, checked
from sbr_jax.data import TokenDataset, concatenate
from sbr_jax.methods._reference import cache_reference, require_own, tied_losses
from sbr_jax.methods._self_answers import with_self_answers
from sbr_jax.methods._trust import with_trust_region
from sbr_jax.methods.base import (
    Found,
    Method,
    Problem,
    benign_control,
    dropout,
    joint_replay,
)
from sbr_jax.models import answers
from sbr_jax.settings import Count, NonNegative, Positive
from sbr_jax.typing import Batch, PyTree, UserError


@checked
def lean(
    *,
    safe_rows: Count = 2,
    kl_weight: NonNegative = 3.0,
    top_tokens: Count = 32,
    held: Literal["safety", "benign"] = "safety",
    self_answers: Annotated[float, Range(least=0, most=1)] | None = None,
    epsilon: Positive | None = None,
    kl_budget: Positive | None = None,
    refresh_every: Count = 8,
    refresh_subspace: bool = False,
    max_rank: Count = 64,
    basis: Literal["safety", "random", "shuffled"] = "safety",
    monitored: bool = False,
) -> Method:
    """Plain fine-tuning in which a few rows of each batch are held, not learnt.

    Args:
      safe_rows: r, calibration rows in each batch; fewer than the batch has rows.
      kl_weight: γ ≥ 0, weight of the mean divergence of the held rows.
      top_tokens: k, tokens of the reference kept at a place.
      held: which rows are held: ``"safety"`` for the calibration set, ``"benign"`` for
        a control that must not protect.
      self_answers: τ in [0, 1]; training rows with at least this risk get the aligned
        model's own answer. None keeps all answers.
      epsilon: ε in nats, budget of a trust region around the aligned model. None for no
        trust region, or one whose ε follows from ``kl_budget``.
      kl_budget: budget of the divergence on held-out calibration rows, in nats an
        answer token. It sets ε during training (:mod:`sbr_jax.methods._kl_budget`).
        None for a fixed ε.
      refresh_every: steps between measurements of that divergence.
      refresh_subspace: renew the trust region's basis and eigenvalues then too.
      max_rank: cap on the columns of the trust region's basis.
      basis: basis of the trust region: ``"safety"``, or a control with the same
        eigenvalues.
      monitored: run CSM.

    Returns:
      The method. It reports ``loss`` (of the task) and ``anchor`` (mean KL_k). Its
      ``mix`` refuses batches of r rows or fewer, and its ``begin_domain`` refuses a
      reference from another model or calibration set.

    Raises:
      UserError: if both ε and a budget are given, or an option of a trust region
        without one.
    """
    if epsilon is not None and kl_budget is not None:
        raise UserError(
            f"lean: expected epsilon or kl_budget, got epsilon={epsilon:g} and "
            f"kl_budget={kl_budget:g}: with a budget ε is set while training"
        )

    if basis != "safety" and epsilon is None and kl_budget is None:
        raise UserError(
            f"lean: expected epsilon or kl_budget beside basis={basis!r}, got neither: "
            "without either there is no trust region"
        )
    if refresh_subspace and kl_budget is None:
        raise UserError(
            "lean: expected kl_budget beside refresh_subspace=True, got None: a region "
            "with a fixed ε keeps its subspace"
        )

    def own(problem: Problem) -> Problem:
        if held == "safety":
            return problem
        rows = benign_control(problem, f"held={held!r}")
        return dataclasses.replace(problem, calibration=rows)

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        return {"reference": cache_reference(own(problem), base, top_tokens)}

    def mix(problem: Problem, domain: TokenDataset, seed: int) -> TokenDataset:
        size = problem.training.batch_size
        if safe_rows >= size:
            raise UserError(
                f"safe_rows: expected fewer than the {size} rows of a batch, got "
                f"{safe_rows}: the others are the task's"
            )
        return tied_mixture(domain, own(problem).calibration, safe_rows)

    def begin_domain(problem, base, state, examples, key):
        require_own("lean", own(problem), base, state["reference"])
        return examples, {}

    def loss(problem, base, adapter, state, batch, key):
        return lean_loss(
            problem, base, adapter, state, batch, key, safe_rows, kl_weight
        )

    def gradient(problem, base, adapter, state, batch, key) -> Found:
        (_, parts), grads = jax.value_and_grad(
            lambda a: loss(problem, base, a, state, batch, key), has_aux=True
        )(adapter)
        return grads, {}, parts

    def repair(problem, base, adapter, state, batch, safe, weight, key) -> Found:
        def whole(a: PyTree, task_key: jax.Array):
            return loss(problem, base, a, state, batch, task_key)

        return joint_replay(whole, problem, base, adapter, safe, weight, key)

    method = Method(
        "lean",
        monitored,
        init=init,
        mix=mix,
        begin_domain=begin_domain,
        gradient=gradient,
        replay_gradient=repair,
    )
    if epsilon is not None or kl_budget is not None:
        method = with_trust_region(
            method,
            epsilon=epsilon,
            max_rank=max_rank,
            basis=basis,
            kl_budget=kl_budget,
            refresh_every=refresh_every,
            refresh_subspace=refresh_subspace,
        )
    if self_answers is not None:
        method = with_self_answers(method, self_answers)
    return method


def tied_mixture(
    domain: TokenDataset, calibration: TokenDataset, quota: int
) -> TokenDataset:
    """A domain's examples plus tied calibration rows, ``quota`` of these in each batch.

    >>> domain = TokenDataset(np.zeros((6, 2)), np.ones((6, 2)))
    >>> safe = TokenDataset(np.ones((3, 2)), np.ones((3, 2)))
    >>> tied_mixture(domain, safe, 1).tied.tolist()
    [-1, -1, -1, -1, -1, -1, 0, 1, 2]
    """
    own = np.full(len(domain), -1, np.int32)
    tied = np.concatenate([own, np.arange(len(calibration), dtype=np.int32)])
    joined = concatenate([domain, calibration])
    return dataclasses.replace(joined, tied=tied, quota=quota)


def lean_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    state: Any,
    batch: Batch,
    key: jax.Array,
    safe_rows: int,
    kl_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This microbatch's share of the objective, and its unweighted parts.

    Sums over the microbatch are divided by the number of rows of each kind in the whole
    batch and multiplied by the number of microbatches. So the mean over microbatches is
    the batch's objective, wherever the held rows lie.

    Raises:
      UserError: for a batch without ``"tied"``.
    """
    if "tied" not in batch:
        raise UserError(
            f'lean: expected "tied" in the batch, got {", ".join(batch)}: draw batches '
            "from what the method's mix returns"
        )
    apply_fn, parts = problem.apply_fn, problem.hardware.accumulation
    hidden = answers.states(apply_fn, base, adapter, batch, **dropout(problem, key))
    each = tied_losses(apply_fn, base, hidden, batch, state["reference"])
    held = jnp.asarray(batch["tied"]) >= 0
    learnt = each if "weight" not in batch else batch["weight"] * each
    others = problem.training.batch_size - safe_rows
    task = parts / others * jnp.sum(jnp.where(held, 0.0, learnt))
    anchor = parts / safe_rows * jnp.sum(jnp.where(held, each, 0.0))
    return task + kl_weight * anchor, {"loss": task, "anchor": anchor}
