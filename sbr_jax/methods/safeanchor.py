"""SafeAnchor: project the task gradient off a safety subspace, anchor the answers.

Guo, Wu, Yiu, arXiv:2604.17691. In the paper's symbols, for each layer i:

    ĝ_i = g_i − (1 − α_i) Π_i g_i          Π_i = V_i V_iᵀ          (OSCA)
    α_i = max(0, 1 − λ tr F_i)              λ = 0.5
    step from ĝ + γ ∇L_anchor               γ = 0.1
    L_anchor = mean over D_safe of KL(p_{θ_{t−1}} ‖ p_{θ_t})

V_i are the leading eigenvectors of the Fisher on the calibration set, merged with
those of the adapted model after each domain (incremental SSI); θ_{t−1} is the model
as it stood before domain t. Only the task gradient is projected. Monitoring and
repair belong to the pipeline; :attr:`Method.monitored` asks for them.

``safeanchor`` is as published: the *gradient* is projected before AdamW (which can
leak back into V), bases merge unweighted, α comes from the raw trace.
``safeanchor-exact`` is ours: the *update* is projected after AdamW, bases merge by
eigenvalue, traces are normalised to mean 1, so that α is free of F's scale; the anchor
holds the aligned model θ_0 instead of θ_{t−1}, which would make what one domain lets
slip the next one's reference; ρ = 0.8 leaves the first domain room to be learnt.

Choices that no public source fixes: an anchor minibatch is half a task batch, drawn
with replacement; one adapter continues through all domains.
"""

import dataclasses
import inspect
from typing import Annotated, Any, Literal

import jax

from sbr_jax import errors
from sbr_jax.checks import Range, checked
from sbr_jax.methods._anchor import with_kl_anchor
from sbr_jax.methods._projection import with_projection
from sbr_jax.methods._ssi import Ssi
from sbr_jax.methods.base import Method, task_gradient, task_loss
from sbr_jax.settings import Count, NonNegative, Positive
from sbr_jax.typing import UserError

OURS: dict[str, Any] = {
    "projection": "update",
    "weighting": "eigenvalue",
    "normalisation": "mean",
    "kl_reference": "aligned",
    "energy": 0.8,
}
"""Where `safeanchor-exact` differs from what is published. The first three were set
when it was written, the others chosen on two validation seeds."""


