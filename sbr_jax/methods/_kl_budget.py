"""Keeping a measured divergence at a budget by adapting a trust region's ε.

    d(θ) = mean over held-out calibration rows of KL(p_θ₀ ‖ p_θ)        measured
    ε ← ε · min(max(r, 1/4), 4),   r = (q(θ) / ε) · (budget / d(θ))

q is the trust region's second-order divergence: proportional to d for small steps in
directions that it covers, and no more than that, so its budget ε is not d's. Where d
grows in proportion to q, q · budget / d is the q at which d meets the budget; ε goes
there, by a factor of 4 at most at a time. Where the region does not bind, q and d stay
as they are and so does that target: ε does not run away.

A quarter of the calibration set is held out: no step learns or ties a row of it and no
Fisher has one, so that d is not the divergence on what is held anyway. (A repair of the
monitor replays the whole set; after one, d is flattered.)

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
"""One calibration row in so many is held out."""

MEASURED = 32
"""Held-out rows that are measured, at most."""

FACTOR = 4.0
"""By which ε changes at most, at once."""

RANGE = 1e8
"""Between ε and the budget of d, at most, either way."""


def next_epsilon(
    epsilon: jax.Array, used: jax.Array, measured: jax.Array, budget: jax.Array
) -> jax.Array:
    """The ε at which d would meet its budget, were it proportional to q.

    ``used`` is q ≥ 0 now, ``measured`` d now.

    **Guarantee**: within a factor of 4 of ε, and of 1e8 of the budget; ε itself where
    nothing moved, or where the numbers tell nothing (q infinite, either not a number).

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
    """The problem whose calibration set has the rows that are not held out."""
    count = len(problem.calibration)
    kept = np.flatnonzero(np.arange(count) % EVERY != EVERY - 1)
    return dataclasses.replace(problem, calibration=take(problem.calibration, kept))


def held_out_rows(problem: Problem) -> TokenDataset:
    """Rows to measure on: evenly spaced ones of those that are held out.

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
    """Held-out rows with the aligned model's states, the first ε, and no divergence.

    At θ₀, to second order, the mean divergence of whole answers is q: the first ε is
    the budget of a token times the mean number of tokens.
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
    """A method that sees the calibration set without the rows that are held out."""

    def reduced(hook: Any) -> Any:
        def seen(problem: Problem, *rest: Any) -> Any:
            return hook(without_held_out(problem), *rest)

        return seen

    names = ("init", "mix", "begin_domain", "gradient", "replay_gradient", "end_domain")
    names += ("refresh",) * (method.refresh is not None)
    hooks = {name: reduced(getattr(method, name)) for name in names}
    return dataclasses.replace(method, outline=reduced(method.state_shapes), **hooks)
