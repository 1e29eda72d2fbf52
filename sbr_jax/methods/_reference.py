"""The aligned model's answers on the calibration set, cached once as top tokens.

    KL_k(p_θ₀ ‖ p_θ) = Σ_top p (log p − log q) + p_rest (log p_rest − log q_rest)

Each answer place keeps the k likeliest tokens of p = p_θ₀ with their probabilities, and
one bucket for all others. So no step runs the reference's layers or its head, and a
place takes 2 k + 1 numbers.

The cache also holds checksums of model and data, so that a cache from another model is
refused.

Symbols: N calibration examples, A answer tokens of the longest, k tokens kept, B
examples of a batch, K its answer places.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.methods._anchor import reference_states
from sbr_jax.methods.base import Problem, device_dataset
from sbr_jax.models import answers, vocabulary
from sbr_jax.typing import ApplyFn, Batch, PyTree, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reference:
    """The aligned model's top tokens at the answer places of the calibration set.

    Attributes:
      top: ``[N, A, k]``, ``[N, A, k]`` and ``[N, A]``.
      mark: uint32 ``[2]``, checksums of the base weights and of the calibration set.
    """

    top: vocabulary.Top
    mark: jax.Array


def cache_reference(problem: Problem, base: PyTree, k: int) -> Reference:
    """Run the aligned model once over the calibration set.

    Args:
      problem: gives the set.
      base: the aligned weights.
      k: tokens kept at a place; capped at the size of the vocabulary.
    """
    safe = device_dataset(problem.calibration)
    states = reference_states(problem, base, None, safe)
    with _mesh.using(_mesh.holding(base)):
        top = _top(problem.apply_fn, k, base, states)
    return Reference(top, mark_of(problem, base))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _top(apply_fn: ApplyFn, k: int, base: PyTree, states: jax.Array) -> vocabulary.Top:
    head, flat = answers.head_of(apply_fn), states.reshape(-1, states.shape[-1])
    found = vocabulary.top(head, base, flat, k)
    return jax.tree.map(lambda x: x.reshape(*states.shape[:2], *x.shape[1:]), found)


def tied_losses(
    apply_fn: ApplyFn,
    base: PyTree,
    hidden: jax.Array,
    batch: Batch,
    reference: Reference,
) -> jax.Array:
    """Each example's mean over its answer: KL_k if tied, else NLL.

    **Guarantee**: for a tied example, 0 with a zero gradient at the cached model, up to
    rounding, and at most the full KL elsewhere.

    Args:
      apply_fn: the model.
      base: its weights.
      hidden: ``answers.states`` of the batch.
      batch: a batch in any layout, with ``"tied" [B]``: rows of the reference, or −1.
      reference: the cache for the calibration set.

    Returns:
      float32 ``[B]``, in nats.
    """
    found = answers.find(batch)
    row, rank = found.of_place(jnp.asarray(batch["tied"])), found.ranks()
    picked = jax.tree.map(
        lambda x: x[jnp.maximum(row, 0), jnp.minimum(rank, x.shape[1] - 1)],
        reference.top,
    )
    values = vocabulary.learnt_or_held(
        answers.head_of(apply_fn),
        base,
        hidden,
        found.targets,
        row >= 0,
        picked,
        rows=found.rows,
    )
    return found.mean(values)


def mark_of(problem: Problem, base: PyTree) -> jax.Array:
    """A checksum of the base weights and one of the calibration set, uint32 ``[2]``."""
    safe = device_dataset(problem.calibration)
    return jnp.stack([_checksum(base), _checksum((safe["tokens"], safe["mask"]))])


def require_own(name: str, problem: Problem, base: PyTree, found: Reference) -> None:
    """Refuse a cache from another model or from other data.

    Raises:
      UserError: naming which of the two differs.
    """
    same = jax.device_get(found.mark == mark_of(problem, base))
    if not same.all():
        other = "model" if not same[0] else "calibration set"
        raise UserError(
            f"{name}: expected a reference cached from this model and calibration set, "
            f"got one of another {other}: start anew, from `init`"
        )


@jax.jit
def _checksum(tree: PyTree) -> jax.Array:
    """Σ (2 i + 1) mixed(word_i) over the leaves, modulo 2³²: the same on any mesh."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(leaf.dtype.itemsize)
        words = leaf if size is None else jax.lax.bitcast_convert_type(leaf, size)
        words = words.astype(jnp.uint32).reshape(-1)
        # Mixing keeps changes of many words (such as all signs) from cancelling.
        words = (words ^ (words >> 15)) * jnp.uint32(0x2C1B3C6D)
        words = (words ^ (words >> 12)) * jnp.uint32(0x297A2D39)
        words = words ^ (words >> 15)
        places = jax.lax.iota(jnp.uint32, words.size)
        total = total * jnp.uint32(31) + jnp.sum(
            words * (2 * places + jnp.uint32(1)), dtype=jnp.uint32
        )
    return total
