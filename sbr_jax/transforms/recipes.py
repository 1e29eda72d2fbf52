"""Two ready-made optimizers: project the gradient, or project the update.

Symbols: g task gradient, b bypass gradient, θ parameters, Π = U Uᵀ, P the relaxed
projection, m first moment, v second moment (hats: bias-corrected), C Adam's
preconditioner, η learning rate, ω weight decay, ε Adam's epsilon, U the subspace,
α relaxation coefficient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sbr_jax import checks
from sbr_jax.subspace import Subspace, project_onto
from sbr_jax.subspace.geometry import share_inside
from sbr_jax.subspace.spectrum import length_ratio
from sbr_jax.subspace.units import to_vector
from sbr_jax.transforms.bypass import add_bypass, matching_bypass
from sbr_jax.transforms.projection import mix, project_onto_complement, relaxed
from sbr_jax.transforms.state import RelaxedState, find_subspaces
from sbr_jax.typing import PyTree, UserError


def gradient_projection(
    subspace: Subspace,
    optimizer: optax.GradientTransformation,
    *,
    coefficients: PyTree = None,
    max_norm: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Project the task gradient, add the bypass, clip, then optimize (published).

    ``optimizer(clip(g − (1 − α) Π g + b))``.

    **Guarantee**: the optimizer's input has no component in the subspace except the
    share α of g and the bypass. The applied step may have one: Adam rescales each
    coordinate, its moments remember older subspaces, and weight decay is not projected.
    Use `update_projection` if the step itself has to stay out.

    Args:
        subspace: the subspace to stay out of; copied into the state.
        optimizer: e.g. ``optax.adamw(...)``.
        coefficients: α, one number or a tree of ``[*L]``; ``None`` is 0 (strict).
        max_norm: clip the global norm of the projected gradient plus bypass;
            ``None`` does not clip.

    Returns:
        A transformation whose ``update`` takes an optional ``bypass``.

    Raises:
        UserError: for a ``max_norm`` that is not above 0, or an ``optimizer`` that is
            not a transformation; from ``init``, if parameters or coefficients do not
            fit the subspace.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from sbr_jax import from_factors, gradient_projection
        >>> s = from_factors({"w": jnp.array([[3.0, 0.0]])}, max_rank=1)
        >>> tx = gradient_projection(s, optax.sgd(1.0), max_norm=None)
        >>> params = {"w": jnp.zeros(2)}
        >>> g, b = {"w": jnp.array([2.0, 5.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> tx.update(g, tx.init(params), params, bypass=b)[0]["w"].tolist()
        [-1.0, -5.0]

    References:
        arXiv:2604.17691
    """
    checks.transformation("optimizer", optimizer)
    if max_norm is not None:
        checks.number("max_norm", max_norm, above=0.0)
    return optax.chain(
        relaxed(project_onto_complement(subspace), coefficients),
        add_bypass(),
        optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm),
        optimizer,
    )


class UpdateProjectionState(NamedTuple):
    """State of `update_projection`: four moments and the projection.

    ``task`` and ``bypass`` are first moments of g and b. ``together`` is the second
    moment of g + b, ``apart`` that of the two parts separately, g² + b². They are mixed
    on use, so that a new α or subspace counts at once. ``task_share`` is
    ``‖Π u‖ / ‖u‖`` of the last step u without the part that was let past, if asked for.
    """

    count: jax.Array
    task: PyTree
    bypass: PyTree
    together: PyTree
    apart: PyTree
    projection: RelaxedState
    task_share: jax.Array | None = None


