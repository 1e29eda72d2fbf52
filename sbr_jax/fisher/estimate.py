"""Fisher subspaces from per-example gradients, streamed over batches.

``F = (1/N) Σ_n g_n g_nᵀ`` with ``g_n = ∇_δ loss(x_n)``. F is factored, never built.

Symbols: δ parameters of a unit, P their number, N examples, B batch, R rows of the
buffer, K columns kept, L layers, ρ the energy to keep, F̂ the estimate, λ̂ its
eigenvalues.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, checks
from sbr_jax.fisher import batches as given
from sbr_jax.fisher import gradients
from sbr_jax.subspace import sketch, spectrum, units
from sbr_jax.subspace.factors import from_rows
from sbr_jax.subspace.record import Subspace, check_settings
from sbr_jax.typing import Batches, LossFn, PyTree, UserError


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

    ``F = (1/N) Σ_n g_n g_nᵀ`` over all N examples of all batches. Each example counts
    once, whatever the batch sizes. Keeps the smallest k with
    ``Σ_{j≤k} λ_j ≥ ρ tr F``, at most ``max_rank``.

    **Guarantee**: the trace is exact for any N. While ``N ≤ R``, the eigenpairs are
    those of the dense F up to float32 rounding. Beyond that, the buffer is cut to half
    whenever it is full, and an F̂ with ``0 ≼ F − F̂ ≼ Δ I`` replaces F: no eigenvalue is
    too large, and none is too small by more than ``Δ ≤ (tr F − Σ λ̂_j) / m`` with
    ``m = R/4 + 1``. For every k < m, also ``Δ ≤ Σ_{j>k} λ_j / (m − k)``. This m holds
    if half the rows hold K and leave room for a microbatch; `sbr_jax.subspace.sketch`
    has the general one. All-zero gradients give rank 0.

    In a fresh LoRA pair B = 0, hence ∂L/∂A = 0 and F only sees B. To cover A, estimate
    after a short warm-up, or again after each domain.

    Compiles once per loss function and batch shape: define ``loss_fn`` at module
    level (a new lambda is a new function) and pass frozen weights through ``args``.
    Memory beyond the loss's own: at most ``1.3 · 4 L P (K + b + min(N, R))`` bytes,
    summed over the units, for any N; b is the microbatch. A unit with P < R adds a copy
    of one layer's rows. Small R × R matrices are not counted.

    If ``params`` lie on a mesh, examples are split over its axes ``data`` and ``fsdp``.
    Rows and basis are split along P over all axes, and no device gathers them.

    Args:
        loss_fn: ``(params, example, *args) -> scalar``, −log p(y|x); for ``"sampled"``
            ``(params, example, key, *args)``, which draws its labels with the key.
        params: the trainable parameters.
        batches: iterable of pytrees with one leading example axis.
        max_rank: K, the static number of columns.
        energy: ρ in (0, 1].
        fisher: ``"empirical"`` (labels of the data) or ``"sampled"`` (labels of the
            model, the true Fisher in expectation).
        unit: predicate like ``is_leaf``; ``None`` makes every leaf a unit.
        layer_axes: how many leading axes of every leaf count layers.
        args: further arguments of the loss, e.g. frozen weights.
        key: random key, for ``"sampled"``; example n uses ``fold_in(key, n)``, so the
            result does not depend on how examples are batched.
        microbatch: how many examples to differentiate at once.
        buffer_rank: R, how many rows to hold before cutting; at least K + b are held.
        memory_budget: bytes for the memory above; decides R and, if necessary, lowers
            the microbatch.
        progress: called after each batch with the number of examples seen.

    Returns:
        The `Subspace`.

    Raises:
        UserError: for no batches or an empty one, unknown settings or values out of
            range, a memory budget that is too small, parameters that are not
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
    given.check(batches, args)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    def plan(microbatch: int) -> sketch.Plan:
        return sketch.plan(parameters, max_rank, microbatch, buffer_rank, memory_budget)

    most = buffer_rank if memory_budget is None else plan(1).rows
    sizes, full, every = _planned(batches, most, plan, microbatch)
    mesh = _mesh.holding(params)
    held = sketch.reserve(mark, full, mesh)
    traces: Any = None
    place = seen = 0
    passes = gradients.passes(
        every,
        functools.partial(gradients.microbatch_gradients, loss_fn=loss_fn, mark=mark),
        (params, args, key if fisher == "sampled" else None),
        sizes.microbatch,
        progress,
        _mesh.parts(_mesh.ROWS, mesh),
    )
    with given.parts_explained(batches), _mesh.using(mesh):
        for parts, norms, new in passes:
            if place + new > full:
                place = sizes.keep
                held = [
                    sketch.cut(x, keep=place, split=_mesh.splitting(x.shape[-1], mesh))
                    for x in held
                ]
            numbers = np.int32(place), np.int32(new)
            held = sketch.write(held, parts, *numbers, mark=mark, mesh=mesh)
            traces = norms if traces is None else gradients.add(traces, norms)
            place, seen = place + new, seen + new
            # The next microbatch waits until this one's memory is free.
            del parts
            jax.block_until_ready(held)
    _require_finite(mark, traces, seen)
    return from_rows(
        mark, held, traces, max_rank=max_rank, energy=energy, count=seen, mesh=mesh
    )


def _planned(
    batches: Batches,
    most: int,
    plan: Callable[[int], sketch.Plan],
    microbatch: int | None,
) -> tuple[sketch.Plan, int, Iterator[PyTree]]:
    """The plan, the number of rows that will be filled, and all batches.

    Args:
        batches: iterable of batches.
        most: how many examples to look at first.
        plan: makes a plan for a microbatch size.
        microbatch: size asked for; None for the largest of the first batches.
    """
    ahead, stream = given.look_ahead(batches, most)
    counts = [units.examples(batch, what="batch") for batch in ahead]
    if not counts:
        raise given.no_examples()
    sizes = plan(microbatch or max(counts))
    # The buffer may hold more rows than this, and the stream may go on.
    more, stream = given.look_ahead(stream, sizes.rows - sum(counts))
    counts += [units.examples(batch, what="batch") for batch in more]
    return sizes, min(sum(counts), sizes.rows), itertools.chain(ahead, more, stream)


def _require_finite(
    mark: units.Fingerprint, traces: list[spectrum.Scaled], count: int
) -> None:
    """Refuse gradients whose mean squared norm is not finite."""
    for spec, trace in zip(mark.units, traces, strict=True):
        mean = spectrum.Scaled(trace.value / count, trace.unit).plain()
        if not jnp.all(jnp.isfinite(mean)):
            raise UserError(
                f"expected finite gradients, got tr F = {mean} at {spec.path or '/'}; "
                "check the loss for NaN, e.g. an example whose mask is all zero"
            )
