"""Control subspaces: as large as the real one, but without meaning.

If a defence works as well with a control, it does not work because of its subspace.

Symbols: V basis [P, K], P parameters of a unit, K columns, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from sbr_jax import checks
from sbr_jax.subspace import spectrum, units
from sbr_jax.subspace.record import Subspace, check_subspace


def random_subspace(key: jax.Array, like: Subspace) -> Subspace:
    """A uniformly (Haar) random subspace with the ranks and eigenvalues of ``like``.

    Args:
        key: random key.
        like: the subspace to imitate.

    Returns:
        A `Subspace` with random basis; eigenvalues and trace are those of ``like``.

    Raises:
        UserError: for anything but a random key and a subspace.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sbr_jax import effective_rank, from_factors, random_subspace
        >>> s = from_factors({"w": jnp.eye(9)[:3]}, max_rank=4, energy=1.0)
        >>> r = random_subspace(jax.random.key(0), s)
        >>> int(effective_rank(r)["w"]), bool((r.basis["w"] != s.basis["w"]).any())
        (3, True)
    """
    return _with_keys(_drawn, key, like)


def _drawn(key: jax.Array, v: jax.Array) -> jax.Array:
    """A random basis with the rank of ``v``."""
    used = spectrum.used_columns(v)
    # Masked first, so that no used column is made orthogonal to an unused one.
    normal = spectrum.masked(jax.random.normal(key, v.shape, v.dtype), used)
    q = spectrum.orthonormal(normal)
    return spectrum.polish(spectrum.masked(q, used))


def shuffled_subspace(key: jax.Array, subspace: Subspace) -> Subspace:
    """The same basis with its P coordinates permuted within each unit and layer.

    **Guarantee**: ranks, eigenvalues, traces and the multiset of entries of every
    column are kept exactly; the entries only belong to other parameters.

    Args:
        key: random key.
        subspace: the subspace to shuffle.

    Returns:
        A `Subspace` with permuted rows of the basis.

    Raises:
        UserError: for anything but a random key and a subspace.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sbr_jax import from_factors, overlap, shuffled_subspace
        >>> s = from_factors({"w": jnp.eye(64)[:2]}, max_rank=2, energy=1.0)
        >>> float(overlap(s, shuffled_subspace(jax.random.key(0), s))["w"])
        0.0
    """
    return _with_keys(_permuted, key, subspace)


def _permuted(key: jax.Array, v: jax.Array) -> jax.Array:
    """A basis with its rows in another order."""
    return jax.random.permutation(key, v, axis=0)


def _with_keys(function: Callable, key: jax.Array, subspace: Subspace) -> Subspace:
    checks.random_key("key", key)
    check_subspace("subspace", subspace)
    mark = subspace.fingerprint
    out = []
    for i, basis in enumerate(mark.entries(subspace.basis)):
        if basis is None:
            out.append(None)
            continue
        layers = basis.shape[: mark.layer_axes]
        keys = jax.random.split(jax.random.fold_in(key, i), math.prod(layers))
        keys = keys.reshape(*layers, *keys.shape[1:])
        options = {"function": function, "layer_axes": mark.layer_axes}
        out.append(_over_layers(keys, basis, **options))
    return dataclasses.replace(subspace, basis=mark.join(out))


# Jitted as a whole, because the loop inside would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("function", "layer_axes"))
def _over_layers(
    keys: jax.Array, basis: jax.Array, *, function: Callable, layer_axes: int
) -> jax.Array:
    return units.over_layers(function, layer_axes)(keys, basis)
