"""Attention over the pairs of tiles in which some query sees some key.

A row of W tokens is cut into M tiles of C. A row may hold several sequences, one after
another; then the queries of tile i see no key before the tile in which the sequence of
its first token begins. So tile i makes ``reach[i]`` pairs, with the keys of tiles i,
i − 1, …, and each pair is a small dense product. With ``s`` the masked scores of a pair
and ``i(p), j(p)`` its tiles,

    lse_i = log Σ_{p: i(p) = i} Σ_keys exp s_p
    out_i = Σ_{p: i(p) = i} exp(s_p − lse_i) V_{j(p)}

The backward pass computes the scores again; only their mask is kept.

**Guarantee**: equals masked attention over whole rows up to rounding. Sums over pairs
gather their terms in a fixed order: a scatter is slow on a CPU, and elsewhere it adds
in any order. It can be differentiated once, backwards. A value that is not finite
reaches the other sequences of its tiles, as it does in any masked product.

Legend: S rows, W tokens of a row, M tiles, C places of a tile, P pairs, N heads, K
key-value heads, G = N / K, H head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbr_jax.models.layers import soft_cap

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen: finite, so that a difference is not NaN."""


class Tiles(NamedTuple):
    """Which tiles of a row meet.

    Pairs are sorted by the tile of their queries. The pair of tile i with the keys of
    tile ``i − d`` is number ``first[i] + d``.
    """

    queries: jax.Array
    """int32 ``[S, P]``, the tile of a pair's queries; M at filling."""
    first: jax.Array
    """int32 ``[S, M]``, the first pair of each tile."""
    reach: jax.Array
    """int32 ``[S, M]``, pairs of each tile, its own keys first."""
    segments: jax.Array
    """int32 ``[S, M, C]``, the sequence of each place; 0 at filling."""

    @property
    def keys(self) -> jax.Array:
        """int32 ``[S, P]``, the tile of a pair's keys."""
        place = jnp.arange(self.queries.shape[1], dtype=jnp.int32)[None]
        return self.queries - (place - _rows(self.first, self.queries))


def tiles_of(pairs: jax.Array, segments: jax.Array) -> Tiles:
    """The tiles of packed rows, from the arrays of :func:`sbr_jax.data.layout.pack`.

    Args:
      pairs: int32 ``[S, P]``, sorted tiles of queries; M at filling.
      segments: int32 ``[S, M, C]``.
    """
    count = segments.shape[1]
    each = jnp.arange(count, dtype=pairs.dtype)[None, :, None]
    reach = jnp.sum(pairs[:, None] == each, axis=-1, dtype=jnp.int32)
    return Tiles(pairs, jnp.cumsum(reach, axis=-1) - reach, reach, segments)


def causal_tiles(rows: int, length: int, size: int) -> Tiles:
    """The tiles of rows that are one sequence each: tile i meets all up to itself.

    >>> tiles = causal_tiles(1, 5, 2)
    >>> tiles.queries.tolist(), tiles.keys.tolist()
    ([[0, 1, 1, 2, 2, 2]], [[0, 1, 0, 2, 1, 0]])
    """
    count = -(-length // size)
    tile = jnp.arange(count, dtype=jnp.int32)
    pairs = jnp.repeat(tile, tile + 1, total_repeat_length=count * (count + 1) // 2)
    segments = (jnp.arange(count * size) < length).astype(jnp.int32)
    whole = segments.reshape(1, count, size), pairs[None]
    segments, pairs = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in whole)
    return tiles_of(pairs, segments)


def tile_mask(tiles: Tiles, window: int | None = None) -> jax.Array:
    """Whether the queries of each pair see its keys, bool ``[S, P, C, C]``.

    A query sees keys of its own sequence that are not after it, ``window`` at most.
    """
    size = tiles.segments.shape[-1]
    place = jnp.arange(size, dtype=jnp.int32)
    apart = (place[:, None] - place[None])[None, None]
    behind = (tiles.queries - tiles.keys)[..., None, None] * size + apart
    of_query, of_key = (_rows(tiles.segments, x) for x in (tiles.queries, tiles.keys))
    seen = (of_query[..., :, None] == of_key[..., None, :]) & (behind >= 0)
    seen = seen if window is None else seen & (behind < window)
    return seen & (tiles.queries < tiles.reach.shape[1])[..., None, None]


def attend_tiles(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tiles: Tiles,
    mask: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Grouped-query attention of rows in tiles.

    Args:
      query: ``[S, W, N, H]`` with W at most M · C.
      key: ``[S, W, K, H]`` with K dividing N.
      value: ``[S, W, K, H]``.
      tiles: of these rows.
      mask: from :func:`tile_mask`.
      scale: factor of the scores; None is ``H ** -0.5``.
      cap: soft cap of the scores, or None.

    Returns:
      ``[S, W, N, H]``.

    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 5, 2, 4)).astype("f")
    >>> tiles = causal_tiles(1, 5, 2)
    >>> found = attend_tiles(*map(jnp.asarray, (q, k, v)), tiles, tile_mask(tiles))
    >>> whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> np.allclose(found, whole, atol=1e-6)
    True
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend((scale, cap), query, key, value, tiles, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, query, key, value, tiles, mask):
    return _forward(how, query, key, value, tiles, mask)[0]