def update_projection(
    subspace: Subspace,
    learning_rate: optax.ScalarOrSchedule,
    *,
    metric: str = "adam",
    coefficients: PyTree = None,
    max_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    task_share: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose applied step, except for a bypass, stays out of the subspace.

    With Adam's preconditioner ``C = 1 / (√v̂ + ε)`` and ``P(u) = u − (1 − α) Q u``:

    - metric ``"adam"``: ``step = −η (P(C (m̂_g + m̂_b) + ω θ) + (1 − α) κ Π m̂_b)``,
      ``Q = C U (Uᵀ C U)⁻¹ Uᵀ`` (see `project_out`) and ``κ = ‖C m̂_b‖ / ‖m̂_b‖``. With
      α = 0 and no decay this is ``−η A (g − Π g + b)`` of the averaged gradients, with
      one symmetric positive matrix A. So it stops only where ``g − Π g + b = 0``.
    - metric ``"euclidean"``: ``step = −η (P(C m̂_g + ω θ) + C m̂_b)``, ``Q = Π``. This
      step stays out too, but need not descend: it stops where ``C g``, not g, lies in
      the subspace. It remains available to reproduce earlier measurements.

    Adam's first moment is linear in the gradient, so task and bypass each keep their
    own. Both share ``v = α v[g + b] + (1 − α)(v[g] + v[b])``, made of second moments of
    the clipped gradients, with α = 1 where a unit's subspace has rank 0. So parts that
    are applied together are scaled as their sum. Where g and b nearly cancel and the
    projection removes one of them, the other is not divided by their small sum. In
    Adam's metric, v is at least (1 − α) 1e-6 of its unit's mean, so that a coordinate
    with hardly any gradient does not move far to compensate for the others.

    **Guarantee**: with α = 0, ``‖Uᵀ(step − past)‖ ≤ 1e-7 ‖step‖`` for float32
    parameters, including momentum and weight decay, also right after
    `replace_subspace`, unless the subspace fills its unit. This holds for the update;
    adding it to θ rounds. ``past`` is the part that is let past: ``−η κ Π m̂_b`` in
    Adam's metric, ``−η C m̂_b`` in the Euclidean one. Projection never lengthens a step.
    Before projection, no coordinate of either part exceeds Adam's own bound (η for a
    steady gradient), however much g and b cancel, also right after α or the subspace
    changed.

    Where nothing is projected, this is AdamW of the clipped ``g + b``, except for the
    last digits of two moments that cancel. In the Euclidean metric without a bypass, it
    is ``chain(clip_by_global_norm, adamw, relaxed(project_onto_complement))``. Both
    hold to float32 rounding. The four moments (AdamW has two) are float32 whatever the
    parameters' dtype.

    Args:
        subspace: the subspace to stay out of; copied into the state.
        learning_rate: η, a number or a schedule.
        metric: metric of the projection, ``"adam"`` or ``"euclidean"``.
        coefficients: α, one number or a tree of ``[*L]``; ``None`` is 0 (strict).
        max_norm: clip the global norm of ``g + b``; ``None`` does not clip.
        b1: decay of the first moments.
        b2: decay of the second moments.
        eps: Adam's ε.
        weight_decay: ω, decoupled.
        task_share: record ``task_share`` in the state, see `UpdateProjectionState`; it
            costs one more product with the basis.

    Returns:
        A transformation whose ``update`` needs ``params`` and takes an optional
        ``bypass``, a tree like the updates.

    Raises:
        UserError: for a number out of range, or an unknown metric; from ``init``, if
            parameters or coefficients do not fit the subspace; from ``update``, if
            ``params`` are not given, trees do not fit, or a bypass is given inside
            ``optax.MultiSteps`` (see `multi_steps`).

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, update_projection
        >>> s = from_factors({"w": jnp.array([[3.0, 3.0]])}, max_rank=1)
        >>> params, g = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 3.0])}
        >>> for metric in ("adam", "euclidean"):
        ...     tx = update_projection(s, 0.5, metric=metric, weight_decay=0.0)
        ...     step, _ = tx.update(g, tx.init(params), params)
        ...     print(metric, (step["w"].round(4) + 0.0).tolist())
        adam [0.25, -0.25]
        euclidean [0.0, 0.0]

    References:
        arXiv:2604.17691; AdamW: arXiv:1711.05101
    """
    checks.one_of("metric", metric, ("adam", "euclidean"))
    checks.switch("task_share", task_share)
    checks.rate("learning_rate", learning_rate)
    if max_norm is not None:
        checks.number("max_norm", max_norm, above=0.0)
    for name, beta in (("b1", b1), ("b2", b2)):
        checks.number(name, beta, least=0.0, below=1.0)
    checks.number("eps", eps, above=0.0)
    checks.number("weight_decay", weight_decay, least=0.0)
    projection = relaxed(project_onto_complement(subspace), coefficients)

    def init(params: PyTree) -> Any:
        checks.floating_leaves("parameters", params)

        def zeros() -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)

        inner: Any = projection.init(params)
        count = jnp.zeros([], jnp.int32)
        moments = (zeros(), zeros(), zeros(), zeros())
        share = jnp.float32(0.0) if task_share else None
        return UpdateProjectionState(count, *moments, inner, share)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        bypass: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del extra
        if params is None:
            raise UserError(
                "expected params in update(updates, state, params), got None; "
                "weight decay needs them"
            )
        _check_trees(state.task, updates, params)
        task_grad, bypass_grad = _clipped(updates, bypass, max_norm)

        def moment(old: jax.Array, new: jax.Array) -> jax.Array:
            return b1 * old + (1 - b1) * new

        task = jax.tree.map(moment, state.task, task_grad)
        passed = jax.tree.map(moment, state.bypass, bypass_grad)
        together = jax.tree.map(
            lambda v, g, b: b2 * v + (1 - b2) * (g + b) ** 2,
            state.together,
            task_grad,
            bypass_grad,
        )
        apart = jax.tree.map(
            lambda v, g, b: b2 * v + (1 - b2) * (g**2 + b**2),
            state.apart,
            task_grad,
            bypass_grad,
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        fix1, fix2 = 1 - b1**steps, 1 - b2**steps
        rate: Any = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.count)
        least = _LEAST if metric == "adam" else 0.0
        second = _mixed(together, apart, state.projection, least)
        scale = jax.tree.map(lambda v: jnp.sqrt(v / fix2) + eps, second)

        def adam(m: jax.Array, d: jax.Array) -> jax.Array:
            return (m / fix1) / d

        projected = task
        extra = {}
        if metric == "adam":
            projected = jax.tree.map(jnp.add, task, passed)
            extra = {"preconditioner": jax.tree.map(lambda d: 1 / d, scale)}
        step = jax.tree.map(
            lambda m, d, p: -rate * (adam(m, d) + weight_decay * _f32(p)),
            projected,
            scale,
            params,
        )
        found: tuple[Any, Any] = projection.update(step, state.projection, **extra)
        step, inner = found
        share = None
        if task_share:
            share = share_inside(step, find_subspaces(inner)[0])
        past = jax.tree.map(adam, passed, scale)
        if metric == "adam":
            past = _inside(passed, past, state.projection)
        step = jax.tree.map(
            lambda s, x, u: (s - rate * x).astype(u.dtype), step, past, updates
        )
        moments = (task, passed, together, apart)
        return step, UpdateProjectionState(count, *moments, inner, share)

    return optax.GradientTransformationExtraArgs(init, update)


_LEAST = 1e-6
"""Least second moment of a coordinate, as a share of its unit's mean."""


