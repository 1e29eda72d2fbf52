"""The bypass: a second gradient that skips the projection.

Symbols: u update, g task gradient, b bypass gradient, k micro-steps per step.
"""

import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sbr_jax import checks
from sbr_jax.typing import PyTree, UserError


def add_bypass() -> optax.GradientTransformationExtraArgs:
    """Add the keyword gradient ``bypass`` to the updates: ``u ← u + bypass``.

    Place it after a projection to let one gradient (an anchor's) skip that projection.

    **Guarantee**: without ``bypass=``, or with ``None``, updates pass unchanged. Inside
    ``optax.MultiSteps`` a bypass is refused, because ``optax.MultiSteps`` passes on the
    last micro-step's bypass only. Use `multi_steps`, which averages the bypass.

    Returns:
        A stateless transformation whose ``update`` takes ``bypass``, a tree like the
        updates.

    Raises:
        UserError: from ``init``, for parameters that are not floating-point; from
            ``update``, for a bypass of another structure or shape, or a bypass inside
            ``optax.MultiSteps``.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import add_bypass
        >>> tx = add_bypass()
        >>> u = jnp.array([1.0, 2.0])
        >>> tx.update(u, tx.init(u), bypass=jnp.array([0.5, 0.0]))[0].tolist()
        [1.5, 2.0]

    References:
        arXiv:2604.17691
    """

    def init(params: PyTree) -> Any:
        checks.floating_leaves("parameters", params)
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: Any,
        params: Any = None,
        *,
        bypass: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del params, extra
        if bypass is None:
            return updates, state
        passed = matching_bypass(updates, bypass)
        return jax.tree.map(lambda u, b: u + b.astype(u.dtype), updates, passed), state

    return optax.GradientTransformationExtraArgs(init, update)


def multi_steps(
    inner: optax.GradientTransformation, every_k_schedule: Any, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Accumulate like ``optax.MultiSteps``, but average the bypass too.

    ``optax.MultiSteps`` averages g over k micro-steps, but takes every other argument
    from the last micro-step. Of k bypasses, only the last would count.

    **Guarantee**: the k-th ``update`` is that of ``inner`` with the means of g and of b
    (their sums with ``use_grad_mean=False``). A micro-step without a bypass counts as
    b = 0. All other updates return zeros. A ``should_skip_update_fn`` sees g + b.

    Args:
        inner: an optimizer whose ``update`` takes ``bypass``.
        every_k_schedule: k, or a function from the step to k.
        **options: other arguments of ``optax.MultiSteps``.

    Returns:
        A transformation with the state ``optax.MultiStepsState``.

    Raises:
        UserError: for a k below 1, an unknown option, or an ``inner`` that is not a
            transformation; from ``init``, for parameters that are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import add_bypass, multi_steps
        >>> tx = multi_steps(add_bypass(), 2)
        >>> u = jnp.zeros(1)
        >>> state = tx.init(u)
        >>> _, state = tx.update(u, state, bypass=jnp.array([1.0]))
        >>> tx.update(u, state, bypass=jnp.array([3.0]))[0].tolist()
        [2.0]
    """
    checks.transformation("inner", inner)
    if not checks.is_function(every_k_schedule):
        every_k_schedule = checks.whole("every_k_schedule", every_k_schedule)
    _, _, *known = inspect.signature(optax.MultiSteps).parameters
    for option in options:
        checks.one_of("the option", option, known)
    wrapped = optax.with_extra_args_support(inner)

    def init_both(params: PyTree) -> Any:
        return wrapped.init(params["task"])

    def update_both(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        own = None if params is None else params["task"]
        task, passed = updates["task"], updates["bypass"]
        step, state = _update(wrapped, task, state, own, passed, extra)
        return {"task": step, "bypass": optax.tree.zeros_like(passed)}, state

    skip = options.get("should_skip_update_fn")
    if skip is not None:

        def skip_sum(pair: PyTree, step: jax.Array, params: PyTree) -> Any:
            total = jax.tree.map(jnp.add, pair["task"], pair["bypass"])
            return skip(total, step, None if params is None else params["task"])

        options["should_skip_update_fn"] = skip_sum
    both = optax.MultiSteps(
        optax.GradientTransformationExtraArgs(init_both, update_both),
        every_k_schedule,
        **options,
    )

    def init(params: PyTree) -> Any:
        checks.floating_leaves("parameters", params)
        return both.init({"task": params, "bypass": params})

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        bypass: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        if bypass is None:
            bypass = optax.tree.zeros_like(updates)
        pair = {"task": updates, "bypass": matching_bypass(updates, bypass)}
        own = None if params is None else {"task": params, "bypass": params}
        # Optax counts in int32 and divides floats by it.
        with jax.numpy_dtype_promotion("standard"):
            found: tuple[Any, Any] = both.update(pair, state, own, **extra)
        step, state = found
        return step["task"], state

    return optax.GradientTransformationExtraArgs(init, update)


def _update(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: Any,
    params: PyTree,
    bypass: PyTree,
    extra: dict[str, Any],
) -> tuple[PyTree, Any]:
    """Call ``inner`` with averages; `_refuse_last_bypass` looks for this frame."""
    return inner.update(updates, state, params, bypass=bypass, **extra)


def is_masked(node: Any) -> bool:
    """Whether a node is the placeholder that ``optax.masked`` leaves."""
    return isinstance(node, optax.MaskedNode)


def matching_bypass(updates: PyTree, bypass: PyTree) -> PyTree:
    """The bypass, with masked nodes wherever the updates have them.

    Raises:
        UserError: for a tree of another structure, a leaf of another shape, or a call
            inside ``optax.MultiSteps``.
    """
    _refuse_last_bypass()

    def one(u: Any, b: Any) -> Any:
        if is_masked(u):
            return u
        inner = jax.tree.structure(b)
        leaf = jax.tree_util.treedef_is_leaf(inner)
        if not leaf or jnp.shape(b) != jnp.shape(u):
            got = jnp.shape(b) if leaf else inner
            raise UserError(
                f"bypass: expected the updates' shape {jnp.shape(u)}, got {got}; "
                "pass a gradient with respect to the same parameters"
            )
        checks.floating("bypass", "", b)
        return jnp.asarray(b)

    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_masked)
    try:
        parts = treedef.flatten_up_to(bypass)
    except ValueError as error:
        raise UserError(
            f"bypass: expected a tree like the updates, {treedef}, got "
            f"{jax.tree.structure(bypass)}; pass a gradient with respect to the same "
            "parameters"
        ) from error
    return treedef.unflatten([one(u, b) for u, b in zip(leaves, parts, strict=True)])


def _refuse_last_bypass() -> None:
    """Refuse a bypass inside ``optax.MultiSteps``, which keeps only the last one.

    Optax does not tell the inner ``update`` that it accumulates, so this function walks
    up the call stack. It runs only where a bypass is given, and once per trace.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _update.__code__:
        if frame.f_code is optax.MultiSteps.update.__code__:
            raise UserError(
                "expected no bypass inside optax.MultiSteps, which hands on the last "
                "micro-step's alone; use sbr_jax.multi_steps, which averages it"
            )
        frame = frame.f_back
