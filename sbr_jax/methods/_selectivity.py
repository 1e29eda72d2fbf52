"""Selectivity: how much a subspace holds of examples that it was not made from.

A subspace holds ρ of the energy of its own examples by construction. Other examples
tell whether it is about safety. So the directions from one half of the calibration set
are measured on the other half and on the task,

    held-out share = Σ ‖Vᵀ s‖² / Σ ‖s‖²  over the other half,   task share likewise,
    selectivity    = held-out share / task share,

with s the gradient of an example's log-likelihood.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data.batches import TokenDataset, take
from sbr_jax.fisher.share import energy_shares
from sbr_jax.methods._ssi import Ssi, some
from sbr_jax.methods.base import Problem
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.subspace import Subspace
from sbr_jax.typing import PyTree

SHARED = 32
"""Most examples that a share is measured on."""


def selectivity(
    ssi: Ssi,
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    key: jax.Array,
    task: TokenDataset | None,
) -> dict[str, PyTree]:
    """Shares of held-out safety and of a task in the subspace of half the examples.

    Args:
      ssi: how subspaces are found.
      problem: gives the calibration set, both the half and the held-out half.
      base: frozen weights.
      adapter: adapter of the current model.
      key: as for :meth:`Ssi.identify`.
      task: examples of the task; None for none.

    Returns:
      ``held_out_share`` and, with a task, ``task_share`` and their ratio
      ``selectivity``, for each layer. Empty if there are too few examples for two
      halves.
    """
    part = half(ssi, problem, base, adapter, key)
    if part is None:
        return {}
    sets = {"held_out_share": held_out(problem)}
    if task is not None and len(task):
        sets["task_share"] = task
    found = {
        name: shares_of(ssi, problem, base, adapter, dataset, [part])[0]
        for name, dataset in sets.items()
    }
    if len(found) > 1:
        found["selectivity"] = jax.tree.map(_ratio, *found.values())
    return found


def half(
    ssi: Ssi, problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
) -> Subspace | None:
    """The subspace to project away, estimated from half of the examples.

    None if there are too few examples for two halves.
    """
    chosen, against = ssi.sets(problem)
    if min(len(chosen), len(problem.calibration)) < 2:
        return None
    own = _every_second(chosen, 0)
    other = None if against is None else _every_second(against, 0)
    return ssi.active(ssi.estimate(problem, base, adapter, own, key, other), key)


def shares_of(
    ssi: Ssi,
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    dataset: TokenDataset,
    subspaces: Sequence[Subspace],
    most: int = SHARED,
) -> list[PyTree]:
    """Energy shares of a set (at most ``most`` examples) in each subspace."""
    return energy_shares(
        answer_loss(problem.apply_fn, ssi.reduction),
        adapter,
        ssi.batches(problem, some(dataset, most)),
        subspaces,
        args=(base,),
    )


def held_out(problem: Problem) -> TokenDataset:
    """The half of the calibration set that :func:`half` does not see."""
    return _every_second(problem.calibration, 1)


def _every_second(dataset: TokenDataset, first: int) -> TokenDataset:
    """Half of a dataset; sets come in random order, so both halves are alike."""
    return take(dataset, np.arange(first, len(dataset), 2))


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """``top / bottom``; 0 where nothing of the task lies in the subspace."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)
