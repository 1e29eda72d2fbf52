"""Unified: our best. Three defences in one chain, each part removable.

    step from P⊥ ∇[mean_i α_i NLL_i] + ∇[mean_i β_i KL(p_ref ‖ p_θ)_i + λ L_anchor]

P⊥ is SafeAnchor-exact's update projection (:mod:`sbr_jax.methods.safeanchor`): it keeps
what ordinary examples teach from moving what safety depends on. L_anchor is SBR's
(:mod:`sbr_jax.methods.sbr`): it holds the last hidden states of a few harmful prompts.
α and β are risk-adaptive (:mod:`sbr_jax.methods.risk`): an example that is risky to
learn is not learned but tied to the aligned model. Each answers what the others cannot:
a projection does not stop an example that asks for harm, anchors hold but a few points,
and risk weights do nothing against benign drift.

With β from 0 to 1, an example without risk costs nothing and one of certain risk is not
learned at all (α = 0); the published bounds are 0.1 and 0.9. λ = 0.5 was chosen on the
testbed's validation split: at the published 50 the first domain is learnt to 60 %, and
with risk weights beside them the anchors need not be so strong.

Symbols: α, β weights of example i, λ weight of the anchors, K anchors, γ weight of
SafeAnchor's own anchor on D_safe.
"""

import dataclasses

from sbr_jax.methods import raters
from sbr_jax.methods.adaptive import Weighting
from sbr_jax.methods.base import Method, one_of, positive
from sbr_jax.methods.compose import with_pull, with_risk
from sbr_jax.methods.safeanchor import safeanchor_exact
from sbr_jax.methods.sbr import (
    anchor_prompts,
    distinct_anchors,
    hidden_anchor_loss,
    reference_states,
)
from sbr_jax.typing import UserError


def unified(
    *,
    project: bool = True,
    anchors: int = 8,
    anchor_weight: float = 0.5,
    risk: str = "probe",
    beta_min: float = 0.0,
    beta_max: float = 1.0,
    kl_weight: float = 0.1,
    max_rank: int = 64,
    control_spectrum: bool = True,
    monitored: bool = True,
    name: str = "unified",
) -> Method:
    """Update projection, hidden-state anchors and risk-adaptive weights.

    Args:
      project: False removes the projection.
      anchors: K harmful prompts whose states are held; 0 removes them.
      anchor_weight: λ ≥ 0, for the mean over a state's entries.
      risk: who rates examples: ``"probe"`` on the aligned model's activations,
        ``"judge"`` of the study, or ``"none"`` to learn all alike.
      beta_min: β of an example without risk.
      beta_max: β of one of certain risk.
      kl_weight: γ ≥ 0; 0 removes SafeAnchor's own anchor.
      max_rank: cap on the columns of one layer's basis.
      control_spectrum: also report the spectrum of the random control.
      monitored: run CSM.
      name: the row's name.

    Returns:
      The method.

    Raises:
      UserError: naming a hyper-parameter that is out of range.

    References:
      arXiv:2604.17691, arXiv:2605.05995, arXiv:2602.17546
    """
    one_of("risk", risk, ("probe", "judge", "none"))
    positive("anchor_weight", anchor_weight, zero=True)
    positive("kl_weight", kl_weight, zero=True)
    if anchors < 0:
        raise UserError(f"anchors: expected at least 0, got {anchors!r}")
    weighting = Weighting(beta_min, beta_max, "example", "linear")
    method = safeanchor_exact(
        projection="update" if project else "none",
        anchor_weight=kl_weight,
        max_rank=max_rank,
        control_spectrum=control_spectrum,
        monitored=monitored,
    )
    if anchors:
        method = with_pull(method, "anchors", *_anchors(anchors, anchor_weight))
        method = dataclasses.replace(method, optimizer=_checked(method, anchors))
    if risk == "probe":
        method = with_risk(method, raters.probe_rater(name=name), weighting)
    if risk == "judge":
        method = with_risk(method, raters.judge_rater(name=name), weighting)
    return dataclasses.replace(method, name=name)


def _checked(method: Method, count: int):
    """The method's optimizer, refusing too few prompts before anything is measured."""

    def optimizer(problem, adapter, learning_rate):
        distinct_anchors(problem.harmful, count)
        return method.optimizer(problem, adapter, learning_rate)

    return optimizer


def _anchors(count: int, weight: float):
    """SBR as a pull: its state, and λ L_anchor."""

    def init(problem, base, adapter, key):
        del adapter
        drawn = anchor_prompts(problem.harmful, count, key)
        reference = reference_states(problem, base, None, drawn)
        return {"prompts": drawn, "reference": reference}

    def loss(problem, base, adapter, state, batch, key):
        del batch, key
        return weight * hidden_anchor_loss(
            problem, base, adapter, state["prompts"], state["reference"]
        )

    return init, loss


__all__ = ["unified"]
