"""Codes of single matrices against a slow twin, and what they cost and lose."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantize_case import BLOCK, nbytes, weight
from trees import same

from sbr_jax.models.codes import KINDS, encode, nf4_levels

LEVELS = np.asarray(nf4_levels())
# Appendix E of arXiv:2305.14314, which was computed from a rounded δ.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def twin(matrix, kind, block):
    """Codes, scales and decoded weights, one block at a time in float64."""
    matrix = np.asarray(matrix.astype(jnp.float32), np.float64)
    inputs, outputs = matrix.shape
    size = inputs if kind == "int8" else block
    codes = np.zeros((-(-inputs // size) * size, outputs), int)
    scales = np.zeros((-(-inputs // size), outputs))
    for n, start in enumerate(range(0, inputs, size)):
        for out in range(outputs):
            values = matrix[start : start + size, out]
            largest = np.abs(values).max()
            scales[n, out] = largest / 127 if kind == "int8" else largest
            for i, value in enumerate(values):
                unit = value / largest if largest else 0.0
                near = np.abs(LEVELS - unit).argmin()
                codes[start + i, out] = np.round(127 * unit) if kind == "int8" else near
            if kind != "int8":
                codes[start + len(values) : start + size, out] = 7
    if kind == "nf4-double":
        centred = scales - scales.mean()
        for row in centred:
            for start in range(0, outputs, 256):
                group = row[start : start + 256]
                step = np.abs(group).max() / 127
                group[:] = np.round(group / step) * step
        scales = scales.mean() + centred
    units = codes if kind == "int8" else LEVELS[codes]
    return codes, scales, (units * np.repeat(scales, size, axis=0))[:inputs]


def unpack(codes):
    halves = np.stack([codes >> 4, codes & 15], axis=1)
    return halves.reshape(-1, codes.shape[-1])


def test_the_levels_are_the_published_ones():
    assert len(LEVELS) == 16
    assert LEVELS[7] == 0
    assert (np.diff(LEVELS) > 0).all()
    np.testing.assert_allclose(LEVELS, PUBLISHED, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "dtype"), [(3, "float32"), (300, "bfloat16")])
def test_codes_equal_the_slow_definition(kind, outputs, dtype):
    matrix = weight(outputs=outputs, dtype=jnp.dtype(dtype))
    found = encode(matrix, kind, BLOCK)
    codes, scales, dense = twin(matrix, kind, BLOCK)
    got = np.asarray(found.codes)
    np.testing.assert_array_equal(unpack(got) if kind != "int8" else got, codes)
    if kind != "nf4-double":
        np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    # A scale that lies between two of its codes may round either way.
    atol = 0.015 if kind == "nf4-double" else 2e-6
    np.testing.assert_allclose(found.dense(jnp.float32), dense, atol=atol, rtol=0)
    assert (found.shape, found.ndim, found.dtype) == (matrix.shape, 2, matrix.dtype)
    assert found.dense().dtype == matrix.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_bounded_and_the_bound_is_met(kind):
    matrix = np.asarray(weight(160, 300))
    found = encode(jnp.asarray(matrix), kind, BLOCK)
    error = np.abs(np.asarray(found.dense()) - matrix)
    if kind == "int8":
        largest = np.abs(matrix).max(0, keepdims=True)
        bound = largest / 254
    else:
        largest = np.abs(matrix.reshape(-1, BLOCK, 300)).max(1)
        largest = np.repeat(largest, BLOCK, axis=0)
        bound = np.diff(LEVELS).max() / 2 * largest
        assert np.isclose(np.diff(LEVELS).max() / 2, 0.152, atol=1e-3)
    if kind == "nf4-double":
        # A scale is off by at most half a step of its group.
        bound = bound + np.abs(largest - largest.mean()).max() / 254
    assert (error <= bound + 1e-6).all()
    assert (error / bound).max() > 0.9


def test_levels_survive_and_rounding_again_changes_nothing():
    matrix = jnp.asarray(np.tile(LEVELS, 2)[:, None] * [[4.0, 0.5]], jnp.float32)
    found = encode(matrix, "nf4", 16)
    np.testing.assert_array_equal(unpack(np.asarray(found.codes))[:16, 0], range(16))
    np.testing.assert_array_equal(found.dense(), matrix)
    same(encode(found.dense(), "nf4", 16), found)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    matrix = weight().at[8:16].set(0.0).at[:, 1].set(0.0)
    dense = np.asarray(encode(matrix, kind, BLOCK).dense())
    assert (dense[np.asarray(matrix) == 0] == 0).all()
    assert np.isfinite(dense).all()
    assert np.any(dense)


@pytest.mark.parametrize(
    ("kind", "per_weight"),
    [("nf4", 0.5 + 4 / 64), ("nf4-double", 0.516), ("int8", 1 + 4 / 256)],
)
def test_bytes_for_a_weight(kind, per_weight):
    found = encode(weight(256, 512, jnp.bfloat16), kind)
    # Four bytes of the mean, and four a group: 0.5 + (1 + 4 / 256) / 64 = 0.51587.
    assert found.nbytes == nbytes(found)
    np.testing.assert_allclose(found.nbytes / (256 * 512), per_weight, atol=2e-4)
