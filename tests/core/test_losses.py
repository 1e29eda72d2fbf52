"""Losses equal their dense definitions and are safe at the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbr_jax import losses
from sbr_jax.typing import UserError

B, T, V = 3, 6, 7


def sample(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, T, V)).astype(np.float32) * 3
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = (rng.random((B, T)) < 0.6).astype(np.float32)
    mask[:, 2] = 1
    return logits, tokens, mask


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_cross_entropy_equals_its_definition():
    logits, tokens, mask = sample()
    log_p = log_softmax(logits)
    expected = [
        np.mean([-log_p[b, t - 1, tokens[b, t]] for t in range(1, T) if mask[b, t]])
        for b in range(B)
    ]
    found = losses.token_cross_entropy(logits, tokens, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_first_column_of_the_mask_never_counts():
    logits, tokens, mask = sample()
    other = mask.copy()
    other[:, 0] = 1 - other[:, 0]
    for loss in (
        lambda m: losses.token_cross_entropy(logits, tokens, m),
        lambda m: losses.kl_to_reference(logits[::-1], logits, m),
    ):
        np.testing.assert_array_equal(loss(mask), loss(other))


def test_kl_equals_its_definition_and_has_this_direction():
    (ref, _, mask), (logits, *_) = sample(1), sample(2)
    log_r, log_p = log_softmax(ref), log_softmax(logits)
    kl = (np.exp(log_r) * (log_r - log_p)).sum(-1)
    expected = [
        np.mean([kl[b, t - 1] for t in range(1, T) if mask[b, t]]) for b in range(B)
    ]
    np.testing.assert_allclose(
        losses.kl_to_reference(ref, logits, mask), expected, rtol=1e-5
    )
    swapped = losses.kl_to_reference(logits, ref, mask)
    assert np.abs(swapped - np.asarray(expected)).max() > 0.1
    reverse = losses.kl_to_reference(ref, logits, mask, direction="reverse")
    np.testing.assert_array_equal(reverse, swapped)
    with pytest.raises(UserError, match="'forward' or 'reverse', got 'both'"):
        losses.kl_to_reference(ref, logits, mask, direction="both")


def test_no_gradient_to_the_references():
    (ref, _, mask), (logits, *_) = sample(1), sample(2)
    for direction in ("forward", "reverse"):
        kl = functools.partial(losses.kl_to_reference, mask=mask, direction=direction)
        assert not np.any(jax.grad(lambda r, kl=kl: kl(r, logits).sum())(ref))
        assert np.any(jax.grad(lambda x, kl=kl: kl(ref, x).sum())(logits))
    grad = jax.grad(lambda r: losses.hidden_state_anchor(logits, r).sum())(ref)
    assert not np.any(grad)


def test_the_edges_are_finite_and_reduced_in_float32():
    (ref, tokens, mask), (logits, *_) = sample(1), sample(2)
    ref[:, :, 0] = -np.inf  # A token that the reference rules out.
    kl = jax.value_and_grad(lambda x: losses.kl_to_reference(ref, x, mask).sum())
    assert all(np.isfinite(x).all() for x in kl(logits))
    empty = np.zeros((B, T), np.float32)

    def nothing(x):
        nll = losses.token_cross_entropy(x, tokens, empty)
        return (nll + losses.kl_to_reference(logits, x, empty)).sum()

    assert not any(np.any(x) for x in jax.value_and_grad(nothing)(logits))
    low = jnp.asarray(logits, jnp.bfloat16)
    loss = losses.token_cross_entropy(low, tokens, mask)
    assert loss.dtype == jnp.float32
    wide = losses.token_cross_entropy(low.astype(jnp.float32), tokens, mask)
    np.testing.assert_array_equal(loss, wide)


def test_anchor_reductions_differ_by_the_width():
    hidden, reference = sample(1)[0][:, 0], sample(2)[0][:, 0]
    total = losses.hidden_state_anchor(hidden, reference, reduction="sum")
    mean = losses.hidden_state_anchor(hidden, reference)
    np.testing.assert_allclose(total, ((hidden - reference) ** 2).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(total, mean * V, rtol=1e-6)