@checked
def safeanchor(
    *,
    projection: Literal["gradient", "update", "metric", "none"] = "gradient",
    weighting: Literal["uniform", "eigenvalue", "unit-trace"] = "uniform",
    normalisation: Literal["none", "mean", "kind", "parameter"] = "none",
    strictness: NonNegative = 0.5,
    energy: Annotated[float, Range(above=0, most=1)] = 0.9,
    max_rank: Count = 64,
    fisher: Literal["empirical", "sampled"] = "empirical",
    reduction: Literal["sum", "mean"] = "sum",
    calibration_tokens: Count | None = None,
    contrast: Positive | None = None,
    basis: Literal["safety", "random", "shuffled", "benign"] = "safety",
    relax: bool = True,
    update_subspace: bool = True,
    refresh_every: Count | None = None,
    protect_a: Literal["none", "perturb"] = "none",
    keep_base: bool = False,
    kl_weight: NonNegative = 0.1,
    kl_reference: Literal["previous", "aligned"] = "previous",
    kl_direction: Literal["forward", "reverse"] = "forward",
    kl_batch_size: Count | None = None,
    replay_bypass: bool = False,
    control_spectrum: bool = True,
    selectivity: bool = True,
    monitored: bool = True,
) -> Method:
    """SafeAnchor as published, every part of it an option.

    Args:
      projection: ``"gradient"`` before AdamW (published), ``"update"`` after it,
        ``"metric"`` after it in Adam's own metric, in which the projected step still
        descends, or ``"none"``.
      weighting: of the merge: ``"uniform"`` (published), ``"eigenvalue"``, or
        ``"unit-trace"``, by the eigenvalues of each Fisher over its trace, so that none
        outweighs the others.
      normalisation: of tr F in α: ``"none"`` (published), ``"mean"`` (mean over
        layers = 1), ``"kind"`` (the same of queries, keys, values and outputs each) or
        ``"parameter"``.
      strictness: λ ≥ 0.
      energy: ρ in (0, 1].
      max_rank: cap on the columns of one layer's basis.
      fisher: ``"empirical"`` (published; the data's answers) or ``"sampled"`` (answer
        tokens drawn from the model).
      reduction: log p(y | x) as the ``"sum"`` (published) or ``"mean"`` over tokens.
      calibration_tokens: first tokens of an answer that the Fisher sees, where it is
        decided whether the answer refuses; None for all of them (published).
      contrast: ε of directions that lead in F_safety against F_benign (see
        :func:`sbr_jax.contrast`), from ``calibration_controls["benign"]``; None for the
        leading ones of F_safety (published).
      basis: ``"safety"``, or a control: ``"random"`` and ``"shuffled"`` of the same
        rank, ``"benign"`` from benign calibration data.
      relax: α from the trace; False is strict projection (α = 0).
      update_subspace: merge in the adapted model's subspace after each domain.
      refresh_every: also recompute it every so many steps inside a domain.
      protect_a: ``"perturb"`` protects A in the first domain, where B = 0 hides it
        (see :mod:`sbr_jax.methods._ssi`); ``"none"`` is as published.
      keep_base: never drop the first subspace from a merge.
      kl_weight: γ ≥ 0; 0 switches the anchor off.
      kl_reference: whose answers the anchor holds: ``"previous"``, the model before
        the domain (θ_{t−1}, published), or ``"aligned"``, the one before all (θ_0), so
        that what a domain lets slip is not the next one's reference.
      kl_direction: ``"forward"``, KL(reference ‖ model) (published), or ``"reverse"``.
      kl_batch_size: safety examples of one anchor gradient (None: half the task batch).
      replay_bypass: in a repair, let the safety gradient bypass the projection
        (published: it is projected like the task's).
      control_spectrum: also report the spectrum on ``calibration_controls["random"]``.
      selectivity: also report how much of held-out safety and of the task lies in a
        subspace from half of the calibration set.
      monitored: run CSM.

    Returns:
      The method. Its ``init`` warns with :class:`InertProjectionWarning` when α is
      above 0.95 in every layer, or on average in those of one kind of projection.

    Raises:
      UserError: for a control, or a bypass, of a projection that is not there.
    """
    method = Method("safeanchor", monitored)
    if projection == "none" and (basis != "safety" or replay_bypass):
        unused = f"basis={basis!r}" if basis != "safety" else "replay_bypass=True"
        raise UserError(
            f"{unused}: expected a projection that it is about, got projection='none': "
            "leave it out, or choose a projection"
        )
    if projection != "none":
        ssi = Ssi(
            energy=energy,
            max_rank=max_rank,
            fisher=fisher,
            reduction=reduction,
            weighting=weighting,
            normalisation=normalisation,
            strictness=strictness,
            relax=relax,
            protect_a=protect_a,
            keep_base=keep_base,
            basis=basis,
            calibration_tokens=calibration_tokens,
            contrast=contrast,
        )
        method = with_projection(
            method,
            ssi,
            projection=projection,
            update_subspace=update_subspace,
            refresh_every=refresh_every,
            control_spectrum=control_spectrum,
            selectivity=selectivity,
        )
        if replay_bypass:
            method = dataclasses.replace(method, replay_gradient=_bypassing_replay)
    if kl_weight > 0:
        method = with_kl_anchor(
            method,
            weight=kl_weight,
            reference=kl_reference,
            direction=kl_direction,
            batch_size=kl_batch_size,
        )
    return method


OPTIONS = tuple(inspect.signature(safeanchor).parameters)
"""Names of its options."""


def safeanchor_exact(**options: Any) -> Method:
    """SafeAnchor that projects the step it applies: our recipe.

    **Guarantee.** Where α = 0, as with ``relax=False``, the applied step of the task is
    orthogonal to the safety subspace, with AdamW's scaling, momentum and weight decay
    included. With the default's α above 0 a part of it lies inside.

    Args:
      **options: of :func:`safeanchor`; the defaults that differ are
        ``projection="update"``, ``weighting="eigenvalue"``, ``normalisation="mean"``,
        ``kl_reference="aligned"`` and ``energy=0.8``.

    Raises:
      UserError: for an unknown option, with the nearest names.
    """
    errors.check_names("option of safeanchor-exact", options, OPTIONS)
    made = safeanchor(**{**OURS, **options})
    return dataclasses.replace(made, name="safeanchor-exact")


def _bypassing_replay(problem, base, adapter, state, batch, safe, weight, key):
    """The gradient of a repair, of which only the task's is projected."""
    task_key, safe_key = jax.random.split(key)
    grads, _, metrics = task_gradient(problem, base, adapter, state, batch, task_key)
    loss, pull = jax.value_and_grad(
        lambda a: task_loss(problem, base, a, safe, safe_key)
    )(adapter)
    extra = {"bypass": jax.tree.map(lambda g: weight * g, pull)}
    return grads, extra, {**metrics, "safety_loss": loss}