def _forward(how, query, key, value, tiles, mask):
    """Attention, and ``lse [S, M, K, G, C]``."""
    q, k, v = (_cut(x, key.shape[2], tiles) for x in (query, key, value))
    q, k, v = _rows(q, tiles.queries), _rows(k, tiles.keys), _rows(v, tiles.keys)
    scores = _scores(how, q, k, mask)
    top = _combined(jnp.maximum, jnp.max(scores, axis=-1), tiles)
    share = jnp.exp(scores - _rows(top, tiles.queries)[..., None])
    total = _combined(jnp.add, jnp.sum(share, axis=-1), tiles)
    share = share.astype(value.dtype).reshape(*q.shape[:-1], -1)
    out = _combined(jnp.add, _product("spkqc,spkch->spkqh", share, v), tiles)
    out = out / total.reshape(*out.shape[:-1], 1)
    return _joined(out, query), top + jnp.log(total)


def _keep(how, query, key, value, tiles, mask):
    out, lse = _forward(how, query, key, value, tiles, mask)
    return out, (query, key, value, tiles, mask, out, lse)


def _backward(how, kept, cotangent):
    """``dV = Pᵀ dO``, ``dS = P (dO Vᵀ − dO·O)``, ``dQ = c dS K``, ``dK = c dSᵀ Q``."""
    query, key, value, tiles, mask, out, lse = kept
    scale, cap = how
    wide = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
    both = jnp.sum(wide, axis=-1, keepdims=True)
    cut = functools.partial(_cut, groups=key.shape[2], tiles=tiles)
    q, d = _rows(cut(query), tiles.queries), _rows(cut(cotangent), tiles.queries)
    k, v = _rows(cut(key), tiles.keys), _rows(cut(value), tiles.keys)
    scores = _scores(how, q, k, mask)
    share = jnp.exp(scores - _rows(lse, tiles.queries)[..., None])
    both = _rows(cut(both), tiles.queries).reshape(*share.shape[:-1], 1)
    slope = share * (_product("spkqh,spkch->spkqc", d, v).reshape(share.shape) - both)
    if cap is not None:
        slope = jnp.where(share > 0, slope * (1.0 - jnp.square(scores / cap)), 0.0)
    flat = (*q.shape[:-1], -1)
    share, slope = (x.reshape(flat).astype(query.dtype) for x in (share, slope))
    dq = _combined(jnp.add, _product("spkqc,spkch->spkqh", slope, k), tiles)
    dk = _combined(jnp.add, _product("spkqc,spkqh->spkch", slope, q), tiles, True)
    dv = _combined(jnp.add, _product("spkqc,spkqh->spkch", share, d), tiles, True)
    found = _joined(scale * dq, query), _joined(scale * dk, key), _joined(dv, value)
    return *found, None, None


_attend.defvjp(_keep, _backward)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _scores(how, q, k, mask):
    """Masked scores of every pair, float32 ``[S, P, K, G, C, C]``."""
    scale, cap = how
    rows, pairs, size, _ = mask.shape
    scores = soft_cap(scale * _product("spkqh,spkch->spkqc", q, k), cap)
    scores = scores.reshape(rows, pairs, k.shape[2], -1, size, size)
    return jnp.where(mask[:, :, None, None], scores, _HIDDEN)


def _cut(x: jax.Array, groups: int, tiles: Tiles) -> jax.Array:
    """``[S, W, K G, H]`` to ``[S, M, K, G C, H]``."""
    rows, count, size = tiles.segments.shape
    more = count * size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
    x = x.reshape(rows, count, size, groups, -1, x.shape[-1])
    x = x.transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(rows, count, groups, -1, x.shape[-1])


def _joined(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of :func:`_cut`, in the shape and dtype of ``like``."""
    rows, width, heads, head_size = like.shape
    rows, count, groups, _, _ = x.shape
    x = x.reshape(rows, count, groups, heads // groups, -1, head_size)
    x = x.transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(rows, -1, heads, head_size)[:, :width].astype(like.dtype)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """``y[s, p] = x[s, index[s, p]]``; the last one beyond the end."""
    return jax.vmap(lambda one, at: jnp.take(one, at, axis=0, mode="clip"))(x, index)


def _combined(op: Any, x: jax.Array, tiles: Tiles, by_key: bool = False) -> jax.Array:
    """Combines the pairs of each tile of queries (or of keys), ``[S, M, ...]``."""
    count = tiles.reach.shape[1]
    tile = jnp.arange(count, dtype=jnp.int32)
    tail = (1,) * (x.ndim - 2)

    def add(distance, total):
        # The keys of a tile are met by its own queries and by those of later tiles.
        at = tile + distance if by_key else tile
        index = jnp.broadcast_to(at[None], tiles.first.shape)
        there = (distance < _rows(tiles.reach, index)) & (at < count)[None]
        more = _rows(x, _rows(tiles.first, index) + distance)
        there = there.reshape(*there.shape, *tail)
        return jnp.where(there, op(total, more), total)

    # Every tile meets itself.
    return jax.lax.fori_loop(1, jnp.max(tiles.reach), add, _rows(x, tiles.first))