def _mixed(
    together: PyTree, apart: PyTree, projection: RelaxedState, least: float
) -> PyTree:
    """``α v[g + b] + (1 − α)(v[g] + v[b])``, with α = 1 where a unit's rank is 0.

    The result is at least ``(1 − α) least`` of the unit's mean. v[g + b] alone would be
    near zero where g and b cancel. A projected g no longer cancels b there, and each
    would be divided by almost zero.
    """
    (subspace,) = find_subspaces(projection)
    mark = subspace.fingerprint
    joint, back = mark.match(together)
    parts = zip(
        mark.entries(subspace.basis),
        mark.entries(projection.coefficients),
        joint,
        mark.split(apart),
        strict=True,
    )
    out = []
    for basis, coefficient, x, y in parts:
        alpha = _share(basis, coefficient)
        unit = jax.tree.map(functools.partial(mix, alpha), y, x)
        if least and jax.tree.leaves(unit):
            mean = jnp.mean(to_vector(unit, mark.layer_axes), axis=-1)
            # An infinite mean sets no floor for the other coordinates.
            floor = jnp.where(jnp.isfinite(mean), (1 - alpha) * least * mean, 0.0)
            unit = jax.tree.map(lambda v, f=floor: jnp.maximum(v, _over(f, v)), unit)
        out.append(unit)
    return back(out)


