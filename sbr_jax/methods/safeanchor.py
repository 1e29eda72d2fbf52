"""SafeAnchor: project the task gradient off a safety subspace, anchor the answers.

Guo, Wu, Yiu, arXiv:2604.17691. In the paper's symbols, for each layer i:

    ĝ_i = g_i − (1 − α_i) Π_i g_i          Π_i = V_i V_iᵀ          (OSCA)
    α_i = max(0, 1 − λ tr F_i)              λ = 0.5
    step from ĝ + γ ∇L_anchor               γ = 0.1
    L_anchor = mean over D_safe of KL(p_{θ_{t−1}} ‖ p_{θ_t})

V_i are the leading eigenvectors of the Fisher on the calibration set, merged with those
of the adapted model after each domain (incremental SSI). θ_{t−1} is the model before
domain t. Only the task gradient is projected. Monitoring and repair belong to the
pipeline; :attr:`Method.monitored` requests them.

``safeanchor`` is as published: the *gradient* is projected before AdamW (which can leak
back into V), bases merge unweighted, and α comes from the raw trace.

``safeanchor-exact`` is ours. It projects the *update* after AdamW, and strictly
(α = 0): relaxed by the mean trace, most units are hardly projected. If α is asked for,
each kind of unit has its own mean. Its anchor holds the aligned model θ_0; with
θ_{t−1}, whatever one domain lets slip would become the next domain's reference. Its
ρ = 0.8 leaves the first domain room to learn.

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
    "relax": False,
    "normalisation": "kind",
    "kl_reference": "aligned",
    "energy": 0.8,
}
"""Options in which `safeanchor-exact` differs from the published method. The first two
follow the sweep `projection-grid`, on validation seeds; so were the last two chosen."""


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
    """SafeAnchor as published, with every part an option.

    Args:
      projection: ``"gradient"`` before AdamW (published), ``"update"`` after it,
        ``"metric"`` after it in Adam's own metric, in which the projected step still
        descends, or ``"none"``.
      weighting: weights in a merge: ``"uniform"`` (published), ``"eigenvalue"``, or
        ``"unit-trace"``, each Fisher's eigenvalues over its trace, so that no Fisher
        outweighs the others.
      normalisation: of tr F in α: ``"none"`` (published), ``"mean"`` (mean over all
        layers = 1), ``"kind"`` (mean 1 separately for queries, keys, values and
        outputs) or ``"parameter"``.
      strictness: λ ≥ 0.
      energy: ρ in (0, 1].
      max_rank: cap on the columns of one layer's basis.
      fisher: ``"empirical"`` (published; the data's answers) or ``"sampled"`` (answer
        tokens drawn from the model).
      reduction: log p(y | x) as the ``"sum"`` (published) or ``"mean"`` over tokens.
      calibration_tokens: how many first tokens of an answer the Fisher sees; they
        decide whether the answer refuses. None for all tokens (published).
      contrast: ε for directions that are large in F_safety relative to F_benign (see
        :func:`sbr_jax.contrast`), which comes from ``calibration_controls["benign"]``;
        None for the leading directions of F_safety (published).
      basis: ``"safety"``, or a control: ``"random"`` and ``"shuffled"`` of the same
        rank, ``"benign"`` from benign calibration data.
      relax: α from the trace; False is strict projection (α = 0).
      update_subspace: merge in the adapted model's subspace after each domain.
      refresh_every: steps between further merges inside a domain; None for none.
      protect_a: ``"perturb"`` protects A in the first domain, where B = 0 hides it
        (see :mod:`sbr_jax.methods._ssi`); ``"none"`` is as published.
      keep_base: never drop the first subspace from a merge.
      kl_weight: γ ≥ 0; 0 switches the anchor off.
      kl_reference: the model whose answers the anchor holds: ``"previous"``, the model
        before the domain (θ_{t−1}, published), or ``"aligned"``, the model before all
        domains (θ_0), so that slips in one domain do not move the reference.
      kl_direction: ``"forward"``, KL(reference ‖ model) (published), or ``"reverse"``.
      kl_batch_size: safety examples of one anchor gradient (None: half the task batch).
      replay_bypass: in a repair, let the safety gradient bypass the projection
        (published: it is projected like the task's).
      control_spectrum: also report the spectrum on ``calibration_controls["random"]``.
      selectivity: also report how much of held-out safety and of the task lies in a
        subspace from half of the calibration set.
      monitored: run CSM.

    Returns:
      The method. Its ``init`` warns with :class:`InertProjectionWarning` if α is above
      0.95 in every layer, or on average over the layers of one kind of projection.

    Raises:
      UserError: for a control or a bypass without a projection.
    """
    method = Method("safeanchor", monitored)
    if projection == "none" and (basis != "safety" or replay_bypass):
        unused = f"basis={basis!r}" if basis != "safety" else "replay_bypass=True"
        raise UserError(
            f"safeanchor: expected a projection beside {unused}, got "
            "projection='none': leave out one of the two"
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
"""Names of the options of `safeanchor`."""


def safeanchor_exact(**options: Any) -> Method:
    """SafeAnchor that projects the applied step: our recipe.

    **Guarantee.** The task's part of the applied step is orthogonal to the safety
    subspace, including AdamW's scaling, momentum and weight decay. With ``relax=True``
    a share α of what lies inside is let through.

    Args:
      **options: options of :func:`safeanchor`. The defaults that differ are
        ``projection="update"``, ``relax=False``, ``normalisation="kind"`` (of use
        with ``relax=True``), ``kl_reference="aligned"`` and ``energy=0.8``.

    Raises:
      UserError: for an unknown option, with the nearest names.
    """
    errors.check_names("option of safeanchor-exact", options, OPTIONS)
    made = safeanchor(**{**OURS, **options})
    return dataclasses.replace(made, name="safeanchor-exact")


def _bypassing_replay(problem, base, adapter, state, batch, safe, weight, key):
    """The gradient of a repair in which only the task's part is projected."""
    task_key, safe_key = jax.random.split(key)
    grads, _, metrics = task_gradient(problem, base, adapter, state, batch, task_key)
    loss, pull = jax.value_and_grad(
        lambda a: task_loss(problem, base, a, safe, safe_key)
    )(adapter)
    extra = {"bypass": jax.tree.map(lambda g: weight * g, pull)}
    return grads, extra, {**metrics, "safety_loss": loss}
