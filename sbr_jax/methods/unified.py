"""Unified: our best method, three defences in one chain, each removable.

    step from P⊥ ∇[mean_i α_i NLL_i] + ∇[mean_i β_i KL(p_ref ‖ p_θ)_i + λ L_anchor]

- P⊥ is SafeAnchor's projection of the update (:mod:`sbr_jax.methods.safeanchor`),
  relaxed by α. It keeps ordinary examples from moving the directions that safety
  depends on.
- L_anchor is SBR's (:mod:`sbr_jax.methods.sbr`). It holds the last hidden states of a
  few harmful prompts.
- α and β are risk-adaptive (:mod:`sbr_jax.methods.risk`). A risky example is tied to
  the aligned model instead of learned.

Each covers a gap of the others: a projection does not stop an example that asks for
harm, anchors hold only a few points, and risk weights do nothing against benign drift.

With β from 0 to 1, an example without risk is learned fully and an example of certain
risk is not learned at all (α = 0); the published bounds are 0.1 and 0.9. λ = 0.5 was
chosen on the testbed's validation split: at the published 50, the first domain is
learnt to 60 % only, and beside risk weights the anchors need not be so strong.

Symbols: α, β weights of example i, λ weight of the anchors, K anchors, γ weight of
SafeAnchor's own anchor on D_safe.
"""

import dataclasses
from typing import Annotated, Literal

from sbr_jax.checks import Range, checked
from sbr_jax.methods._compose import with_risk
from sbr_jax.methods._raters import judge_rater, probe_rater
from sbr_jax.methods.base import Method
from sbr_jax.methods.risk import Weighting
from sbr_jax.methods.safeanchor import safeanchor_exact
from sbr_jax.methods.sbr import with_hidden_anchor
from sbr_jax.settings import Count, NonNegative


@checked
def unified(
    *,
    project: bool = True,
    anchors: Annotated[int, Range(least=0)] = 8,
    anchor_weight: NonNegative = 0.5,
    risk: Literal["probe", "judge", "none"] = "probe",
    beta_min: float = 0.0,
    beta_max: float = 1.0,
    kl_weight: NonNegative = 0.1,
    max_rank: Count = 64,
    control_spectrum: bool = True,
    monitored: bool = True,
) -> Method:
    """Update projection, hidden-state anchors and risk-adaptive weights.

    Args:
      project: False removes the projection.
      anchors: K harmful prompts whose states are held; 0 removes them.
      anchor_weight: λ ≥ 0, for the mean over a state's entries.
      risk: rater of the examples: ``"probe"`` on the aligned model's activations, the
        study's ``"judge"``, or ``"none"`` to learn all examples equally.
      beta_min: β of an example without risk.
      beta_max: β of an example of certain risk.
      kl_weight: γ ≥ 0; 0 removes SafeAnchor's own anchor.
      max_rank: cap on the columns of one layer's basis.
      control_spectrum: also report the spectrum of the random control, and how
        selective the subspace is.
      monitored: run CSM.

    References:
      arXiv:2604.17691, arXiv:2605.05995, arXiv:2602.17546
    """
    weighting = Weighting(beta_min, beta_max, "example", "linear")
    method = safeanchor_exact(
        # As it was chosen and measured, before its base was made strict.
        projection="update" if project else "none",
        weighting="eigenvalue",
        normalisation="mean",
        relax=True,
        kl_weight=kl_weight,
        max_rank=max_rank,
        control_spectrum=control_spectrum,
        selectivity=control_spectrum,
        monitored=monitored,
    )
    if anchors:
        method = with_hidden_anchor(
            method, "anchors", anchors=anchors, weight=anchor_weight, bare=True
        )
    if risk != "none":
        rater = {"probe": probe_rater, "judge": judge_rater}[risk](name="unified")
        method = with_risk(method, rater, weighting)
    return dataclasses.replace(method, name="unified")
