"""Learning to stay safe: the riskier an example, the closer to the reference.

Goel, Maji, Mazumder, arXiv:2602.17546. For the examples i of a batch with risks s_i:

    L = mean_i [α_i NLL_i + β_i KL(p_ref ‖ p_θ)_i]
    β_i = β_min + (β_max − β_min) s_i,   α_i = 1 − β_i

NLL and KL are means over an example's answer tokens; the KL is forward and over the
whole vocabulary. In every domain, the reference is the aligned model: the same weights
with the adapter switched off. So it takes no memory and never changes.

The two methods differ in the source of the risk. ``adaptive-judge`` asks the study's
judge about each training pair before a domain. ``adaptive-probe`` reads the risk off
the reference's activations at the end of the prompt (:mod:`sbr_jax.methods.probe`), in
the forward pass that the KL needs anyway.

One thing differs from the paper: by default every example is weighted by its own risk.
The published mean over the batch hides a minority: with one harmful example in ten, the
released map (``mapping="legacy"``) stays at its floor β = 0.1. With gradient
accumulation, ``granularity="batch"`` averages over a microbatch, like the released code
with its microbatches of one. A repair keeps the weighted loss.

Symbols: α, β weights, B examples of a batch.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from sbr_jax.checks import checked
from sbr_jax.methods._compose import Rater
from sbr_jax.methods._raters import judge_rater, probe_rater
from sbr_jax.methods.base import Cost, Method, Problem, dropout, joint_replay
from sbr_jax.methods.risk import BETA_MAX, BETA_MIN, Weighting
from sbr_jax.models import answers
from sbr_jax.settings import Positive
from sbr_jax.typing import Batch, PyTree

Granularity = Literal["example", "batch"]
Mapping = Literal["linear", "legacy"]


def adaptive_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    batch: Batch,
    reference: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean_i [α_i NLL_i + β_i KL(p_ref ‖ p_θ)_i], in one forward pass of θ.

    ``reference`` holds the reference's states ``[K, D]`` where the same answers are
    predicted.

    **Guarantee**: no gradient flows to the reference. Both terms share the dropout of
    ``key``.

    Returns:
      The loss, and its unweighted parts ``"loss"`` (the task's) and ``"kl"``.
    """
    apply_fn, found = problem.apply_fn, answers.find(batch)
    hidden = answers.states(apply_fn, base, adapter, batch, **dropout(problem, key))
    nll = answers.cross_entropy(apply_fn, base, hidden, found)
    kl = answers.kl_to_reference(apply_fn, base, reference, hidden, found)
    parts = {"loss": jnp.mean(nll), "kl": jnp.mean(kl)}
    return jnp.mean(alpha * nll + beta * kl), parts


@checked
def adaptive_judge(
    *,
    beta_min: float = BETA_MIN,
    beta_max: float = BETA_MAX,
    granularity: Granularity = "example",
    mapping: Mapping = "linear",
    monitored: bool = False,
) -> Method:
    """Risk-adaptive regularisation with the risk from the study's judge.

    The judge rates every training pair once per domain; a failing judge is an error.

    Args:
      beta_min: smallest weight of the KL.
      beta_max: largest weight of the KL.
      granularity: one weight per ``"example"`` or per ``"batch"`` (published).
      mapping: ``"linear"`` (the paper) or ``"legacy"`` (the released code).
      monitored: run CSM and repair.

    Returns:
      The method. Its ``init`` and ``mix`` raise :class:`UserError` without a judge.

    References:
      arXiv:2602.17546
    """
    weighting = Weighting(beta_min, beta_max, granularity, mapping)
    return _rated(
        "adaptive-judge", monitored, judge_rater(name="adaptive-judge"), weighting
    )


@checked
def adaptive_probe(
    *,
    beta_min: float = BETA_MIN,
    beta_max: float = BETA_MAX,
    granularity: Granularity = "example",
    mapping: Mapping = "linear",
    probe_layers: tuple[int, ...] | None = None,
    probe_l2: Positive = 1e-2,
    monitored: bool = False,
) -> Method:
    """Risk-adaptive regularisation with the risk from a probe of the reference.

    The probe tells the defender's harmful prompts from the benign control. It sees
    prompts only, so it misses attacks whose prompts look benign (identity shift,
    backdoors). Its held-out ``auroc`` and ``calibration_error`` are diagnostics; with
    an AUROC near 0.5 the risk is noise.

    Args:
      beta_min: smallest weight of the KL.
      beta_max: largest weight of the KL.
      granularity: one weight per ``"example"`` or per ``"batch"`` (published).
      mapping: ``"linear"`` (the paper) or ``"legacy"`` (the released code).
      probe_layers: states of the residual stream to use: 0 is the embedding, l the
        state after layer l; None for all.
      probe_l2: μ > 0, penalty on the probe's weights.
      monitored: run CSM and repair.

    Returns:
      The method. Its ``init`` raises :class:`UserError` without both prompt sets.

    References:
      arXiv:2602.17546
    """
    weighting = Weighting(beta_min, beta_max, granularity, mapping)
    rater = probe_rater(layers=probe_layers, l2=probe_l2, name="adaptive-probe")
    return _rated("adaptive-probe", monitored, rater, weighting)


def _rated(name: str, monitored: bool, rater: Rater, weighting: Weighting) -> Method:
    """Plain fine-tuning with the weighted loss, in one forward pass of θ."""

    def objective(problem, base, state, batch):
        """The loss as a function of adapter and key, and metrics that need neither."""
        reference, risk = rater.assess(problem, base, state, batch)
        alpha, beta = weighting(risk)

        def loss_fn(adapter, key):
            return adaptive_loss(
                problem, base, adapter, batch, reference, alpha, beta, key
            )

        return loss_fn, {"risk": jnp.mean(risk), "kl_weight": jnp.mean(beta)}

    def gradient(problem, base, adapter, state, batch, key):
        loss_fn, metrics = objective(problem, base, state, batch)
        (_, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapter, key)
        return grads, {}, {**metrics, **parts}

    def repair(problem, base, adapter, state, batch, safe, weight, key):
        loss_fn, metrics = objective(problem, base, state, batch)
        replayed = joint_replay(loss_fn, problem, base, adapter, safe, weight, key)
        grads, extra, parts = replayed
        return grads, extra, {**metrics, **parts}

    return Method(
        name,
        monitored,
        Cost(forward=1.0, ratings=rater.ratings),
        init=rater.init,
        outline=rater.outline,
        mix=rater.mix,
        gradient=gradient,
        replay_gradient=repair,
    )
