"""Reading and replacing a subspace inside any optimizer state.

Symbols: α relaxation coefficient, L layers, K columns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import checks
from sbr_jax.subspace import Subspace
from sbr_jax.subspace.record import check_subspace, same_parameters
from sbr_jax.typing import PyTree, UserError


class RelaxedState(NamedTuple):
    """State of `relaxed`: the inner state and α, one float32 entry per unit."""

    inner_state: Any
    coefficients: PyTree


def _is_ours(node: Any) -> bool:
    return isinstance(node, Subspace | RelaxedState)


def find_subspaces(state: PyTree) -> list[Subspace]:
    """All subspaces in a state, in flatten order."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Subspace))
    return [leaf for leaf in leaves if isinstance(leaf, Subspace)]


def copy_arrays(tree: PyTree) -> PyTree:
    """Copy arrays, so that donating the state leaves the caller's arrays alive.

    A shape without values becomes zeros, which `replace_subspace` fills later.
    """

    def copy(x: Any) -> jax.Array:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.array(x, copy=True)

    return jax.tree.map(copy, tree)


def expand_coefficients(coefficients: PyTree, subspace: Subspace | None) -> PyTree:
    """Coefficients as float32 arrays, one ``[*L]`` per unit where units are known."""
    if coefficients is None:
        coefficients = 0.0
    check_range(coefficients)
    if subspace is None:
        return jax.tree.map(lambda x: _float32(x, jnp.shape(x)), coefficients)
    mark = subspace.fingerprint
    shapes = [u.layers(mark.layer_axes) for u in mark.units]
    if _is_number(coefficients):
        entries: list[Any] = [coefficients] * len(shapes)
    else:
        try:
            entries = mark.entries(coefficients)
        except ValueError as error:
            raise UserError(
                "expected coefficients that are one number, or a tree with one entry "
                f"for each of the units {[u.path for u in mark.units]}, got "
                f"{jax.tree.structure(coefficients)}"
            ) from error
    out = []
    for spec, entry, shape in zip(mark.units, entries, shapes, strict=True):
        if entry is not None and jnp.shape(entry) not in ((), shape):
            raise UserError(
                f"expected a coefficient of shape {shape} at {spec.path or '/'}, got "
                f"{jnp.shape(entry)}; give one number for each layer"
            )
        out.append(_float32(0.0 if entry is None else entry, shape))
    return mark.join(out)


def check_range(coefficients: PyTree) -> None:
    """Refuse known α outside [0, 1]; above 1 it would magnify the part inside."""
    for leaf in jax.tree.leaves(coefficients):
        # Traced arrays, and arrays that span hosts, have no values to check here.
        if checks.is_traced(leaf) or not getattr(leaf, "is_fully_addressable", True):
            continue
        values = np.asarray(leaf)
        numeric = any(jnp.issubdtype(values.dtype, t) for t in _REAL)
        if not numeric or not np.all((values >= 0) & (values <= 1)):
            raise UserError(
                "expected coefficients from 0 to 1, got "
                f"{values.tolist() if numeric else checks.shown(leaf)}: "
                "0 projects strictly, 1 not at all"
            )


_REAL = (jnp.floating, jnp.integer)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (hasattr(x, "dtype") and jnp.ndim(x) == 0)


