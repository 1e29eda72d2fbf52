"""Optax transformations that keep updates out of a subspace.

Symbols: u update, V basis, Π = V Vᵀ, α relaxation coefficient per unit and layer
(0 projects fully, 1 not at all), λ strictness, F Fisher matrix, C preconditioner,
L layers, P parameters of a unit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sbr_jax import checks
from sbr_jax.subspace import Subspace, project_out
from sbr_jax.subspace.record import check_subspace
from sbr_jax.transforms.state import (
    RelaxedState,
    check_range,
    copy_arrays,
    expand_coefficients,
    find_subspaces,
)
from sbr_jax.typing import PyTree

NORMALISATIONS = ("none", "mean", "kind", "parameter")
"""Ways to normalise the traces that relaxation compares with 1/λ."""


class ProjectionState(NamedTuple):
    """State of `project_onto_complement`: the subspace, owned by the state."""

    subspace: Subspace


def project_onto_complement(
    subspace: Subspace,
) -> optax.GradientTransformationExtraArgs:
    """Remove the part of the updates inside a subspace: ``u ← u − V Vᵀ u``.

    Given ``preconditioner=``, a tree C like the updates, ``update`` projects in the
    metric ``C⁻¹`` (see `project_out`).

    **Guarantee**: ``‖Vᵀ u‖ ≤ 1e-6 ‖u‖`` afterwards in float32 (other dtypes add their
    own rounding). Before an adaptive optimizer, this holds for the optimizer's input,
    not for the applied step; `update_projection` bounds the applied step.

    Args:
        subspace: the subspace to stay out of. ``init`` copies it into the state, where
            `replace_subspace` may change it. Call ``init`` outside ``jit``; inside, the
            basis becomes a compiled constant.

    Returns:
        A transformation with the state `ProjectionState`.

    Raises:
        UserError: from ``init``, if the parameters do not match the subspace or are not
            floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, project_onto_complement
        >>> params = {"w": jnp.zeros(2)}
        >>> s = from_factors({"w": jnp.array([[3.0, 0.0]])}, max_rank=1)
        >>> tx = project_onto_complement(s)
        >>> updates, _ = tx.update({"w": jnp.array([2.0, 5.0])}, tx.init(params))
        >>> updates["w"].tolist()
        [0.0, 5.0]

    References:
        arXiv:2604.17691
    """
    check_subspace("subspace", subspace)

    def init(params: PyTree) -> Any:
        subspace.fingerprint.split(params, what="parameters")
        return ProjectionState(copy_arrays(subspace))

    def update(
        updates: PyTree,
        state: Any,
        params: Any = None,
        *,
        preconditioner: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del params, extra
        return project_out(updates, state.subspace, preconditioner), state

    return optax.GradientTransformationExtraArgs(init, update)


def relaxed(
    inner: optax.GradientTransformation, coefficients: PyTree = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Mix a transformation with the identity: ``u ← (1 − α) inner(u) + α u``.

    If ``inner`` is a projection, this is ``u − (1 − α) Π u``.

    **Guarantee**: α = 0 gives exactly ``inner(u)``, and α = 1 exactly ``u``. The result
    is linear in u if ``inner`` is.

    Args:
        inner: the transformation to relax.
        coefficients: α, one number or a tree with one entry of shape ``[*L]`` per unit
            (or one per subtree, if ``inner`` holds no subspace). The state holds them;
            `replace_subspace` changes them.

    Returns:
        A transformation with the state `RelaxedState`.

    Raises:
        UserError: for coefficients outside [0, 1]; from ``init``, if they do not fit
            the units.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, project_onto_complement, relaxed
        >>> s = from_factors({"w": jnp.array([[3.0, 0.0]])}, max_rank=1)
        >>> tx = relaxed(project_onto_complement(s), 0.25)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> tx.update({"w": jnp.array([2.0, 5.0])}, state)[0]["w"].tolist()
        [0.5, 5.0]

    References:
        arXiv:2604.17691
    """
    checks.transformation("inner", inner)
    check_range(coefficients)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        checks.floating_leaves("parameters", params)
        inner_state = wrapped.init(params)
        found = find_subspaces(inner_state)
        alpha = expand_coefficients(coefficients, found[0] if found else None)
        return RelaxedState(inner_state, alpha)

    def update(
        updates: PyTree, state: Any, params: Any = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        inside, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra
        )
        held = find_subspaces(state.inner_state)
        if held:
            mark = held[0].fingerprint
            entries = mark.entries(state.coefficients)
            insides, back = mark.match(inside)
            wholes = mark.split(updates)
        else:  # one entry for each subtree that has a coefficient
            entries, treedef = jax.tree.flatten(
                state.coefficients, is_leaf=lambda x: x is None
            )
            insides, back = treedef.flatten_up_to(inside), treedef.unflatten
            wholes = treedef.flatten_up_to(updates)
        mixed = [
            jax.tree.map(lambda i, u, a=a: mix(a, i, u), x, y)
            for a, x, y in zip(entries, insides, wholes, strict=True)
        ]
        return back(mixed), RelaxedState(inner_state, state.coefficients)

    return optax.GradientTransformationExtraArgs(init, update)


