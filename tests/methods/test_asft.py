"""AsFT against dense definitions."""

import jax
import numpy as np
import pytest
from trees import vector
from weight_space_case import (
    BASE,
    PROBLEM,
    TUNED,
    dense_c,
    gradient,
    layers_of,
    paper_update,
    repair_gradients,
)

from sbr_jax.methods._alignment_direction import alignments
from sbr_jax.methods.asft import outside


def dense_penalty(adapter):
    total = 0.0
    for name, layer in layers_of(adapter):
        update = paper_update(name, layer, adapter)
        total += np.linalg.norm(update - dense_c(name, layer) @ update) ** 2
    return total


def test_asft_penalty_is_the_papers():
    found = alignments(PROBLEM, BASE, TUNED, "test")
    np.testing.assert_allclose(outside(TUNED, found), dense_penalty(TUNED), rtol=1e-4)
    np.testing.assert_allclose(
        gradient("asft", TUNED)[2]["penalty"], dense_penalty(TUNED), rtol=1e-4
    )


def test_asft_adds_lambda_times_the_gradient_of_the_penalty():
    difference = vector(gradient("asft", TUNED)[0]) - vector(
        gradient("plain", TUNED)[0]
    )

    def along(size):
        return dense_penalty(jax.tree.map(lambda x: x + size, TUNED))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    # A central difference of a quartic: an error of the order of the step squared.
    np.testing.assert_allclose(difference.sum(), slope, rtol=1e-2)
    assert np.abs(difference).max() > 1e-2


@pytest.mark.thorough
def test_asft_penalises_a_repair_too():
    ours, theirs = repair_gradients("asft", TUNED, TUNED)
    wanted = vector(gradient("asft", TUNED)[0]) - vector(gradient("plain", TUNED)[0])
    # Differences of gradients of order one: absolute, some of their roundings.
    np.testing.assert_allclose(
        vector(ours[0]) - vector(theirs[0]), wanted, atol=1e-5, rtol=1e-4
    )
