"""SBR: hold the last hidden state of a few harmful prompts where alignment left it.

Lu, Sha, Wang, Sun, Zhou, Dai, Xiao, arXiv:2605.05995 (Safety Anchor). Weights are so
redundant that harmful fine-tuning finds a way around a constraint on them, but every
answer has to pass the unembedding. So SBR holds the state that enters the unembedding:

    L = L_task + λ L_anchor                                    λ = 50
    L_anchor = (1/K) Σ_k ‖h_θ(x_k) − h_θ₀(x_k)‖² / D

h is the state after the final norm at the last token of the prompt, the position that
predicts the first answer token; θ₀ is the aligned model. The paper writes the squared
norm. Its code takes the mean over the D entries, and the published λ belongs to that.

Every step uses all K anchors. The paper's are eight requests written by hand. Here they
are drawn from the defender's own harmful requests, without their answers.

Choices that no public source fixes: the anchors' pass has no LoRA dropout; the held
states are the aligned model's in all domains; repairs are anchored too.

Symbols: θ adapter, x prompt, K anchors, N examples, B batch, T tokens, D width.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, losses
from sbr_jax.checks import checked
from sbr_jax.data import TokenDataset
from sbr_jax.methods._compose import with_cost, with_pull
from sbr_jax.methods.base import Method, Problem
from sbr_jax.methods.probe import distinct_prompts
from sbr_jax.models import answers
from sbr_jax.settings import Count, NonNegative
from sbr_jax.typing import ApplyFn, PyTree, UserError

Anchors = Mapping[str, jax.Array]
"""``{"tokens": int32 [K, T], "last": int32 [K]}``: prompts, and where each one ends."""

BATCH = 16
"""Examples in a task batch, for the cost of anchors."""


@checked
def sbr(
    *,
    anchors: Count = 8,
    anchor_weight: NonNegative = 50.0,
    reduction: Literal["mean", "sum"] = "mean",
    monitored: bool = False,
) -> Method:
    """SBR with the published defaults.

    Args:
      anchors: K ≥ 1, drawn from ``problem.harmful``; each seed draws its own.
      anchor_weight: λ ≥ 0; 0 is plain fine-tuning that reports how far states drift.
      reduction: ``"mean"`` over the D entries of a state (the code, to which λ = 50
        belongs) or their ``"sum"`` (the paper's formula; D times larger at the same λ).
      monitored: run CSM.

    Returns:
      The method. It reports ``anchor``, L_anchor without λ. Its ``optimizer``, which is
      built before any other work, raises a UserError if there are fewer than K distinct
      harmful prompts.

    References:
      arXiv:2605.05995
    """
    return with_hidden_anchor(
        Method("sbr", monitored),
        "anchor",
        anchors=anchors,
        weight=anchor_weight,
        reduction=reduction,
    )


# --- the pieces, for other methods --------------------------------------------------


def with_hidden_anchor(
    method: Method,
    name: str,
    *,
    anchors: int,
    weight: float,
    reduction: str = "mean",
    bare: bool = False,
) -> Method:
    """Add λ L_anchor to every step of a method, including repairs.

    Args:
      method: any defence.
      name: name of the penalty in the state and the metrics.
      anchors: K.
      weight: λ.
      reduction: reduction over a state's entries.
      bare: measure the references without the fresh adapter, which only changes their
        rounding, and report the penalty including λ.

    Returns:
      The method. Its ``optimizer`` refuses too few harmful prompts.
    """

    def optimizer(problem, adapter, learning_rate):
        distinct_anchors(problem.harmful, anchors)
        return method.optimizer(problem, adapter, learning_rate)

    def init(problem, base, adapter, key):
        drawn = anchor_prompts(problem.harmful, anchors, key)
        held = reference_states(problem, base, None if bare else adapter, drawn)
        return {"prompts": drawn, "reference": held}

    def loss(problem, base, adapter, state, batch, key):
        value = hidden_anchor_loss(
            problem, base, adapter, state["prompts"], state["reference"], reduction
        )
        return weight * value if bare else value

    outside = 1.0 if bare else weight
    pulled = with_pull(method, name, init, loss, weight=outside)
    pulled = dataclasses.replace(pulled, optimizer=optimizer)
    return with_cost(pulled, backward=anchors / BATCH)


def distinct_anchors(dataset: TokenDataset | None, count: int) -> TokenDataset:
    """Distinct prompts of a data set, to draw anchors from.

    Raises:
      UserError: without requests, for a request without a prompt or an answer, or for
        fewer than ``count`` distinct prompts.
    """
    if dataset is None or not len(dataset):
        raise UserError(
            "anchors: expected harmful requests to draw from, got "
            f"{'None' if dataset is None else 'an empty set'}: give the study some in "
            "`harmful`, or choose a defence without anchors"
        )
    usable = (dataset.mask > 0).any(axis=1) & (dataset.mask[:, 0] == 0)
    if not usable.all():
        raise UserError(
            "anchors: expected harmful requests with a prompt and an answer after it, "
            f"got {len(dataset) - usable.sum()} of {len(dataset)} without: remove them"
        )
    distinct = distinct_prompts(dataset)
    if len(distinct) < count:
        raise UserError(
            f"anchors: expected at least {count} distinct harmful prompts, got "
            f"{len(distinct)}: give more requests in `harmful`, or lower `anchors`"
        )
    return distinct


def anchor_prompts(
    dataset: TokenDataset | None, count: int, key: jax.Array
) -> dict[str, jax.Array]:
    """Draw K = ``count`` distinct prompts and cut off their answers.

    **Guarantee**: with the same key, a smaller draw is the start of a larger one. Every
    key gives the same shapes (T is the longest prompt of the whole set), so that seeds
    can be stacked and share a program. Nothing of an answer is left.

    Returns:
      ``tokens [K, T]``, zero after the prompt, and ``last [K]``, each prompt's last
      place.

    Raises:
      UserError: as :func:`distinct_anchors`.

    >>> tokens, mask = np.array([[5, 6, 7, 0]]), np.array([[0, 0, 1, 0]])
    >>> found = anchor_prompts(TokenDataset(tokens, mask), 1, jax.random.key(0))
    >>> found["tokens"].tolist(), found["last"].tolist()
    ([[5, 6]], [1])
    """
    distinct = distinct_anchors(dataset, count)
    last = np.argmax(distinct.mask > 0, axis=1) - 1
    places = np.arange(last.max() + 1)
    prompts = np.where(
        places[None] <= last[:, None], distinct.tokens[:, : len(places)], 0
    )
    rows = jax.random.permutation(key, len(distinct))[:count]
    return {
        "tokens": jnp.asarray(prompts, jnp.int32)[rows],
        "last": jnp.asarray(last, jnp.int32)[rows],
    }


def prompt_states(
    apply_fn: ApplyFn, base: PyTree, adapter: PyTree | None, anchors: Anchors
) -> jax.Array:
    """States ``[K, D]`` after the final norm at the last token of each prompt.

    **Guarantee**: with a causal model, padding has no influence.
    """
    hidden = answers.hidden(apply_fn, base, adapter, anchors)
    places = anchors["last"][:, None, None]
    return jnp.take_along_axis(hidden, places, axis=1)[:, 0]


# Compiled, so that the logits are never computed.
_compiled_states = functools.partial(jax.jit, static_argnums=0)(prompt_states)


def reference_states(
    problem: Problem, base: PyTree, adapter: PyTree | None, anchors: Anchors
) -> jax.Array:
    """States h_θ₀(x_k) to hold, float32 ``[K, D]``, measured once.

    With a fresh adapter or None, these are the aligned model's states. With a trained
    adapter, they are the trained model's.
    """
    with _mesh.using(_mesh.holding(base)):
        states = _compiled_states(problem.apply_fn, base, adapter, anchors)
    return states.astype(jnp.float32)


def hidden_anchor_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    anchors: Anchors,
    reference: jax.Array,
    reduction: str,
) -> jax.Array:
    """L_anchor = (1/K) Σ_k ‖h_θ(x_k) − h_θ₀(x_k)‖², over D with ``"mean"``.

    **Guarantee**: no gradient flows to the reference ``[K, D]``; at θ₀ value and
    gradient are 0 up to rounding; ``"sum"`` is D times ``"mean"``.
    """
    states = prompt_states(problem.apply_fn, base, adapter, anchors)
    return jnp.mean(losses.hidden_state_anchor(states, reference, reduction=reduction))
