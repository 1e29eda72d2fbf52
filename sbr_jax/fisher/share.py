"""Share of examples' gradient energy that lies inside a subspace.

``Σ_n ‖Vᵀ g_n‖² / Σ_n ‖g_n‖²``.

Symbols: V basis of a unit and layer, g_n gradient of an example, L layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, checks
from sbr_jax.fisher import batches as given
from sbr_jax.fisher import gradients
from sbr_jax.subspace import spectrum, units
from sbr_jax.subspace.record import Subspace, check_subspace, same_parameters
from sbr_jax.typing import Batches, LossFn, PyTree, UserError


def energy_share(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    subspace: Subspace,
    *,
    args: tuple[Any, ...] = (),
    microbatch: int | None = None,
) -> PyTree:
    """Share of examples' gradient energy that lies inside a subspace.

    ``Σ_n ‖Vᵀ g_n‖² / Σ_n ‖g_n‖²``, per unit and layer. On the examples that gave the
    subspace, this is the share of the trace that its columns hold. On other examples of
    the same kind it is smaller, and tells how far the subspace describes the kind
    rather than those examples.

    **Guarantee**: memory grows with the microbatch, as in `per_example_gradients`, but
    not with the number of examples; the scale of the loss changes nothing.

    Args:
        loss_fn: ``(params, example, *args) -> scalar``.
        params: the parameters that the subspace belongs to, in the same containers.
        batches: iterable of pytrees with one leading example axis.
        subspace: the subspace to measure.
        args: further arguments of the loss, e.g. frozen weights.
        microbatch: how many examples to differentiate at once.

    Returns:
        Tree of ``[*L]`` in [0, 1], one entry per unit; 0 where all gradients are 0.

    Raises:
        UserError: for no batches or an empty one, parameters that do not match the
            subspace, or a loss that is not one number.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import energy_share, from_factors
        >>> loss = lambda p, x: jnp.vdot(p["w"], x)
        >>> s = from_factors({"w": jnp.array([[1.0, 0.0]])}, max_rank=1)
        >>> x = jnp.array([[3.0, 4.0], [0.0, 5.0]])
        >>> round(float(energy_share(loss, {"w": jnp.zeros(2)}, [x], s)["w"]), 4)
        0.18

    References:
        arXiv:2604.17691
    """
    check_subspace("subspace", subspace)
    (share,) = energy_shares(
        loss_fn, params, batches, [subspace], args=args, microbatch=microbatch
    )
    return share


def energy_shares(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    subspaces: Sequence[Subspace],
    *,
    args: tuple[Any, ...] = (),
    microbatch: int | None = None,
) -> list[PyTree]:
    """`energy_share` of several subspaces of the same parameters, in one pass."""
    checks.function("loss_fn", loss_fn)
    if microbatch is not None:
        microbatch = checks.whole("microbatch", microbatch)
    given.check(batches, args)
    mark = subspaces[0].fingerprint
    mark.split(params, what="params")
    if not mark.holds(params):
        raise UserError(
            "expected params in the containers that the subspace was computed with, "
            "got the same names in others; pass the tree that it was computed on"
        )
    bases = [
        mark.entries(same_parameters(subspaces[0], other).basis) for other in subspaces
    ]
    mesh = _mesh.holding(params)
    inside: list[Any] = []
    whole: Any = None
    passes = gradients.passes(
        batches,
        functools.partial(gradients.microbatch_gradients, loss_fn=loss_fn, mark=mark),
        (params, tuple(args), None),
        microbatch,
        None,
        _mesh.parts(_mesh.ROWS, mesh),
    )
    with given.parts_explained(batches), _mesh.using(mesh):
        for parts, norms, count in passes:
            new = [_inside(parts, b, np.int32(count), mark=mark) for b in bases]
            inside = list(map(gradients.add, inside, new)) if inside else new
            whole = norms if whole is None else gradients.add(whole, norms)
            del parts
            jax.block_until_ready(inside)
    if whole is None:
        raise given.no_examples()
    return [
        mark.join(
            [
                None if basis is None else _quotient(part, total)
                for basis, part, total in zip(own, found, whole, strict=True)
            ]
        )
        for own, found in zip(bases, inside, strict=True)
    ]


def _quotient(part: spectrum.Scaled, total: spectrum.Scaled) -> jax.Array:
    """The share of a total, in [0, 1]; 0 if the total is 0."""
    seen = total.value > 0
    share = part.within(total.unit) / jnp.where(seen, total.value, 1.0)
    return jnp.clip(jnp.where(seen, share, 0.0), 0.0, 1.0)


@functools.partial(jax.jit, static_argnames="mark")
def _inside(
    parts: list[PyTree], bases: list[Any], count: jax.Array, *, mark: units.Fingerprint
) -> list[spectrum.Scaled]:
    """Squared norms ``[*L]`` of the coordinates of ``count`` examples, per unit."""

    def coordinates(rows: jax.Array, basis: jax.Array) -> jax.Array:
        return spectrum.dot(rows, basis)

    lifted = units.over_layers(coordinates, mark.layer_axes)
    out = []
    for part, basis in zip(parts, bases, strict=True):
        rows = units.to_vector(part, mark.layer_axes, batch_axes=1)
        real = jnp.arange(len(rows)) < count
        rows = jnp.where(real.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0.0)
        rows = jnp.moveaxis(rows, 0, -2)
        basis = (
            jnp.zeros((*rows.shape[:-2], rows.shape[-1], 1)) if basis is None else basis
        )
        out.append(spectrum.sum_of_squares(lifted(rows, basis)))
    return out
