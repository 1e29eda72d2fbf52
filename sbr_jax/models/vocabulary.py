"""Computes numbers from logits a few places at a time: logits are never whole.

Logits are the widest array of a step: at 16 · 512 places and 128 k tokens, 4 GB. Here
the head is applied to C places at once, and only one number for each place is kept.
When differentiating, the slope of that number in the state, ``∂ value / ∂ h [D]``, is
taken in the same pass, so that the backward pass needs no logits either.

Functions take a model's ``head``, its weights ``base`` and states ``hidden [K, D]``,
and give float32 ``[K]`` in nats, differentiable in ``hidden`` and ``base``. ``rows`` is
the number of equal parts of K, for a mesh that splits rows; ``chunk`` is C, by default
what suits the machine.

Legend: K places, D width, V vocabulary, C places of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbr_jax import _mesh, _rows
from sbr_jax._rows import Top
from sbr_jax.typing import PyTree

Head = Callable[[PyTree, jax.Array], jax.Array]
"""``head(base, hidden [..., D]) -> logits [..., V]``; it holds no arrays of its own."""

Place = Callable[..., jax.Array]
"""``(base, hidden [C, D], *others [C, ...]) -> [C]``; rows do not mix."""


def log_likelihood(
    head: Head,
    base: PyTree,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    rows: int = 1,
    chunk: int | None = None,
) -> jax.Array:
    """``log p(target)`` at every place, with logits ``head(base, hidden)``.

    >>> import jax.numpy as jnp
    >>> double = lambda base, hidden: base * hidden
    >>> states, targets = jnp.zeros((3, 4)), jnp.array([0, 1, 2])
    >>> log_likelihood(double, jnp.float32(2.0), states, targets, chunk=2).round(3)
    Array([-1.386, -1.386, -1.386], dtype=float32)
    """

    def place(base, hidden, targets):
        return _rows.log_likelihood(head(base, hidden), targets)

    size = chunk or chunk_size(head, base, hidden)
    return by_place(place, size, base, hidden, targets, rows=rows)


def divergence(
    head: Head,
    base: PyTree,
    reference: jax.Array,
    hidden: jax.Array,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    rows: int = 1,
    chunk: int | None = None,
) -> jax.Array:
    """``KL(reference ‖ model)`` at every place, or ``"reverse"`` the other way.

    ``Σ_v p_ref(v) (log p_ref(v) − log p(v))`` with ``p = softmax(head(h) / τ)``, where
    τ is ``temperature``. One chunk of both models' logits is held at a time.

    ``"forward"`` makes the model cover all that the reference does; ``"reverse"`` keeps
    the model from what the reference does not do.

    **Guarantee**: no gradient flows to the reference, whose states are ``[K, D]`` too.
    """

    def place(base, hidden, reference):
        told = jax.lax.stop_gradient(head(base, reference))
        logits = head(base, hidden)
        if temperature != 1.0:
            told, logits = told / temperature, logits / temperature
        return _rows.divergence(told, logits, direction)

    size = chunk or max(chunk_size(head, base, hidden) // 2, 1)
    reference = jax.lax.stop_gradient(reference)
    return by_place(place, size, base, hidden, reference, rows=rows)


def squared_gap(
    head: Head,
    base: PyTree,
    reference: jax.Array,
    hidden: jax.Array,
    *,
    reduction: str = "mean",
    rows: int = 1,
) -> jax.Array:
    """Squared distance between a model's and a reference's logits at every place.

    ``‖head(h) − head(h_ref)‖²``, divided by V for ``"mean"`` but not for ``"sum"``. No
    gradient flows to the reference.
    """
    reduce = jnp.mean if reduction == "mean" else jnp.sum

    def place(base, hidden, reference):
        told = jax.lax.stop_gradient(head(base, reference)).astype(jnp.float32)
        return reduce((head(base, hidden).astype(jnp.float32) - told) ** 2, axis=-1)

    size = max(chunk_size(head, base, hidden) // 2, 1)
    reference = jax.lax.stop_gradient(reference)
    return by_place(place, size, base, hidden, reference, rows=rows)


def top(head: Head, base: PyTree, hidden: jax.Array, k: int) -> Top:
    """The ``k`` likeliest tokens at every place, and one bucket for all others.

    Such a reference takes k numbers for each place instead of V, and needs no head. The
    arrays are ``[K, k]``, ``[K, k]`` and ``[K]``; no gradients.
    """
    return read(head, base, hidden, lambda x: _rows.top(x, k))


def learnt_or_held(
    head: Head,
    base: PyTree,
    hidden: jax.Array,
    targets: jax.Array,
    held: jax.Array,
    reference: Top,
    *,
    rows: int = 1,
) -> jax.Array:
    """``KL_k(reference ‖ model)`` at held places, ``−log p(target)`` at the others.

    ``held [K]`` is true at held places. Targets are ignored there; the reference, made
    by :func:`top`, is ignored everywhere else.
    """

    def place(base, hidden, targets, held, reference):
        logits = head(base, hidden)
        learnt = -_rows.log_likelihood(logits, targets)
        return jnp.where(held, _rows.top_divergence(reference, logits), learnt)

    size = chunk_size(head, base, hidden)
    return by_place(place, size, base, hidden, targets, held, reference, rows=rows)


def read(
    head: Head,
    base: PyTree,
    hidden: jax.Array,
    what: Callable[..., PyTree],
    *others: PyTree,
    chunk: int | None = None,
) -> PyTree:
    """Any function of the logits of each place alone; no gradients.

    ``what(logits [C, V], *others [C, ...]) -> values [C, ...]`` of others ``[K, ...]``.

    >>> import jax.numpy as jnp
    >>> states = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    >>> double = lambda base, hidden: base * hidden
    >>> read(double, jnp.float32(2.0), states, lambda x: x.max(-1), chunk=2).tolist()
    [4.0, 6.0, 2.0]
    """
    size = chunk or chunk_size(head, base, hidden)
    chunks = Chunks(size, 1)
    return _mapped(lambda h, *rest: what(head(base, h), *rest), chunks, hidden, *others)


# --- the machinery -----------------------------------------------------------------


class Chunks(NamedTuple):
    """How places are split: C at once in each of the parts that devices share."""

    size: int
    parts: int


def by_place(
    place: Place,
    size: int,
    base: PyTree,
    hidden: jax.Array,
    *others: PyTree,
    rows: int = 1,
) -> jax.Array:
    """One number for each place, computed in chunks, with its gradient.

    **Guarantee**: no array of K · V numbers exists, forwards or backwards. A value
    depends on its own state only, so the backward pass needs only its slope ``[D]``.
    That is taken in the forward pass, where the chunk's logits are. Logits are computed
    again only if the weights are differentiated too (full fine-tuning). ``others`` are
    constants. On a mesh that splits the ``rows`` parts of K, each device takes the
    chunks of its own part.

    >>> import jax.numpy as jnp
    >>> states = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    >>> place = lambda base, hidden: (base * hidden).max(-1)
    >>> loss = lambda h: by_place(place, 2, jnp.float32(2.0), h).sum()
    >>> jax.grad(loss)(states).tolist()
    [[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]]
    """
    chunks = Chunks(size, _mesh.row_parts(rows))
    return _values(place, chunks, base, hidden, others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _values(place, chunks, base, hidden, others):
    return _mapped(functools.partial(place, base), chunks, hidden, *others)


def _values_and_slopes(place, chunks, base, hidden, others):
    frozen = not any(leaf.perturbed for leaf in jax.tree.leaves(base))
    base, hidden, others = jax.tree.map(lambda x: x.value, (base, hidden, others))
    if not frozen:
        found = _values(place, chunks, base, hidden, others)
        return found, (base, hidden, others, None)

    def both(h, *rest):
        values, pull = jax.vjp(lambda h: place(base, h, *rest), h)
        return values, pull(jnp.ones_like(values))[0]

    values, slopes = _mapped(both, chunks, hidden, *others)
    return values, (None, None, None, slopes)


def _backward(place, chunks, kept, cotangent):
    base, hidden, others, slopes = kept
    if slopes is not None:
        return None, cotangent[:, None].astype(slopes.dtype) * slopes, None

    def again(base, hidden):
        return _mapped(
            jax.checkpoint(functools.partial(place, base)), chunks, hidden, *others
        )

    return (*jax.vjp(again, base, hidden)[1](cotangent), None)


_values.defvjp(_values_and_slopes, _backward, symbolic_zeros=True)


def _mapped(function: Callable[..., PyTree], chunks: Chunks, *arrays: PyTree) -> PyTree:
    """Applies ``function`` to chunks of ``size`` rows in a loop, padding the last."""
    count, (size, shared) = jax.tree.leaves(arrays)[0].shape[0], chunks
    if shared > 1:
        return _mapped_apart(function, chunks, count // shared, *arrays)
    if count <= size:
        return function(*arrays)
    parts = math.ceil(count / size)
    # Even chunks: 260 places are two of 130, not one of 256 and one mostly filling.
    size = math.ceil(count / parts)

    def split(x):
        filled = jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(parts, size, *x.shape[1:])

    found = jax.lax.map(lambda part: function(*part), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(parts * size, *x.shape[2:])[:count], found)


def _mapped_apart(
    function: Callable[..., PyTree], chunks: Chunks, own: int, *arrays: PyTree
) -> PyTree:
    """Like `_mapped`, with a chunk of each device's ``own`` places at a time."""
    size, shared = chunks
    steps = math.ceil(own / size)
    size = math.ceil(own / steps)
    filling = steps * size - own

    def split(x):
        x = _mesh.constrain_rows(x.reshape(shared, own, *x.shape[1:]))
        x = jnp.pad(x, [(0, 0), (0, filling)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.swapaxes(x.reshape(shared, steps, size, *x.shape[2:]), 0, 1)
        return x.reshape(steps, shared * size, *x.shape[3:])

    def joined(x):
        x = jnp.swapaxes(x.reshape(steps, shared, size, *x.shape[2:]), 0, 1)
        x = x.reshape(shared, steps * size, *x.shape[3:])[:, :own]
        return _mesh.constrain_rows(x).reshape(shared * own, *x.shape[2:])

    def one(part):
        return function(*jax.tree.map(_mesh.constrain_rows, part))

    parts = jax.tree.map(split, arrays)
    if steps == 1:
        alone = one(jax.tree.map(lambda x: x[0], parts))
        found = jax.tree.map(lambda x: x[None], alone)
    else:
        found = jax.lax.map(one, parts)
    return jax.tree.map(joined, found)


def chunk_size(head: Head, base: PyTree, hidden: Any) -> int:
    """C: the places whose float32 logits fill 32 MiB, 256 MiB on an accelerator."""
    place = jax.ShapeDtypeStruct((1, hidden.shape[-1]), hidden.dtype)
    vocabulary = jax.eval_shape(head, base, place).shape[-1]
    budget = 2**25 if jax.default_backend() == "cpu" else 2**28
    return max(budget // (4 * vocabulary), 16)
