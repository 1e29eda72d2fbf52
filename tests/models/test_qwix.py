"""Our codes beside those of qwix, Google's library for quantised JAX models.

Needs ``pip install qwix``; tried with 0.1.8.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbr_jax.models.codes import encode, nf4_levels

qwix = pytest.importorskip("qwix")

LEVELS = np.asarray(nf4_levels())
SAME_STEP = f"absmax,{127.5 / 127!r}"
"""qwix spreads int8 over ±127.5 and we over ±127: with this both steps are a / 127."""


def theirs(matrix, kind, calibration="absmax"):
    """qwix's codes and scales of ``[in, out]``, and the weights they stand for."""
    how = (
        {"qtype": "nf4", "tiled_axes": {0: 64}}
        if kind == "nf4"
        else {"qtype": jnp.int8, "calibration_method": calibration}
    )
    with contextlib.ExitStack() as stack:
        # It promotes; the numbers are float32 all the same.
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        found = qwix.quantize(matrix, channelwise_axes=(1,), **how)
        dense = qwix.dequantize(found)
    return np.asarray(found.qvalue).astype(int), np.asarray(found.scale), dense


def ours(matrix, kind):
    """Our codes, one a byte, scales, and the weights they stand for."""
    found = encode(matrix, kind)
    codes = np.asarray(found.codes)
    if kind == "nf4":
        codes = np.stack([codes >> 4, codes & 15], 1).reshape(matrix.shape)
    return codes.astype(int), np.asarray(found.scales), found.dense(jnp.float32)


def undecided(matrix, kind):
    """Weights so near to the middle of two codes that float32 may take either.

    Relative to a, qwix's levels are off by 3e-7, as the paper printed them; steps that
    differ in their last bit move a code by 127 · 6e-8.
    """
    exact = np.asarray(matrix, np.float64)
    size = 64 if kind == "nf4" else len(exact)
    largest = np.abs(exact.reshape(-1, size, exact.shape[1])).max(1)
    unit = exact / np.repeat(np.where(largest > 0, largest, 1.0), size, axis=0)
    if kind == "int8":
        return np.abs(np.abs(127 * unit) % 1 - 0.5) < 4e-5
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    return np.abs(unit[..., None] - middles).min(-1) < 1e-6


def agree(matrix, kind):
    """Codes, scales and decoded weights are qwix's."""
    codes, scales, dense = ours(matrix, kind)
    their_codes, their_scales, their_dense = theirs(matrix, kind, SAME_STEP)
    near = undecided(matrix, kind)
    assert near.mean() < 1e-3
    np.testing.assert_array_equal(codes[~near], their_codes[~near])
    assert len(np.unique(codes)) > (14 if kind == "nf4" else 150)
    used = scales > 0  # A block of zeros has scale 0 here and 1 there.
    np.testing.assert_allclose(scales[used], their_scales[used], rtol=2e-7)
    # The published levels once more; a tie costs a whole step, so it is left out.
    largest = float(jnp.max(jnp.abs(matrix)))
    np.testing.assert_allclose(
        np.asarray(dense)[~near], np.asarray(their_dense)[~near], atol=5e-7 * largest
    )
    return codes.size, int(near.sum()), int((codes != their_codes).sum())


def weight():
    """Normal, with a column and a block of zeros."""
    matrix = jax.random.normal(jax.random.key(0), (256, 96))
    return matrix.at[:, 5].set(0.0).at[64:128, 7].set(0.0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_scales_and_weights_are_qwixs(kind):
    agree(weight(), kind)
