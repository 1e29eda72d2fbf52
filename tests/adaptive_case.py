"""A tiny study with harmful and benign prompts, and gradients of weighted steps."""

import functools

import jax
import numpy as np
import tiny
from trees import jitter

from sbr_jax.data import batch
from sbr_jax.methods.adaptive import adaptive_loss, adaptive_probe
from sbr_jax.methods.base import task_gradient
from sbr_jax.methods.risk import judged
from sbr_jax.models import answers
from sbr_jax.training.program import init_adapter

KEY = jax.random.key(0)
STUDY = tiny.study()
BASE = STUDY.model.params
FRESH = init_adapter(STUDY, tiny.config(), 0)
TRAIN = STUDY.domains["medical"].train


# Harmful prompts hold other tokens than benign ones, but for the last, which says
# nothing: only attention can tell.
HARMFUL = tiny.with_prompts(tiny.dataset(4, 64, shift=7), 26, 32)
BENIGN = tiny.with_prompts(tiny.dataset(3, 64, shift=5), 0, 6)
PROBLEM = tiny.problem(
    apply_fn=STUDY.model.apply_fn,
    steps_per_domain=6,
    batch_size=8,
    calibration=STUDY.calibration,
    calibration_controls={"benign": BENIGN},
    harmful=HARMFUL,
    judge=tiny.judge,
)


MOVED = jitter(FRESH, 1, 0.3)  # No gradient is zero there.


def eight(risk=None):
    """Eight training examples; the risks of the tiny judge unless given."""
    drawn = dict(batch(judged(tiny.judge, TRAIN), 8, 0, 0))
    if risk is not None:
        drawn["risk"] = np.asarray(risk, np.float32)
    return drawn


@functools.cache
def gradient_of(maker, **options):
    return jax.jit(functools.partial(maker(**options).gradient, PROBLEM))


plain_gradient = jax.jit(functools.partial(task_gradient, PROBLEM))
forward = jax.jit(PROBLEM.apply_fn)


@jax.jit
def weighted(adapter, drawn, alpha, beta):
    """The loss and its gradient with given weights: one program for all of them."""
    reference = answers.states(PROBLEM.apply_fn, BASE, None, drawn)

    def loss(a):
        return adaptive_loss(PROBLEM, BASE, a, drawn, reference, alpha, beta, KEY)[0]

    return jax.value_and_grad(loss)(adapter)


@functools.cache
def probe_state():
    return adaptive_probe().init(PROBLEM, BASE, FRESH, KEY)


# --- the loss -----------------------------------------------------------------------


def slow_parts(adapter, drawn):
    """NLL and KL of each example in float64, token by token."""

    def log_probs(a):
        logits = np.asarray(forward(BASE, a, drawn["tokens"]), np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    ours, theirs = log_probs(adapter), log_probs(None)
    nll, kl = [], []
    for row, tokens in enumerate(drawn["tokens"]):
        mask = drawn["mask"][row]
        places = [t for t in range(1, len(tokens)) if mask[t] == 1]
        nll.append(np.mean([-ours[row, t - 1, tokens[t]] for t in places]))
        gaps = [
            np.sum(np.exp(theirs[row, t - 1]) * (theirs[row, t - 1] - ours[row, t - 1]))
            for t in places
        ]
        kl.append(np.mean(gaps))
    return np.array(nll), np.array(kl)
