"""One GCG attack on the tiny model, and its loss in NumPy: for the tests of GCG."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sbr_jax import models
from sbr_jax.attacks import candidates
from sbr_jax.attacks.gcg import gcg

MODEL = tiny.model()
PROMPTS = [([1, 5, 9], [2]), ([1, 4], [2, 3]), ([1, 7, 7, 8, 9], [])]
TARGETS = [[11, 12], [13, 14, 15], [16]]
FIRST, LENGTH, STEPS, BREADTH = 20, 4, 6, 32
FORBIDDEN = [0, 1, 2, 3, 26]
ALLOWED = np.ones(tiny.VOCAB, bool)
ALLOWED[FORBIDDEN] = False
EXTEND = models.make_extend_fn(MODEL.config, MODEL.hardware)


def attack(prompts=PROMPTS, targets=TARGETS, adapter=None, model=MODEL, **changes):
    options = {
        "key": jax.random.key(0),
        "allowed": ALLOWED,
        "initial_token": FIRST,
        "suffix_length": LENGTH,
        "steps": STEPS,
        "candidates": BREADTH,
        "top_k": 8,
    }
    return gcg(
        model.apply_fn,
        model.params,
        adapter,
        prompts,
        targets,
        **{**options, **changes},
    )


@functools.cache
def found(**changes):
    return attack(**changes)


@jax.jit
def gradient(params, pairs, row, suffix):
    """L of one prompt, and its gradient with respect to the one-hot suffix."""
    rows = {name: jnp.asarray(value)[None] for name, value in row.items()}
    span, run = rows["tokens"].shape[1], MODEL.apply_fn
    loss, pull = candidates._pulls(run, span, params, pairs, rows, suffix[None])
    return loss[0], candidates._slope(params, pull[0])


FORWARD = jax.jit(MODEL.apply_fn)


def dense_loss(prompt, suffix, target, adapter=None):
    """Mean −log p of the target, of one sequence as it is, in NumPy float64."""
    tokens = [*prompt[0], *suffix, *prompt[1], *target]
    logits = FORWARD(MODEL.params, adapter, np.array([tokens], np.int32))[0]
    logits = np.asarray(logits, np.float64)
    first = len(tokens) - len(target)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.mean([scores[t - 1, tokens[t]] for t in range(first, len(tokens))])


def adapter(seed=3, config=MODEL.config):
    """An adapter that does something: B ≠ 0."""
    pairs = models.init_adapter(
        jax.random.key(seed), config, rank=2, alpha=4.0, targets=r"(q|v|up)_proj"
    )
    noise = np.random.default_rng(seed)
    return {
        name: dataclasses.replace(
            pair, lora_b=jnp.asarray(noise.normal(0, 0.3, pair.lora_b.shape), "float32")
        )
        for name, pair in pairs.items()
    }


def same(one, other):
    np.testing.assert_array_equal(one.suffixes, other.suffixes)
    np.testing.assert_array_equal(one.best_suffixes, other.best_suffixes)
    # Float32 rounding of other shapes, on losses near 3.
    np.testing.assert_allclose(one.losses, other.losses, atol=1e-5)
    np.testing.assert_allclose(one.best_losses, other.best_losses, atol=1e-5)