def _float32(x: Any, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.array(x, dtype=jnp.float32, copy=True)
    return jnp.full(shape, array) if array.shape != shape else array


def read_subspace(opt_state: PyTree) -> Subspace:
    """Return the (first) subspace that an optimizer state holds.

    Args:
        opt_state: state of any optimizer built with a projection, however nested.

    Returns:
        The `Subspace`, not copied.

    Raises:
        UserError: if the state holds none.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from sbr_jax import empty_subspace, gradient_projection, read_subspace
        >>> params = {"w": jnp.zeros(3)}
        >>> s = empty_subspace(params, max_rank=2)
        >>> state = gradient_projection(s, optax.sgd(0.1)).init(params)
        >>> read_subspace(state).basis["w"].shape
        (3, 2)
    """
    found = find_subspaces(opt_state)
    if not found:
        raise UserError(
            "expected an optimizer state that holds a subspace, got one without; build "
            "the optimizer with gradient_projection or update_projection"
        )
    return found[0]


def replace_subspace(
    opt_state: PyTree, subspace: Subspace, coefficients: PyTree = None
) -> PyTree:
    """Put another subspace (and α) into an optimizer state; the rest stays.

    **Guarantee**: pure; shapes, dtypes and structure do not change, so a compiled step
    is not traced again. The state gets copies. Works through ``chain``, ``masked``,
    ``MultiSteps`` and ``inject_hyperparams``. With bfloat16 parameters,
    ``inject_hyperparams`` needs ``hyperparam_dtype=jnp.float32``, because in bfloat16
    Adam's b2 rounds to 1. Change α here; do not inject it.

    Args:
        opt_state: state of an optimizer built with a projection, however nested.
        subspace: the new subspace, for the same parameters and with the same K.
        coefficients: new α (one number or a tree of ``[*L]``); ``None`` keeps the old.

    Returns:
        The new state.

    Raises:
        UserError: if the state holds no subspace, if coefficients are given and the
            state holds none, or if the new subspace has other parameters, another K or
            other covered units.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from sbr_jax import empty_subspace, from_factors, gradient_projection
        >>> from sbr_jax import read_subspace, replace_subspace
        >>> params = {"w": jnp.zeros(3)}
        >>> tx = gradient_projection(empty_subspace(params, max_rank=2), optax.sgd(0.1))
        >>> new = from_factors({"w": jnp.eye(3)[:1]}, max_rank=2)
        >>> state = replace_subspace(tx.init(params), new)
        >>> read_subspace(state).eigenvalues["w"].tolist()
        [1.0, 0.0]

    References:
        arXiv:2604.17691
    """
    read_subspace(opt_state)  # raises where there is none
    check_subspace("subspace", subspace)
    for old in find_subspaces(opt_state):
        _check_same(old, subspace)
    given = coefficients is not None
    places = 0

    def put(node: Any) -> Any:
        nonlocal places
        if isinstance(node, Subspace):
            new = same_parameters(node, subspace)
            fields = ("basis", "eigenvalues", "trace")
            return dataclasses.replace(
                node,
                **{f: _filled(node, getattr(node, f), getattr(new, f)) for f in fields},
            )
        if isinstance(node, RelaxedState):
            inner = jax.tree.map(put, node.inner_state, is_leaf=_is_ours)
            alpha = node.coefficients
            held = find_subspaces(node.inner_state)
            if given and held:
                places += 1
                fresh = expand_coefficients(coefficients, held[0])
                alpha = _filled(held[0], alpha, fresh)
            return RelaxedState(inner, alpha)
        return node

    state = jax.tree.map(put, opt_state, is_leaf=_is_ours)
    if given and not places:
        raise UserError(
            "expected an optimizer state with relaxation coefficients, got one "
            "without; wrap the projection in relaxed(...)"
        )
    return state


def _filled(subspace: Subspace, old: PyTree, new: PyTree) -> PyTree:
    """A tree with the containers of ``old`` and the per-unit entries of ``new``.

    In a Flax state, every array of ``old`` is wrapped in a variable.
    """
    leaves, treedef = jax.tree.flatten(old)
    entries = [x for x in subspace.fingerprint.entries(new) if x is not None]
    return treedef.unflatten(map(_like, leaves, entries))


def _check_same(old: Subspace, new: Subspace) -> None:
    new = same_parameters(old, new)
    mark = old.fingerprint
    pairs = zip(mark.entries(old.basis), mark.entries(new.basis), strict=True)
    for spec, (x, y) in zip(mark.units, pairs, strict=True):
        shapes = [None if v is None else tuple(v.shape) for v in (x, y)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"expected a basis of shape {shapes[0]} at {spec.path or '/'}, got "
                f"{shapes[1]}; keep max_rank and the covered units the same for the "
                "whole run, so that nothing is compiled again"
            )


def _like(old: jax.Array, new: jax.Array) -> jax.Array:
    known = all(
        isinstance(x, jax.Array) and not checks.is_traced(x) for x in (old, new)
    )
    if known and old.sharding != new.sharding:
        return _moved(old, new)
    return jnp.array(new, dtype=old.dtype, copy=True)


def _moved(old: jax.Array, new: jax.Array) -> jax.Array:
    """A copy of an array with the sharding of another."""
    if old.sharding.device_set != new.sharding.device_set:
        return jax.device_put(jnp.array(new, dtype=old.dtype, copy=True), old.sharding)

    # The devices move the array themselves, because a sharding may span hosts.
    return _placed(jnp.dtype(old.dtype), old.sharding)(new)


# Cached, because a new function would be compiled at every call.
@functools.lru_cache(maxsize=64)
def _placed(dtype: Any, sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """A function that copies an array to a sharding."""

    def copy(x: jax.Array) -> jax.Array:
        return jnp.array(x, dtype=dtype, copy=True)

    return jax.jit(copy, out_shardings=sharding)
