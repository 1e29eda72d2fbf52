"""Fisher subspaces from per-example gradients, streamed over batches.

``F = (1/N) Σ_n g_n g_nᵀ`` with ``g_n = ∇_δ loss(x_n)``; never built, only factored.

Symbols: δ parameters of a unit, P how many they are, N examples, B batch, R rows of
the buffer, K columns kept, L layers, ρ the energy to keep.

References:
    SafeAnchor: https://arxiv.org/abs/2604.17691
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, checks
from sbr_jax.subspace import sketch, spectrum, units
from sbr_jax.subspace.record import (
    Subspace,
    check_settings,
    check_subspace,
    from_rows,
    same_parameters,
)
from sbr_jax.typing import Batches, LossFn, PyTree, UserError


def per_example_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *args: Any,
    microbatch: int | None = None,
) -> PyTree:
    """Gradients of each example's own loss: ``g_n = ∇_δ loss(δ, x_n)``.

    **Guarantee**: equal to a loop of ``jax.grad`` over the examples up to float32
    rounding. ``args`` (frozen weights) are shared by all examples and may be traced.

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


def fisher_subspace(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    *,
    max_rank: int,
    energy: float = 0.9,
    fisher: str = "empirical",
    unit: Callable[[Any], bool] | None = None,
    layer_axes: int | None = None,
    args: tuple[Any, ...] = (),
    key: jax.Array | None = None,
    microbatch: int | None = None,
    buffer_rank: int = 512,
    memory_budget: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Subspace:
    """Leading eigenpairs of the Fisher matrix of each unit and layer.

    ``F = (1/N) Σ_n g_n g_nᵀ`` over all N examples of all batches, each counted once
    however ragged the batches; keeps the smallest k with
    ``Σ_{j≤k} λ_j ≥ ρ tr F``, at most ``max_rank``.

    **Guarantee**: the trace is exact for any N. The eigenpairs are those of the dense
    F up to float32 rounding while ``N ≤ R``; beyond that the buffer is cut to half
    whenever it is full, and F̂ stands for F with ``0 ≼ F − F̂ ≼ Δ I``: no eigenvalue is
    too large, none too small by more than ``Δ ≤ (tr F − Σ λ̂_j) / m``, where
    ``m = R/4 + 1`` (as long as half the rows hold K and leave room for a microbatch;
    `sbr_jax.subspace.sketch` has the general one), and ``Δ ≤ Σ_{j>k} λ_j / (m − k)``
    for every k < m. All-zero gradients give rank 0. In a fresh LoRA pair B = 0, hence
    ∂L/∂A = 0 and F only sees B: estimate after a short warm-up, or again after each
    domain, if A is to be covered.

    Compiles once per loss function and batch shape: define ``loss_fn`` at module
    level (a new lambda is a new function) and pass frozen weights through ``args``.
    Memory beside the loss's own: at most ``1.3 · 4 L P (K + b + min(N, R))`` bytes,
    summed over the units, for any N; b is the microbatch. A unit with P < R adds a copy
    of one layer's rows, and small matrices R × R are not counted.

    Where ``params`` lie on a mesh, examples are split over its axes ``data`` and
    ``fsdp``, and rows and basis over all axes, along P: a device holds its part of
    them, and none gathers the others'.

    Args:
        loss_fn: ``(params, example, *args) -> scalar``, −log p(y|x); for ``"sampled"``
            ``(params, example, key, *args)``, drawing its own labels with the key.
        params: the trainable parameters.
        batches: iterable of pytrees with one leading example axis.
        max_rank: K, the static number of columns.
        energy: ρ in (0, 1].
        fisher: ``"empirical"`` (labels of the data) or ``"sampled"`` (labels of the
            model, the true Fisher in expectation).
        unit: predicate as ``is_leaf``; ``None`` makes every leaf a unit.
        layer_axes: how many leading axes of every leaf count layers.
        args: further arguments of the loss, e.g. frozen weights.
        key: random key, for ``"sampled"``; example n uses ``fold_in(key, n)``, so the
            result does not depend on how examples are batched.
        microbatch: how many examples to differentiate at once.
        buffer_rank: R, how many rows to hold before cutting; at least K + b are held.
        memory_budget: bytes that the memory above is to fit into; decides R, and lowers
            the microbatch where it has to.
        progress: called with the number of examples seen, after each batch.

    Returns:
        The `Subspace`.

    Raises:
        UserError: for no batches or an empty one, unknown settings or values out of
            range, a memory budget below the least, parameters that are not
            floating-point, a loss that is not one number, or gradients that are not
            finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import effective_rank, fisher_subspace
        >>> loss = lambda p, x: jnp.vdot(p["w"], x)
        >>> x = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> s = fisher_subspace(loss, {"w": jnp.zeros(3)}, [x], max_rank=3, energy=1.0)
        >>> s.eigenvalues["w"].round(4).tolist(), float(s.trace["w"])
        ([2.0, 0.5, 0.0], 2.5)

    References:
        arXiv:2604.17691
    """
    mark = units.fingerprint(params, unit=unit, layer_axes=layer_axes)
    max_rank = check_settings(mark, max_rank, energy)
    checks.function("loss_fn", loss_fn)
    checks.one_of("fisher", fisher, ("empirical", "sampled"))
    if fisher == "sampled" or key is not None:
        checks.random_key("key", key)
    if microbatch is not None:
        microbatch = checks.whole("microbatch", microbatch)
    buffer_rank = checks.whole(
        "buffer_rank", buffer_rank, least=max_rank, note="max_rank rows are kept"
    )
    if memory_budget is not None:
        checks.number("memory_budget", memory_budget, above=0)
    if progress is not None:
        checks.function("progress", progress)
    if not isinstance(args, tuple | list):
        raise UserError(
            f"expected args to be a tuple, got {checks.shown(args)}; pass (weights,)"
        )
    _check_batches(batches)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    most = buffer_rank
    if memory_budget is not None:
        most = sketch.plan(parameters, max_rank, 1, most, memory_budget).rows
    ahead, stream = _look_ahead(batches, most)
    counts = [units.examples(batch, what="batch") for batch in ahead]
    if not counts:
        raise UserError(
            "expected at least one batch with an example, got none; "
            "an iterator that was used before is empty: pass a list"
        )
    microbatch = microbatch or max(counts)
    sizes = sketch.plan(parameters, max_rank, microbatch, buffer_rank, memory_budget)
    full = min(sum(counts), sizes.rows)
    mesh = _mesh.holding(params)
    held = sketch.reserve(mark, full, mesh)
    traces: Any = None
    place = seen = 0
    passes = _passes(
        itertools.chain(ahead, stream),
        functools.partial(microbatch_gradients, loss_fn=loss_fn, mark=mark),
        (params, args, key if fisher == "sampled" else None),
        sizes.microbatch,
        progress,
        _mesh.parts(_mesh.ROWS, mesh),
    )
    with _parts_explained(batches), _mesh.using(mesh):
        for parts, norms, new in passes:
            if place + new > full:
                place = sizes.keep
                held = [
                    sketch.cut(x, keep=place, split=_mesh.splitting(x.shape[-1], mesh))
                    for x in held
                ]
            numbers = np.int32(place), np.int32(new)
            held = sketch.write(held, parts, *numbers, mark=mark, mesh=mesh)
            traces = norms if traces is None else _add(traces, norms)
            place, seen = place + new, seen + new
            # The next microbatch is not begun before this one's memory is free.
            del parts
            jax.block_until_ready(held)
    for spec, trace in zip(mark.units, traces, strict=True):
        mean = spectrum.Scaled(trace.value / seen, trace.unit).plain()
        if not jnp.all(jnp.isfinite(mean)):
            raise UserError(
                f"expected finite gradients, got tr F = {mean} at {spec.path or '/'}; "
                "check the loss for NaN, e.g. an example whose mask is all zero"
            )
    return from_rows(
        mark,
        held,
        traces,
        max_rank=max_rank,
        energy=energy,
        count=seen,
        mesh=mesh,
    )


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
    subspace it is the share of the trace that its columns hold; on others of their kind
    it is less, and says how far the subspace is about the kind and not about them.

    **Guarantee**: linear in memory, as `per_example_gradients`, for any number of
    examples; the scale of the loss changes nothing.

    Args:
        loss_fn: ``(params, example, *args) -> scalar``.
        params: of the subspace, in the same containers.
        batches: iterable of pytrees with one leading example axis.
        subspace: where the gradients may lie.
        args: further arguments of the loss, e.g. frozen weights.
        microbatch: how many examples to differentiate at once.

    Returns:
        Tree of ``[*L]`` in [0, 1], one entry per unit; 0 where no gradient is.

    Raises:
        UserError: for no batches or an empty one, other parameters than the subspace's,
            or a loss that is not one number.

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
    """As `energy_share`, of several subspaces of one parametrisation in one pass."""
    checks.function("loss_fn", loss_fn)
    if microbatch is not None:
        microbatch = checks.whole("microbatch", microbatch)
    if not isinstance(args, tuple | list):
        raise UserError(
            f"expected args to be a tuple, got {checks.shown(args)}; pass (weights,)"
        )
    _check_batches(batches)
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
    passes = _passes(
        batches,
        functools.partial(microbatch_gradients, loss_fn=loss_fn, mark=mark),
        (params, tuple(args), None),
        microbatch,
        None,
        _mesh.parts(_mesh.ROWS, mesh),
    )
    with _parts_explained(batches), _mesh.using(mesh):
        for parts, norms, count in passes:
            new = [_inside(parts, b, np.int32(count), mark=mark) for b in bases]
            inside = list(map(_add, inside, new)) if inside else new
            whole = norms if whole is None else _add(whole, norms)
            del parts
            jax.block_until_ready(inside)
    if whole is None:
        raise UserError(
            "expected at least one batch with an example, got none; "
            "an iterator that was used before is empty: pass a list"
        )
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
    """A share of a whole, in [0, 1]; 0 of nothing."""
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


def _look_ahead(batches: Batches, most: int) -> tuple[list[PyTree], Iterator[PyTree]]:
    """The first batches, all or more than ``most`` examples of them, and the rest."""
    stream, ahead, total = iter(batches), [], 0
    while total <= most:
        batch = next(stream, None)
        if batch is None:
            break
        ahead.append(batch)
        total += units.examples(batch, what="batch")
    return ahead, stream


def _passes(
    batches: Iterable[PyTree],
    gradients: Callable[..., Any],
    shared: tuple[PyTree, tuple[Any, ...], jax.Array | None],
    microbatch: int | None,
    progress: Callable[[int], None] | None,
    devices: int,
) -> Iterator[tuple[list[PyTree], list[spectrum.Scaled], int]]:
    """Gradients of a microbatch, their squared norms, and how many there are."""
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
            # Each device differentiates as many, if the last of them for nothing.
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
        params: of the loss.
        batch: examples.
        first: of those that are differentiated.
        count: end of those; later ones are but filling, and their gradients no one's.
        start: number of the batch's first example among all.
        args: of the loss.
        key: for labels that are drawn.
        loss_fn: the loss.
        mark: of the parameters.
        size: how many examples are differentiated.
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
def _add(
    traces: list[spectrum.Scaled], norms: list[spectrum.Scaled]
) -> list[spectrum.Scaled]:
    return [spectrum.add(*pair) for pair in zip(traces, norms, strict=True)]


def _fill(batch: PyTree, size: int) -> PyTree:
    """Repeat the last example up to ``size``: a short batch then compiles nothing."""
    short = size - units.examples(batch, what="batch")
    if not short:
        return batch
    return jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], short, axis=0)]), batch
    )


