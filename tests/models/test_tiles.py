"""Attention in tiles equals masked attention over whole rows, with its gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers

from sbr_jax.data.layout import Layout, pack
from sbr_jax.models import tiles as tiling
from sbr_jax.models.layers import sees, soft_cap

# Sums of some hundred products of numbers near 1 in float32.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def drawn(lengths, heads, groups, size, rows=1, seed=0, dtype=jnp.float32):
    """Packed rows of these lengths, and random queries, keys, values and weights."""
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    there = np.arange(longest) < np.array(lengths)[:, None]
    examples = {"tokens": there.astype(np.int32), "mask": there.astype(np.float32)}
    layout = Layout(longest, True, 8, rows=rows)
    width = sum(lengths) + 5
    found = pack(examples, layout, width, rows * 2 * width, 400)
    sizes = (heads, groups, groups, heads)
    arrays = [rng.normal(size=(rows, width, n, size)) for n in sizes]
    tiles = tiling.tiles_of(*(jnp.asarray(found[n]) for n in ("pairs", "segments")))
    return tiles, [jnp.asarray(x, dtype) for x in arrays]


def whole(query, key, value, segments, *, window=None, scale=None, cap=None):
    """The slow twin: every score of a row."""
    width = query.shape[1]
    own = segments.reshape(segments.shape[0], -1)[:, :width]
    place = jnp.arange(width)[None]
    seen = sees(place, place, window)[:, 0] & (own[:, :, None] == own[:, None])
    key, value = (
        jnp.repeat(x, query.shape[2] // key.shape[2], 2) for x in (key, value)
    )
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key)
    scores = soft_cap(
        scores * (query.shape[-1] ** -0.5 if scale is None else scale), cap
    )
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), value)


SHAPES = {
    "short examples": ([5, 9, 3, 30, 17, 2], 4, 4, 8),
    "across many tiles": ([300, 40, 7, 120], 6, 2, 16),
    "one example": ([70], 2, 1, 4),
    "one token each": ([1, 1, 1], 2, 2, 4),
    "ends at a tile": ([32, 64, 32], 4, 1, 8),
}
OPTIONS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"cap": 2.0},
    "window": {"window": 11},
}


CASES = list(itertools.product(OPTIONS, SHAPES))
KEPT = [x for x in CASES if x[0] == "plain" or x[1] == "across many tiles"]


@pytest.mark.parametrize(("option", "shape"), tiers.few(CASES, KEPT))
def test_tiles_equal_whole_rows_with_their_gradients(option, shape):
    tiles, (query, key, value, weight) = drawn(*SHAPES[shape])
    how = dict(OPTIONS[option])
    mask = tiling.tile_mask(tiles, how.pop("window", None))
    real = (tiles.segments.reshape(1, -1)[:, : query.shape[1]] > 0)[..., None, None]

    def ours(*arrays):
        found = tiling.attend_tiles(*arrays, tiles, mask, **how)
        return jnp.sum(jnp.where(real, found * weight, 0.0)), found

    def twin(*arrays):
        found = whole(*arrays, tiles.segments, **OPTIONS[option])
        return jnp.sum(jnp.where(real, found * weight, 0.0)), found

    results = []
    for function in (ours, twin):
        step = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))
        with jax.default_matmul_precision("highest"):
            (_, found), grads = step(query, key, value)
        results.append((jnp.where(real, found, 0.0), grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), *results)


def test_rows_and_seeds_are_kept_apart():
    tiles, arrays = drawn([40, 9, 33, 21, 50], 4, 2, 8, rows=2)
    found = tiling.attend_tiles(*arrays[:3], tiles, tiling.tile_mask(tiles))
    for row in range(2):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], (tiles, arrays))
        same = tiling.attend_tiles(*alone[1][:3], alone[0], tiling.tile_mask(alone[0]))
        np.testing.assert_allclose(found[row : row + 1], same, rtol=1e-6, atol=1e-6)

    def total(query, tiles):
        mask = tiling.tile_mask(tiles)
        return jnp.sum(tiling.attend_tiles(query, *arrays[1:3], tiles, mask) ** 2)

    # Another seed has other pairs, and so other bounds of its loops.
    several = [tiles, drawn([9, 100, 4, 20, 20], 4, 2, 8, rows=2)[0]]
    slopes = jax.vmap(jax.grad(total), (None, 0))(
        arrays[0], jax.tree.map(lambda *x: jnp.stack(x), *several)
    )
    for found, own in zip(slopes, several, strict=True):
        same = jax.grad(total)(arrays[0], own)
        np.testing.assert_allclose(found, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "size"), [(128, 32), (200, 64), (7, 32)])
def test_causal_rows_skip_what_is_not_seen(length, size):
    tiles = tiling.causal_tiles(2, length, size)
    count = -(-length // size)
    assert tiles.queries.shape[1] == count * (count + 1) // 2
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 8) for heads in (4, 2, 2)]
    arrays = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
    found = tiling.attend_tiles(*arrays, tiles, tiling.tile_mask(tiles))
    wanted = jax.nn.dot_product_attention(*arrays, is_causal=True)
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_half_precision_sums_in_float32():
    tiles, arrays = drawn([300, 90], 4, 2, 16, dtype=jnp.bfloat16)
    mask = tiling.tile_mask(tiles)
    half = tiling.attend_tiles(*arrays[:3], tiles, mask)
    assert half.dtype == jnp.bfloat16
    wide = [x.astype(jnp.float32) for x in arrays[:3]]
    found = tiling.attend_tiles(*wide, tiles, mask)
    # bfloat16 keeps 8 bits of each share and each value.
    np.testing.assert_allclose(half.astype(jnp.float32), found, rtol=0.02, atol=0.02)
