r"""Exhaustion of a growing subspace: ranks and accuracy over T domains.

A subspace that is merged with a new one after each domain grows up to its cap of K
columns. For each domain t:

    used(t)    = k̄ / K, mean effective rank over the cap, before domain t
    full(t)    = share of the layers' units at the cap, before domain t
    removed(t) = ‖(1 − α) Π g‖ / ‖g‖, mean over the steps of domain t
    gap(t)     = accuracy of plain fine-tuning − accuracy of the defence, both right
                 after domain t, in points

The projection is exhausted if `gap` grows with t. A full rank alone proves nothing: a
control of the same rank shows the cost of removing that many directions.

Symbols: T domains, S seeds, U units of all layers, K columns, k effective rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sbr_jax.typing import UserError


def exhaustion(
    domains: Sequence[str],
    accuracy: ArrayLike,
    *,
    ranks: ArrayLike | None = None,
    cap: int | None = None,
    removed: ArrayLike | None = None,
    reference: ArrayLike | None = None,
) -> dict[str, Any]:
    """Follow one row through its domains.

    Args:
      domains: T names, in order.
      accuracy: ``[S, T]``, right after each domain, 0 to 100.
      ranks: ``[1 + T, U]`` effective ranks, for the aligned model and after each
        domain; None for a row without a subspace.
      cap: K; required with ranks.
      removed: ``[S, T]`` shares in [0, 1].
      reference: ``[S', T]``, the accuracy of plain fine-tuning.

    Returns:
      Lists over the T domains: ``accuracy`` and, where given, ``rank``, ``used``,
      ``full``, ``removed`` and ``gap``; ``slope``, the least-squares change of each
      of them per domain; ``cap``.

    Raises:
      UserError: for shapes that do not fit the domains.

    >>> found = exhaustion("abc", [[90.0, 80.0, 70.0]], reference=[[90.0] * 3])
    >>> found["gap"], round(found["slope"]["gap"], 6)
    ([0.0, 10.0, 20.0], 10.0)
    """
    count = len(domains)
    rows = {"accuracy": _mean("accuracy", accuracy, count)}
    if ranks is not None:
        values = np.asarray(ranks, np.float64)
        if values.ndim != 2 or len(values) != 1 + count or not cap:
            raise UserError(
                f"exhaustion: expected ranks [{1 + count}, U] with their cap, got "
                f"shape {values.shape} and cap {cap}"
            )
        # Domain t uses the subspace found before it, so the last one is unused.
        before = values[:count]
        rows["rank"] = before.mean(1)
        rows["used"] = before.mean(1) / cap
        rows["full"] = (before >= cap).mean(1)
    if removed is not None:
        rows["removed"] = _mean("removed", removed, count)
    if reference is not None:
        rows["gap"] = _mean("reference", reference, count) - rows["accuracy"]
    slope = {
        name: float(np.polyfit(np.arange(count), row, 1)[0]) if count > 1 else None
        for name, row in rows.items()
    }
    return {
        "domains": list(domains),
        "cap": cap,
        **{name: row.tolist() for name, row in rows.items()},
        "slope": slope,
    }


def _mean(name: str, values: ArrayLike, count: int) -> np.ndarray:
    """Check values ``[S, T]`` and return their mean over seeds, ``[T]``."""
    found = np.asarray(values, np.float64)
    if found.ndim != 2 or found.shape[1] != count or not len(found):
        raise UserError(
            f"exhaustion: expected {name} [S, {count}] with at least one seed, got "
            f"shape {found.shape}; has every domain been evaluated?"
        )
    return found.mean(0)
