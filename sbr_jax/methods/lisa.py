"""Lisa: alternate between user data and alignment data, near the last turn's weights.

Huang, Hu, Ilhan, Tekin, Liu, arXiv:2405.18641. Training alternates between two states.
Each has its own data, and a proximal term pulls it towards where the other one ended:

    alignment:  min L_safe(w) + (ρ/2) ‖w − w_other‖²
    user:       min L_task(w) + (ρ/2) ‖w − w_other‖²

w_other are the weights at the last switch, ρ = 1, and the norm runs over the whole
adapter. As in the released code, training begins with alignment, and the first 10 % of
steps have no proximal term.

**Cycles.** Published: 100 alignment steps, then 900 user steps, 20 such cycles in
20,000 steps. A shorter run keeps the number of cycles, not their length: the default
``period`` of 10 steps (1 + 9) makes 20 cycles in a domain of 200 steps;
``period=1000`` is the published length. Switches happen in ``refresh``, every
gcd(alignment steps, user steps) steps, the longest interval that meets all of them.

Choices that no public source fixes: alignment examples come from the calibration set,
drawn with replacement, as many as the user's batch has; each domain starts anew, with
an alignment turn and its own first 10 %.

Symbols: w the adapter, ρ ``proximal``.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from sbr_jax.checks import Range, checked
from sbr_jax.methods.base import (
    Found,
    Method,
    Problem,
    device_dataset,
    draw_rows,
    task_loss,
)
from sbr_jax.settings import NonNegative
from sbr_jax.typing import Batch, PyTree, UserError

USER, ALIGNMENT = 0, 1


@checked
def lisa(
    *,
    proximal: NonNegative = 1.0,
    alignment_share: Annotated[float, Range(above=0, below=1)] = 0.1,
    warmup_share: Annotated[float, Range(least=0, most=1)] = 0.1,
    period: Annotated[int, Range(least=2)] = 10,
    monitored: bool = False,
) -> Method:
    """Bi-state fine-tuning with a proximal term.

    Args:
      proximal: ρ ≥ 0; 0 only alternates.
      alignment_share: share of alignment steps, in (0, 1); rounded to whole steps of a
        period.
      warmup_share: share of a domain's steps, in [0, 1], that start it without the
        proximal term; in effect rounded up to the next possible switch.
      period: steps of one cycle: an alignment turn, then a user turn.
      monitored: run CSM.

    Returns:
      The method. Its metrics are ``loss`` (on the step's own data), ``aligning`` (1 in
      an alignment step, so its mean is the share) and ``drift``, ‖w − w_other‖².

    Raises:
      UserError: for a share that leaves one of the two states without a step.
    """
    aligning = round(alignment_share * period)
    if not 0 < aligning < period:
        raise UserError(
            f"alignment_share: expected 1 to {period - 1} of the {period} steps of a "
            f"period, got {alignment_share!r}, which is {aligning}; lengthen period"
        )
    unit = math.gcd(aligning, period)

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        return {"safe": device_dataset(problem.calibration), **_begin(adapter)}

    def refresh(
        problem: Problem, base: PyTree, adapter: PyTree, state: dict, key: jax.Array
    ) -> dict:
        age = int(state["age"]) + unit
        phase = ALIGNMENT if age % period < aligning else USER
        state = {**state, "age": jnp.int32(age)}
        if phase == int(state["phase"]):
            return state
        # A copy: the step that follows consumes the adapter's buffers.
        other = jax.tree.map(jnp.copy, adapter)
        return {**state, "phase": jnp.int32(phase), "other": other}

    def gradient(
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        state: dict,
        batch: Batch,
        key: jax.Array,
    ) -> Found:
        draw_key, loss_key = jax.random.split(key)
        size, steps = problem.training.batch_size, problem.training.steps_per_domain
        safe = draw_rows(problem, state["safe"], batch, draw_key, size)

        def gradient_on(data: Batch):
            return jax.value_and_grad(
                lambda a: task_loss(problem, base, a, data, loss_key)
            )(adapter)

        # A branch rather than a selected batch, because their lengths may differ.
        aligned = state["phase"] == ALIGNMENT
        loss, grads = jax.lax.cond(
            aligned, lambda: gradient_on(safe), lambda: gradient_on(batch)
        )
        warm = state["age"].astype(jnp.float32) >= warmup_share * steps
        weight = jnp.where(warm, jnp.float32(proximal), jnp.float32(0))
        drift = jax.tree.map(jnp.subtract, adapter, state["other"])
        grads = jax.tree.map(lambda g, d: g + weight.astype(g.dtype) * d, grads, drift)
        metrics = {
            "loss": loss,
            "aligning": aligned.astype(jnp.float32),
            "drift": optax.tree.norm(drift, squared=True),
        }
        return grads, {}, metrics

    def end_domain(
        problem: Problem, base: PyTree, adapter: PyTree, state: dict, key: jax.Array
    ) -> tuple[PyTree, dict]:
        return adapter, {**state, **_begin(adapter)}

    return Method(
        name="lisa",
        monitored=monitored,
        init=init,
        gradient=gradient,
        end_domain=end_domain,
        refresh=refresh,
        refresh_every=unit,
    )


def _begin(adapter: PyTree) -> dict:
    """The turn, its age and w_other at the start of a domain."""
    return {
        "other": jax.tree.map(jnp.copy, adapter),
        "phase": jnp.int32(ALIGNMENT),
        "age": jnp.int32(0),
    }