def _inside(bypass: PyTree, step: PyTree, projection: RelaxedState) -> PyTree:
    """``(1 − α) κ Π b``: along b itself, scaled to the length of Adam's step of b."""
    (subspace,) = find_subspaces(projection)
    mark = subspace.fingerprint
    parts, back = mark.match(project_onto(bypass, subspace))
    others = (mark.split(bypass), mark.split(step))
    out = []
    for alpha, inside, *pair in zip(
        mark.entries(projection.coefficients), parts, *others, strict=True
    ):
        if jax.tree.leaves(inside):
            own, adams = (to_vector(x, mark.layer_axes) for x in pair)
            rate = (1 - alpha) * length_ratio(adams, own)
            inside = jax.tree.map(lambda x, r=rate: _over(r, x) * x, inside)
        out.append(inside)
    return back(out)


def _over(layers: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number per layer, ``[*L]``, shaped to broadcast over a leaf."""
    return layers.reshape(layers.shape + (1,) * (leaf.ndim - layers.ndim))


def _share(basis: jax.Array | None, alpha: jax.Array) -> jax.Array:
    """Share of a unit's parts applied together: α, or 1 if nothing is projected."""
    if basis is None:
        return jnp.ones_like(alpha)
    # Used columns come first, so the first one tells whether there are any.
    used = jnp.any(basis[..., 0] != 0, axis=-1)
    return jnp.where(used, alpha, 1.0)


def _check_trees(moment: PyTree, updates: PyTree, params: PyTree) -> None:
    """Refuse an ``update`` whose trees differ from those given to ``init``."""

    def look(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    wanted = look(moment)
    for what, tree in (("updates", updates), ("params", params)):
        checks.floating_leaves(what, tree)
        if look(tree) != wanted:
            raise UserError(
                f"expected {what} like the parameters of init, {wanted}, got "
                f"{look(tree)}"
            )


def _clipped(
    updates: PyTree, bypass: PyTree, max_norm: float | None
) -> tuple[PyTree, PyTree]:
    """Task gradient and bypass in float32, scaled so that their sum is clipped."""
    task = jax.tree.map(_f32, updates)
    if bypass is None:
        passed = jax.tree.map(jnp.zeros_like, task)
    else:
        passed = jax.tree.map(_f32, matching_bypass(updates, bypass))
    factor = clip_factor(task, passed, max_norm)
    return (
        jax.tree.map(lambda g: factor * g, task),
        jax.tree.map(lambda g: factor * g, passed),
    )


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def clip_factor(
    task: PyTree, bypass: PyTree, max_norm: float | None
) -> jax.Array | float:
    """Factor for both gradients that clips their sum to ``max_norm``."""
    if max_norm is None:
        return 1.0
    total = jax.tree.map(jnp.add, task, bypass)
    squares = [jnp.sum(g**2) for g in jax.tree.leaves(total)]
    norm = jnp.sqrt(sum(squares, start=jnp.float32(0.0)))
    return jnp.where(norm < max_norm, 1.0, max_norm / norm)