def mix(alpha: jax.Array | None, inside: jax.Array, update: jax.Array) -> jax.Array:
    """``(1 − α) inside + α update``, with α ``[*L]`` over the leading axes.

    An operand with weight 0 does not count, even if it is infinite or NaN.
    """
    if alpha is None:
        return inside

    def part(weight: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(weight.dtype)
        # 0 · inf is NaN. Finite numbers are multiplied, which keeps the sign of zero.
        return weight * jnp.where((weight == 0) & ~jnp.isfinite(x), 0.0, x)

    a = alpha.reshape(alpha.shape + (1,) * (update.ndim - alpha.ndim))
    # Not inside + α (update − inside), which is not exact at α = 1.
    return (part(1.0 - a, inside) + part(a, update)).astype(inside.dtype)


def fisher_relaxation(
    subspace: Subspace, strictness: float = 0.5, normalisation: str = "none"
) -> PyTree:
    """Relaxation coefficients from Fisher traces: ``α = max(0, 1 − λ t)``.

    A large trace (a sensitive layer) gives α = 0, full projection. The published t is
    ``tr F``. It depends on how the loss is averaged, on LoRA's rank and on the width,
    so α saturates easily; ``normalisation`` offers three alternatives.

    Args:
        subspace: the subspace whose traces to use.
        strictness: λ; 0.5 is published.
        normalisation: ``"none"`` for t = tr F; ``"mean"`` for tr F divided by its mean
            over all units and layers; ``"kind"`` for tr F divided by its mean over the
            layers of the same unit, so that no kind of projection switches another off;
            ``"parameter"`` for t = tr F / P.

    Returns:
        Tree of α in [0, 1], entries ``[*L]``, one per unit.

    Raises:
        UserError: for an unknown normalisation, or a strictness that is not a finite
            number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import fisher_relaxation, from_factors
        >>> s = from_factors({"a": jnp.ones((1, 1)), "b": jnp.ones((1, 4))}, max_rank=1)
        >>> {k: float(v) for k, v in fisher_relaxation(s, strictness=0.5).items()}
        {'a': 0.5, 'b': 0.0}

    References:
        arXiv:2604.17691
    """
    check_subspace("subspace", subspace)
    checks.number("strictness", strictness, least=0.0)
    checks.one_of("normalisation", normalisation, NORMALISATIONS)
    mark = subspace.fingerprint
    traces = mark.entries(subspace.trace)
    known = [t for t in traces if t is not None]
    if normalisation == "none":
        scales = [1.0] * len(traces)
    elif normalisation == "mean":
        count = sum(t.size for t in known)
        mean = sum(jnp.sum(t) for t in known) / max(count, 1)
        scales = [jnp.where(mean > 0, mean, 1.0)] * len(traces)
    elif normalisation == "kind":
        means = [None if t is None else jnp.mean(t) for t in traces]
        scales = [1.0 if m is None else jnp.where(m > 0, m, 1.0) for m in means]
    else:
        scales = [float(u.size(mark.layer_axes)) for u in mark.units]
    pairs = zip(traces, scales, strict=True)
    return mark.join(
        [
            None if t is None else jnp.clip(1.0 - strictness * t / s, 0.0, 1.0)
            for t, s in pairs
        ]
    )
