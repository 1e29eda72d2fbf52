"""Combinations of defences: add penalties, risk weights or state to a method.

A *pull* is a penalty whose gradient no projection may touch. If the method projects
(its state holds a subspace), the pull skips the projection as ``bypass``. Otherwise it
is added to the gradient. So a combination takes one line::

    method = with_pull(safeanchor_exact(), "anchors", init, loss)

Symbols: α, β weights of the task and of the reference, B examples of a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax.methods.base import (
    Found,
    Init,
    Method,
    Mix,
    Outline,
    Problem,
    traced_state,
)
from sbr_jax.models import answers
from sbr_jax.typing import Batch, PyTree

Penalty = Callable[[Problem, PyTree, PyTree, Any, Batch, jax.Array], jax.Array]
"""``(problem, base, adapter, state, batch, key) -> scalar``; ``state`` is its own."""


@dataclasses.dataclass(frozen=True)
class Rater:
    """Source of the risk of examples.

    Attributes:
      init: makes its state; ``"diagnostics"`` is reported.
      mix: called before each domain, like ``Method.mix``.
      assess: ``(problem, base, state, batch) -> (reference states [K, D], risk [B])``
        in one pass of the aligned model.
      ratings: how often the study's judge rates every example of a domain.
      outline: shapes of what ``init`` returns; None if tracing it gives them.
    """

    init: Init
    mix: Mix
    assess: Callable[[Problem, PyTree, Any, Batch], tuple[jax.Array, jax.Array]]
    ratings: int = 0
    outline: Outline | None = None


def with_gradients(
    method: Method, change: Callable[[Callable[..., Found]], Callable[..., Found]]
) -> Method:
    """Change both gradients of a method, the step's and the repair's."""
    return dataclasses.replace(
        method,
        gradient=change(method.gradient),
        replay_gradient=change(method.replay_gradient),
    )


def with_cost(method: Method, **more: float) -> Method:
    """Add to the numbers in a method's cost."""
    raised = {name: getattr(method.cost, name) + value for name, value in more.items()}
    return dataclasses.replace(method, cost=dataclasses.replace(method.cost, **raised))


def with_pull(
    method: Method,
    name: str,
    init: Init,
    loss: Penalty,
    *,
    weight: float = 1.0,
    repairs: bool = True,
) -> Method:
    """Add ``weight`` times a penalty to every step of a method.

    **Guarantee**: the method's own gradient, projection and hooks stay as they are.

    Args:
      method: any defence.
      name: key of the penalty's state, and of its unweighted value in the metrics.
      init: makes the penalty's state.
      loss: computes the penalty from that state.
      weight: factor of the penalty's gradient.
      repairs: whether repairs get the penalty too.
    """

    def pulled(hook: Callable[..., Found]) -> Callable[..., Found]:
        def gradient(problem, base, adapter, state, batch, *rest):
            found = hook(problem, base, adapter, state, batch, *rest)
            value, pull = jax.value_and_grad(
                lambda a: loss(problem, base, a, state[name], batch, rest[-1])
            )(adapter)
            if weight != 1.0:
                pull = jax.tree.map(lambda p: weight * p, pull)
            return _bypassed(found, pull, state, {name: value})

        return gradient

    held = with_state(method, name, init)
    if repairs:
        return with_gradients(held, pulled)
    return dataclasses.replace(held, gradient=pulled(held.gradient))


def with_risk(
    method: Method,
    rater: Rater,
    weighting: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Method:
    """Make a method risk-adaptive, example by example.

    The task loss becomes mean_i α_i NLL_i. A pull, mean_i β_i KL(p_ref ‖ p_θ)_i, draws
    the model towards the aligned one and skips any projection.

    Args:
      method: any defence whose task loss is ``base.task_loss``.
      rater: rates the examples.
      weighting: ``risk [B] -> (α [B], β [B])``.

    References:
      arXiv:2602.17546
    """

    def mix(problem, domain, seed):
        return rater.mix(problem, method.mix(problem, domain, seed), seed)

    def weighted(hook: Callable[..., Found]) -> Callable[..., Found]:
        def gradient(problem, base, adapter, state, batch, *rest):
            reference, risk = rater.assess(problem, base, state["risk"], batch)
            alpha, beta = weighting(risk)
            heavy = {**batch, "weight": alpha}
            found = hook(problem, base, adapter, state, heavy, *rest)

            def kl(a):
                hidden = answers.states(problem.apply_fn, base, a, batch)
                each = answers.kl_to_reference(
                    problem.apply_fn, base, reference, hidden, answers.find(batch)
                )
                return jnp.mean(beta * each)

            value, pull = jax.value_and_grad(kl)(adapter)
            return _bypassed(
                found, pull, state, {"risk": jnp.mean(risk), "risk_kl": value}
            )

        return gradient

    rated = with_state(method, "risk", rater.init, rater.outline)
    rated = dataclasses.replace(rated, mix=mix)
    rated = with_gradients(rated, weighted)
    return with_cost(rated, forward=1.0, backward=1.0, ratings=rater.ratings)


def with_state(
    method: Method, name: str, init: Init, outline: Outline | None = None
) -> Method:
    """Store a part's state under ``name`` in a method's; diagnostics are merged."""

    def start(problem, base, adapter, key):
        state = method.init(problem, base, adapter, key)
        own = dict(init(problem, base, adapter, key))
        diagnostics = {**state.get("diagnostics", {}), **own.pop("diagnostics", {})}
        joined = {**state, name: own}
        return {**joined, "diagnostics": diagnostics} if diagnostics else joined

    def outlined(problem, base, adapter):
        if outline is None:
            own = traced_state(init, problem, base, adapter)
        else:
            own = outline(problem, base, adapter)
        return {**method.state_shapes(problem, base, adapter), name: own}

    return dataclasses.replace(method, init=start, outline=outlined)


def _bypassed(found: Found, pull: PyTree, state: Mapping, metrics: Mapping) -> Found:
    """A hook's result with a pull added where no projection touches it."""
    grads, extra, known = found
    metrics = {**known, **metrics}
    if "subspace" not in state:
        return jax.tree.map(jnp.add, grads, pull), extra, metrics
    if "bypass" in extra:
        pull = jax.tree.map(jnp.add, extra["bypass"], pull)
    return grads, {**extra, "bypass": pull}, metrics
