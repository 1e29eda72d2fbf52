"""A tiny study with anchors, and what it takes to step and to look at SBR."""

import functools

import jax
import numpy as np
import tiny
from trees import jitter

from sbr_jax import models
from sbr_jax.data.batches import TokenDataset
from sbr_jax.methods.sbr import (
    anchor_prompts,
    hidden_anchor_loss,
    prompt_states,
    reference_states,
)

ANSWER = tiny.VOCAB - 1  # A token that no prompt of `requests` holds.
WIDTH = tiny.CONFIG.width


def requests(seed, size, shortest=2, longest=4):
    """Random prompts of several lengths, each answered by two tokens ANSWER."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((size, tiny.LENGTH), np.int32)
    mask = np.zeros((size, tiny.LENGTH), np.float32)
    for row, length in enumerate(rng.integers(shortest, longest + 1, size)):
        tokens[row, :length] = rng.integers(1, ANSWER, length)
        tokens[row, length : length + 2] = ANSWER
        mask[row, length : length + 2] = 1
    return TokenDataset(tokens, mask)


MODEL = tiny.model()
APPLY, BASE = MODEL.apply_fn, MODEL.params
HARMFUL = requests(4, 12)
KEY = jax.random.key(0)
PROBLEM = tiny.problem(
    apply_fn=APPLY,
    steps_per_domain=6,
    batch_size=8,
    calibration=tiny.dataset(1, 24, shift=0),
    harmful=HARMFUL,
    weight_decay=0.0,
)
FRESH = models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0, targets="(q|v)_proj")


MOVED = jitter(FRESH, 1)
ANCHORS = anchor_prompts(HARMFUL, 8, KEY)
REFERENCE = reference_states(PROBLEM, BASE, FRESH, ANCHORS)
STATE = {"anchor": {"prompts": ANCHORS, "reference": REFERENCE}}

states_of = jax.jit(functools.partial(prompt_states, APPLY))


@functools.partial(jax.jit, static_argnames="reduction")
def loss_and_gradient(adapter, reference, reduction="mean"):
    return jax.value_and_grad(
        lambda a, r: hidden_anchor_loss(PROBLEM, BASE, a, ANCHORS, r, reduction),
        argnums=(0, 1),
    )(adapter, reference)


def prompts_of(found):
    """The prompts as a list of tuples without padding."""
    pairs = zip(np.asarray(found["tokens"]), found["last"], strict=True)
    return [tuple(row[: int(last) + 1].tolist()) for row, last in pairs]
