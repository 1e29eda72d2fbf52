"""Selectivity: what a subspace holds of examples that had no part in it.

In its own examples a subspace holds ρ of the energy by construction. Whether it is
about safety, other examples say: the directions of one half of the calibration set are
measured on the other half and on the task,

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
"""Examples of either kind that a share is measured on, at most."""


def selectivity(
    ssi: Ssi,
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    key: jax.Array,
    task: TokenDataset | None,
) -> dict[str, PyTree]:
    """How much of held-out safety and of a task lies in the subspace of a half.

    Args:
      ssi: how subspaces are found.
      problem: its calibration set gives the half, and what is held out.
      base: frozen weights.
      adapter: of the present model.
      key: as for :meth:`Ssi.identify`.
      task: examples of what is to be learnt; None for none.

    Returns:
      ``held_out_share`` and, with a task, ``task_share`` and their ratio
      ``selectivity``, for each layer; empty where a half would be empty.
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
    """The subspace that half of the examples would have projected away.

    None where a half would be empty.
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
    """The share of a set, of so many examples at most, that lies in each."""
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
    """Half of a dataset; sets are drawn in random order, so either half is like it."""
    return take(dataset, np.arange(first, len(dataset), 2))


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Their quotient; 0 where nothing of the task lies in the subspace."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)