def _check_batches(batches: Any) -> None:
    """Refuse one batch where a list of them is wanted, as far as it can be told."""
    one = isinstance(batches, Mapping | str | bytes | jax.Array | np.ndarray)
    one = one or not isinstance(batches, Iterable) or hasattr(batches, "_fields")
    # All batches of a loss are of one kind; x [B, P] and y [B] are parts of one.
    kinds = {(x.ndim, jnp.issubdtype(x.dtype, jnp.floating)) for x in _arrays(batches)}
    if one or len(kinds) > 1:
        raise _unlisted(batches)


@contextlib.contextmanager
def _parts_explained(batches: Any) -> Iterator[None]:
    """Explain a loss that fails on ``x`` of a batch ``(x, y)``: it is in no list."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if not isinstance(batches, tuple) or len(_arrays(batches)) < 2:
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise _unlisted(
            batches, f", whose first loss_fn does not take ({why:.80})"
        ) from error


def _arrays(batches: Any) -> Sequence[Any]:
    """The items of a tuple or list of arrays, and none of anything else."""
    if not isinstance(batches, tuple | list):
        return ()
    bare = all(isinstance(x, jax.Array | np.ndarray) for x in batches)
    return batches if bare else ()


def _unlisted(batches: Any, why: str = "") -> UserError:
    arrays = _arrays(batches)
    got = checks.shown(batches)
    if arrays:
        shown = ", ".join(map(checks.shown, arrays))
        got = f"a {type(batches).__name__} of arrays ({shown})"
    return UserError(
        f"expected batches to be a list of batches, got {got}{why}; pass [batch]"
    )


def _check_loss(loss: Any) -> None:
    dtype = getattr(loss, "dtype", None)
    if dtype is None or loss.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            "expected loss_fn to return one floating-point number for one example, "
            f"got {checks.shown(loss)}; the batch's axis is mapped over"
        )
