"""Adapts a trust region's ε to keep a measured divergence at a budget.

    d(θ) = mean over held-out calibration rows of KL(p_θ₀ ‖ p_θ)        measured
    ε ← ε · min(max(r, 1/4), 4),   r = (q(θ) / ε) · (budget / d(θ))

q is the trust region's second-order divergence. It is proportional to d only for small
steps in directions that it covers, so a budget of q is no budget of d. If d grows in
proportion to q, it meets its budget at q · budget / d. ε moves to this target, by at
most a factor of 4 at a time. If the region does not bind, changing ε changes neither q
nor d, so the target stays too and ε does not run away.

A quarter of the calibration set is held out: no step learns or ties its rows, and no
Fisher sees them. So d is not measured on rows that are held anyway. (A monitor's repair
replays the whole set, so d looks better after a repair than it should.)

Symbols: θ parameters, θ₀ the aligned model, d measured divergence in nats an answer
token, q second-order divergence, ε its budget.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh
from sbr_jax.data.batches import TokenDataset, take
from sbr_jax.methods._anchor import anchor_loss, anchored_set
from sbr_jax.methods.base import Method, Problem
from sbr_jax.typing import Batch, PyTree, UserError

EVERY = 4
"""One calibration row in this many is held out."""

MEASURED = 32
"""Most held-out rows to measure on."""

FACTOR = 4.0
"""Largest factor by which ε changes at once."""

RANGE = 1e8
"""Largest factor between ε and the budget of d, in either direction."""


def next_epsilon(
    epsilon: jax.Array, used: jax.Array, measured: jax.Array, budget: jax.Array
) -> jax.Array:
    """The ε at which d would meet its budget if d were proportional to q.

    ``used`` is the current q ≥ 0, ``measured`` the current d.

    **Guarantee**: the result is within a factor of 4 of ε, and of 1e8 of the budget. It
    is ε itself if nothing moved, if q is infinite, or if q or d is NaN.

    >>> float(next_epsilon(*map(jnp.float32, (2.0, 1.0, 0.5, 0.3))))
    0.6000000238418579
    """
    moved = (used > 0) & (measured > 0)
    ratio = jnp.where(moved, used, 1.0) / epsilon
    ratio = ratio * (budget / jnp.where(moved, measured, 1.0))
    found = epsilon * jnp.clip(ratio, 1.0 / FACTOR, FACTOR)
    found = jnp.clip(found, budget / RANGE, budget * RANGE)
    return jnp.where(moved & jnp.isfinite(ratio), found, epsilon)


def without_held_out(problem: Problem) -> Problem:
    """The problem without the held-out rows in its calibration set."""
    count = len(problem.calibration)
    kept = np.flatnonzero(np.arange(count) % EVERY != EVERY - 1)
    return dataclasses.replace(problem, calibration=take(problem.calibration, kept))


def held_out_rows(problem: Problem) -> TokenDataset:
    """Rows to measure on: evenly spaced among the held-out rows.

    Raises:
      UserError: for a calibration set of fewer than four rows.
    """
    count = len(problem.calibration)
    rows = np.arange(EVERY - 1, count, EVERY)
    if not len(rows):
        raise UserError(
            f"kl_budget: expected a calibration set of at least {EVERY} rows, one of "
            f"which is held out to measure on, got {count}"
        )
    spread = np.linspace(0, len(rows) - 1, min(MEASURED, len(rows)))
    return take(problem.calibration, rows[spread.round().astype(int)])


def first_state(problem: Problem, base: PyTree, budget: float) -> dict[str, Any]:
    """Held-out rows with the aligned model's states, the first ε, and d = 0.

    At θ₀, to second order, q is the mean divergence of whole answers. So the first ε is
    the budget per token times the mean number of tokens.
    """
    rows = held_out_rows(problem)
    held = anchored_set(dataclasses.replace(problem, calibration=rows), base, None)
    length = float(np.asarray(rows.mask)[:, 1:].sum(1).mean())
    return {
        "held": held,
        "epsilon": jnp.float32(budget * max(length, 1.0)),
        "measured": jnp.float32(0.0),
    }


def measure(problem: Problem, base: PyTree, adapter: PyTree, held: Batch) -> jax.Array:
    """The divergence d(θ) on held-out rows, a float32 scalar in nats a token."""
    with _mesh.using(_mesh.holding(base)):
        return _divergence(problem.apply_fn, base, adapter, held)


_divergence = jax.jit(anchor_loss, static_argnums=0)


def with_held_out(method: Method) -> Method:
    """A method that sees the calibration set without the held-out rows."""

    def reduced(hook: Any) -> Any:
        def seen(problem: Problem, *rest: Any) -> Any:
            return hook(without_held_out(problem), *rest)

        return seen

    names = ("init", "mix", "begin_domain", "gradient", "replay_gradient", "end_domain")
    names += ("refresh",) * (method.refresh is not None)
    hooks = {name: reduced(getattr(method, name)) for name in names}
    return dataclasses.replace(method, outline=reduced(method.state_shapes), **hooks)
