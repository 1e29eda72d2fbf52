"""The KL anchor: keep the answers on safe data close to a reference's.

    L_KL = mean over D_safe of KL(p_ref ‖ p_θ) at the answer positions

This is SafeAnchor's L_anchor (arXiv:2604.17691) and SafeGrad's alignment loss
(arXiv:2508.07172).

The reference's states are computed once for the whole set, because the same examples
come again and again. The head runs on the states of both models, a chunk of places at a
time.

Symbols: θ adapter, γ the weight, τ temperature, N examples of the set, A answer tokens
of the longest answer, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.methods._compose import with_cost, with_pull
from sbr_jax.methods.base import Method, Problem, device_dataset, draw_rows
from sbr_jax.models import answers
from sbr_jax.typing import ApplyFn, Batch, PyTree, UserError

ROWS = ("tokens", "mask", "places", "targets", "shares")
"""Arrays of a set that are needed to compute its states."""


def with_kl_anchor(
    method: Method,
    *,
    weight: float,
    reference: str,
    direction: str,
    batch_size: int | None,
) -> Method:
    """Add γ L_KL to every step of a method, but not to its repairs.

    **Guarantee**: as for :func:`with_pull`, the method's own gradient stays as it is,
    and its projection does not touch the anchor's gradient.

    Args:
      method: any defence.
      weight: γ > 0.
      reference: the model whose answers are held: ``"previous"``, the model before the
        domain, or ``"aligned"``, the model before all domains.
      direction: direction of the divergence.
      batch_size: safety examples of a step; None for half the task batch.

    Returns:
      The method. It reports ``anchor``, L_KL.
    """

    def init(problem, base, adapter, key):
        return anchored_set(problem, base, adapter)

    def anchor(problem, base, adapter, state, batch, key):
        safe = safe_batch(problem, state, batch, key, batch_size)
        return anchor_loss(problem.apply_fn, base, adapter, safe, direction)

    def end_domain(problem, base, adapter, state, key):
        adapter, state = method.end_domain(problem, base, adapter, state, key)
        held = reference_states(problem, base, adapter, state["anchor"])
        return adapter, {**state, "anchor": {**state["anchor"], "reference": held}}

    anchored = with_pull(method, "anchor", init, anchor, weight=weight, repairs=False)
    if reference == "previous":
        anchored = dataclasses.replace(anchored, end_domain=end_domain)
    return with_cost(anchored, backward=0.5)


def anchored_set(
    problem: Problem, base: PyTree, adapter: PyTree | None
) -> dict[str, jax.Array]:
    """The calibration set on the device, with the reference's states ``[N, A, D]``.

    ``adapter`` is the reference's adapter; None for the aligned model.
    """
    safe = device_dataset(problem.calibration)
    return {**safe, "reference": reference_states(problem, base, adapter, safe)}


def reference_states(
    problem: Problem, base: PyTree, adapter: PyTree | None, safe: Batch
) -> jax.Array:
    """States ``[N, A, D]`` where a set's answers are predicted, from one pass over it.

    The set never changes, so no step has to run the reference again.
    """
    rows = {name: safe[name] for name in ROWS}
    with _mesh.using(_mesh.holding(base)):
        return _set_states(
            problem.apply_fn, problem.hardware.fisher_microbatch, base, adapter, rows
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _set_states(apply_fn, size, base, adapter, rows):
    if _mesh.current() is not None:
        return _set_states_on_mesh(apply_fn, size, base, adapter, rows)

    def one(row):
        batch = {name: value[None] for name, value in row.items()}
        return answers.states(apply_fn, base, adapter, batch)

    return jax.lax.map(one, rows, batch_size=size)


def _set_states_on_mesh(apply_fn, size, base, adapter, rows):
    """`_set_states` on a mesh, in batches whose rows are split over devices."""
    count, devices = len(rows["tokens"]), _mesh.parts(_mesh.ROWS, _mesh.current())
    size = -(-min(size, count) // devices) * devices
    steps = -(-count // size)

    def batched(x):
        filled = jnp.pad(x, [(0, steps * size - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(steps, size, *x.shape[1:])

    def some(batch):
        found = answers.states(apply_fn, base, adapter, batch)
        return found.reshape(size, -1, found.shape[-1])

    found = jax.lax.map(some, jax.tree.map(batched, rows))
    # The shape that single examples give without a mesh.
    return found.reshape(steps * size, *found.shape[2:])[:count]


def safe_batch(
    problem: Problem,
    state: Batch,
    batch: Batch,
    key: jax.Array,
    size: int | None,
    name: str = "kl_batch_size",
) -> Batch:
    """Draw a microbatch's share of the safety examples of one step.

    Args:
      problem: gives the batch size and the number of microbatches.
      state: the result of :func:`anchored_set`.
      batch: the task microbatch.
      key: key of the step.
      size: safety examples of the whole step. None for half the task batch, rounded
        down to a multiple of the number of microbatches (at least one for each).
      name: name of the size, for messages.

    Raises:
      UserError: for a size that the number of microbatches does not divide.
    """
    parts = problem.hardware.accumulation
    if size is None:
        size = max(problem.training.batch_size // (2 * parts), 1) * parts
    if size % parts:
        raise UserError(
            f"{name}: expected a multiple of accumulation ({parts}), got {size}"
        )
    return draw_rows(problem, state, batch, jax.random.fold_in(key, 1), size)


def anchor_loss(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree,
    safe: Batch,
    direction: str = "forward",
    temperature: float = 1.0,
) -> jax.Array:
    """L_KL: mean KL(p_ref ‖ p_θ) at the answer positions, ``p = softmax(logits / τ)``.

    In nats, on a safety minibatch that holds the reference's states. It is 0 with zero
    gradient if the adapter is the reference. The published direction is ``"forward"``.
    """
    hidden = answers.states(apply_fn, base, adapter, safe)
    kl = answers.kl_to_reference(
        apply_fn,
        base,
        safe["reference"].reshape(hidden.shape),
        hidden,
        answers.find(safe),
        direction=direction,
        temperature=temperature,
    )
    return jnp.mean(kl)
