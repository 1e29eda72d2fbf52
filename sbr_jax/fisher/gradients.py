"""Per-example gradients, ``g_n = ∇_δ loss(x_n)``, and passes over batches.

Fisher estimates and energy shares both use them.

Symbols: δ parameters of a unit, N examples, B batch, L layers.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, checks
from sbr_jax.subspace import spectrum, units
from sbr_jax.typing import LossFn, PyTree, UserError


def per_example_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *args: Any,
    microbatch: int | None = None,
) -> PyTree:
    """Gradients of each example's own loss: ``g_n = ∇_δ loss(δ, x_n)``.

    **Guarantee**: equal to a loop of ``jax.grad`` over the examples up to float32
    rounding. All examples share ``args`` (frozen weights), which may be traced.

    Args:
        loss_fn: ``loss_fn(params, example, *args) -> scalar``.
        params: any pytree; gradients are taken with respect to it.
        batch: pytree of arrays with one leading example axis B.
        *args: passed on to the loss, not differentiated.
        microbatch: how many examples to differentiate at once; ``None`` is all.

    Returns:
        Tree like ``params`` with leaves ``[B, *leaf.shape]``.

    Raises:
        UserError: for an empty batch, a loss that is not one number, parameters that
            are not floating-point, or a ``microbatch`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import per_example_gradients
        >>> loss = lambda w, x: jnp.vdot(w, x)
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> per_example_gradients(loss, jnp.zeros(2), x).tolist()
        [[1.0, 2.0], [3.0, 4.0]]

    References:
        arXiv:2604.17691
    """
    checks.function("loss_fn", loss_fn)
    units.fingerprint(params)
    units.examples(batch, what="batch")
    if microbatch is not None:
        microbatch = checks.whole("microbatch", microbatch)

    def scalar_loss(p: PyTree, example: PyTree) -> jax.Array:
        loss = loss_fn(p, example, *args)
        _check_loss(loss)
        return loss

    def gradient(example: PyTree) -> PyTree:
        return jax.grad(scalar_loss)(params, example)

    if microbatch is None:
        axes = _mesh.row_axes(_mesh.current())
        return jax.vmap(gradient, spmd_axis_name=axes or None)(batch)
    return jax.lax.map(gradient, batch, batch_size=microbatch)


def passes(
    batches: Iterable[PyTree],
    gradients: Callable[..., Any],
    shared: tuple[PyTree, tuple[Any, ...], jax.Array | None],
    microbatch: int | None,
    progress: Callable[[int], None] | None,
    devices: int,
) -> Iterator[tuple[list[PyTree], list[spectrum.Scaled], int]]:
    """Yield each microbatch's gradients, their squared norms and their number."""
    params, args, key = shared
    sizes: dict[Any, int] = {}
    seen = 0
    for batch in batches:
        count = units.examples(batch, what="batch")
        # Batches of one kind, such as sequences of one length, share a program.
        kind = tuple(np.shape(x)[1:] for x in jax.tree.leaves(batch))
        most = sizes[kind] = max(sizes.get(kind, 0), count)
        filled, step = _fill(batch, most), min(most, microbatch or most)
        for first in range(0, count, step):
            end = min(first + step, count)
            numbers = [np.int32(x) for x in (first, end, seen)]
            # Every device differentiates equally many; the last may be padding.
            size = math.ceil(step / devices) * devices
            found = gradients(params, filled, *numbers, args, key, size=size)
            yield *found, end - first
            del found
        seen += count
        if progress is not None:
            progress(seen)


@functools.partial(jax.jit, static_argnames=("loss_fn", "mark", "size"))
def microbatch_gradients(
    params: PyTree,
    batch: PyTree,
    first: jax.Array,
    count: jax.Array,
    start: jax.Array,
    args: tuple[Any, ...],
    key: jax.Array | None,
    *,
    loss_fn: LossFn,
    mark: units.Fingerprint,
    size: int,
) -> tuple[list[PyTree], list[spectrum.Scaled]]:
    """Gradients of some examples of a batch, and squared norms ``[*L]``, per unit.

    Args:
        params: parameters of the loss.
        batch: examples.
        first: index of the first example to differentiate.
        count: index after the last one; later examples are padding and do not count.
        start: number of the batch's first example among all.
        args: further arguments of the loss.
        key: for labels that the loss draws.
        loss_fn: the loss.
        mark: fingerprint of the parameters.
        size: how many examples are differentiated, padding included.
    """
    place = first + jnp.arange(size, dtype=jnp.int32)
    batch = jax.tree.map(
        lambda x: _mesh.constrain_rows(x[jnp.minimum(place, count - 1)]), batch
    )
    if key is None:
        grads = per_example_gradients(loss_fn, params, batch, *args)
    else:

        def keyed(p: PyTree, example: PyTree, *rest: Any) -> jax.Array:
            return loss_fn(p, example[0], example[1], *rest)

        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(start + place)
        grads = per_example_gradients(keyed, params, (batch, keys), *args)

    def squares(leaf: jax.Array) -> spectrum.Scaled:
        rows = leaf.reshape(*leaf.shape[: 1 + mark.layer_axes], -1)
        real = (place < count).reshape(-1, *[1] * (rows.ndim - 1))
        rows = jnp.where(real, rows.astype(jnp.float32), 0.0)
        return spectrum.sum_of_squares(jnp.moveaxis(rows, 0, -2))

    parts = mark.treedef.flatten_up_to(grads)
    norms = [map(squares, jax.tree.leaves(part)) for part in parts]
    traces = [functools.reduce(spectrum.add, norm) for norm in norms]
    return (
        jax.tree.map(_mesh.constrain_rows, parts),
        jax.tree.map(_mesh.constrain, traces),
    )


@jax.jit
def add(
    traces: list[spectrum.Scaled], norms: list[spectrum.Scaled]
) -> list[spectrum.Scaled]:
    """Sums of two lists of scaled numbers, one number per unit."""
    return [spectrum.add(*pair) for pair in zip(traces, norms, strict=True)]


def _fill(batch: PyTree, size: int) -> PyTree:
    """Pad with the last example up to ``size``, so a short batch compiles nothing."""
    short = size - units.examples(batch, what="batch")
    if not short:
        return batch
    return jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], short, axis=0)]), batch
    )


def _check_loss(loss: Any) -> None:
    dtype = getattr(loss, "dtype", None)
    if dtype is None or loss.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            "expected loss_fn to return one floating-point number for one example, "
            f"got {checks.shown(loss)}; the batch's axis is mapped over"
        )
