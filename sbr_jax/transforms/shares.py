"""Share of a step's task part that lies inside a subspace.

Adam's first moment is linear in the gradient. With the task gradient g and the bypass
gradient b, ``m = m_g + m_b``, and both parts are divided by the same ``√v̂ + ε``. So
the step is a task part plus a bypass part, and the task part can be measured alone. The
share of the whole step would mostly show what the bypass did.

Symbols: g task gradient, b bypass gradient, m first moment, v second moment (hats:
bias-corrected), Π projection onto the subspace, V its basis, θ parameters, ω weight
decay, η learning rate, ε Adam's epsilon, P projection that leaves α inside.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sbr_jax.subspace import Subspace
from sbr_jax.subspace.geometry import share_inside
from sbr_jax.transforms.projection import project_onto_complement, relaxed
from sbr_jax.transforms.recipes import (
    UpdateProjectionState,
    clip_factor,
    gradient_projection,
)
from sbr_jax.transforms.state import find_subspaces
from sbr_jax.typing import PyTree

B1, B2, EPS = 0.9, 0.999, 1e-8
"""Defaults of ``optax.adamw``."""


class TaskShareState(NamedTuple):
    """State of `adamw_gradient_projection`.

    It adds the bypass's first moment and the task's share to the inner state.
    """

    inner_state: Any
    bypass: PyTree
    task_share: jax.Array


def adamw_gradient_projection(
    subspace: Subspace,
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficients: PyTree = None,
    max_norm: float | None = 1.0,
    weight_decay: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """Project the gradient before AdamW and record the task's share inside.

    The task part of the step is ``−η ((m̂ − m̂_b) / (√v̂ + ε) + ω θ)``, where m_b is
    the first moment of the clipped bypass alone. The state holds the share of this part
    inside the subspace (`read_task_share`).

    **Guarantee**: the step is that of ``gradient_projection(subspace, adamw)``.

    Args:
        subspace: the subspace to stay out of; copied into the state.
        learning_rate: η.
        coefficients: α, one number or a tree of ``[*L]``; ``None`` is 0.
        max_norm: clip the global norm of the projected gradient plus bypass.
        weight_decay: ω.

    Returns:
        A transformation whose ``update`` needs ``params`` and takes an optional
        ``bypass``.

    Raises:
        UserError: as `gradient_projection`.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors
        >>> s = from_factors({"w": jnp.array([[3.0, 4.0]])}, max_rank=1)
        >>> tx = adamw_gradient_projection(s, 0.1)
        >>> params, g = {"w": jnp.zeros(2)}, {"w": jnp.array([4.0, 3.0])}
        >>> _, state = tx.update(g, tx.init(params), params)
        >>> round(float(read_task_share(state)), 3)  # of Adam's (1, −1)
        0.141
    """
    inner = gradient_projection(
        subspace,
        optax.adamw(learning_rate, b1=B1, b2=B2, eps=EPS, weight_decay=weight_decay),
        coefficients=coefficients,
        max_norm=max_norm,
    )
    projection = relaxed(project_onto_complement(subspace), coefficients)

    def init(params: PyTree) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return TaskShareState(inner.init(params), zeros, jnp.float32(0.0))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        bypass: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        # Optax counts in int32 and raises floats to it.
        with jax.numpy_dtype_promotion("standard"):
            found: tuple[Any, Any] = inner.update(
                updates, state.inner_state, params, bypass=bypass, **extra
            )
        step, after = found
        passed = jax.tree.map(lambda m: B1 * m, state.bypass)
        if bypass is not None:
            # `inner` computes the same product; compiled, it is computed only once.
            kept, _ = projection.update(updates, state.inner_state[0])
            factor = clip_factor(kept, bypass, max_norm)
            passed = jax.tree.map(
                lambda m, b: m + (1 - B1) * factor * b.astype(m.dtype), passed, bypass
            )
        (adam,) = _find(after, optax.ScaleByAdamState)
        count = adam.count.astype(jnp.float32)
        fix1, fix2 = 1 - B1**count, 1 - B2**count
        task = jax.tree.map(
            lambda m, b, v, p: (
                (m - b) / fix1 / (jnp.sqrt(v / fix2) + EPS) + weight_decay * p
            ),
            adam.mu,
            passed,
            adam.nu,
            params,
        )
        (own,) = find_subspaces(state.inner_state)
        return step, TaskShareState(after, passed, share_inside(task, own))

    return optax.GradientTransformationExtraArgs(init, update)


def read_task_share(opt_state: PyTree) -> jax.Array | None:
    """Share of the last step's task part inside the subspace; None if not recorded.

    Args:
        opt_state: state of any optimizer, however nested.
    """
    found = _find(opt_state, UpdateProjectionState, TaskShareState)
    kept = [state.task_share for state in found if state.task_share is not None]
    return kept[0] if kept else None


def _find(state: PyTree, *kinds: type) -> list[Any]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]
