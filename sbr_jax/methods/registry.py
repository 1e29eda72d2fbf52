"""Registry of defences: names, their makers, and variants of them.

``METHODS`` maps a name to a maker. ``VARIANTS`` maps a name to a method with changed
options. ``build`` makes any of them by name. To add a method, write its file and add a
line to ``METHODS``; CONTRIBUTING.md has the rest. A maker refuses a hyper-parameter
outside its declared type and range with a `UserError` that names it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sbr_jax import errors
from sbr_jax.methods._hyperparameters import attribute, collect, make_record
from sbr_jax.methods.adaptive import adaptive_judge, adaptive_probe
from sbr_jax.methods.antidote import antidote
from sbr_jax.methods.asft import asft
from sbr_jax.methods.base import Method
from sbr_jax.methods.booster import booster
from sbr_jax.methods.der import der
from sbr_jax.methods.ewc import ewc
from sbr_jax.methods.interleaving import interleaving
from sbr_jax.methods.lazy import lazy
from sbr_jax.methods.lean import lean
from sbr_jax.methods.lisa import lisa
from sbr_jax.methods.lox import lox
from sbr_jax.methods.o_lora import o_lora
from sbr_jax.methods.plain import plain
from sbr_jax.methods.safe_delta import safe_delta
from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.methods.safeanchor import OURS, safeanchor, safeanchor_exact
from sbr_jax.methods.safegrad import safegrad
from sbr_jax.methods.salora import salora
from sbr_jax.methods.sbr import sbr
from sbr_jax.methods.unified import unified
from sbr_jax.methods.vaccine import vaccine

METHODS: dict[str, Callable[..., Method]] = {
    "plain": plain,
    "safeanchor": safeanchor,
    "safeanchor-exact": safeanchor_exact,
    "unified": unified,
    "lean": lean,
    "lazy": lazy,
    "sbr": sbr,
    "adaptive-judge": adaptive_judge,
    "adaptive-probe": adaptive_probe,
    "interleaving": interleaving,
    "ewc": ewc,
    "o-lora": o_lora,
    "safegrad": safegrad,
    "der": der,
    "safe-lora": safe_lora,
    "safe-delta": safe_delta,
    "asft": asft,
    "lox": lox,
    "antidote": antidote,
    "salora": salora,
    "vaccine": vaccine,
    "booster": booster,
    "lisa": lisa,
}

SELECTIVE = {"calibration_tokens": 4, "contrast": 0.1}
"""Two changes of the subspace, combined."""
PROJECTION = {"kl_weight": 0.0, "monitored": False}
"""The projection alone."""

TRUST = {"epsilon": 3e-5, "kl_weight": 0.0}
"""The trust region alone."""


def _brief(method: str, **changes: Any) -> tuple[str, Mapping[str, Any]]:
    """A variant that does not report the random control's spectrum."""
    return method, {**changes, "control_spectrum": False}


_exact = functools.partial(_brief, "safeanchor-exact")
_published = functools.partial(_brief, "safeanchor")

VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    # A part missing.
    "safeanchor-exact:no-update": _exact(update_subspace=False),
    "safeanchor-exact:relaxed": _exact(relax=True),
    "safeanchor-exact:no-anchor": _exact(kl_weight=0.0),
    "safeanchor-exact:no-csm": _exact(monitored=False),
    # One part alone.
    "safeanchor-exact:projection-only": _exact(**PROJECTION),
    "safeanchor-exact:anchor-only": (
        "safeanchor-exact",
        {"projection": "none", "monitored": False},
    ),
    "safeanchor-exact:csm-only": ("plain", {"monitored": True}),
    # Controls: the projection alone, away from another subspace of the same rank.
    "safeanchor-exact:random": _exact(basis="random", **PROJECTION),
    "safeanchor-exact:shuffled": _exact(basis="shuffled", **PROJECTION),
    "safeanchor-exact:benign": _exact(basis="benign", **PROJECTION),
    # Our changes, reverted one at a time or made otherwise.
    "safeanchor-exact:metric": _exact(projection="metric"),
    "safeanchor-exact:relaxed-only": _exact(relax=True, **PROJECTION),
    "safeanchor-exact:previous-reference": _exact(kl_reference="previous"),
    "safeanchor-exact:published-energy": _exact(energy=0.9),
    # The paper prefers KL(reference ‖ model) to KL(model ‖ reference).
    "safeanchor:reverse-kl": _published(kl_direction="reverse"),
    "safeanchor-exact:reverse-kl": _exact(kl_direction="reverse"),
    # Improvements, one at a time.
    "safeanchor-exact:sampled-fisher": _exact(fisher="sampled"),
    "safeanchor-exact:refresh": _exact(refresh_every=50),
    "safeanchor-exact:eigenvalue": _exact(weighting="eigenvalue"),
    "safeanchor-exact:unit-trace": _exact(weighting="unit-trace"),
    "safeanchor-exact:keep-base": _exact(weighting="eigenvalue", keep_base=True),
    "safeanchor-exact:protect-a": _exact(protect_a="perturb"),
    "safeanchor-exact:replay-bypass": _exact(replay_bypass=True),
    # Other subspaces: of the first tokens, where refusing is decided, and contrasted
    # with what benign answers need.
    "safeanchor-exact:first-tokens": _exact(calibration_tokens=4),
    "safeanchor-exact:contrastive": _exact(contrast=0.1),
    "safeanchor-exact:selective": _exact(**SELECTIVE),
    "safeanchor-exact:selective-only": _exact(**SELECTIVE, **PROJECTION),
    # Our best method with a part missing, or with another rater.
    "unified:no-projection": ("unified", {"project": False}),
    "unified:no-anchors": _brief("unified", anchors=0),
    "unified:no-risk": _brief("unified", risk="none"),
    "unified:no-kl": _brief("unified", kl_weight=0.0),
    "unified:judge": _brief("unified", risk="judge"),
    "der:plus-plus": ("der", {"label_weight": 0.5}),
    "lean:self-answers": ("lean", {"self_answers": 0.5}),
    "lean:benign": ("lean", {"held": "benign"}),  # A control.
    "lean:trust-region": ("lean", {"epsilon": 3e-5}),
    # The trust region alone, and two controls with the same eigenvalues.
    "lean:trust-region-only": ("lean", TRUST),
    "lean:trust-region-random": ("lean", {**TRUST, "basis": "random"}),
    "lean:trust-region-shuffled": ("lean", {**TRUST, "basis": "shuffled"}),
    "lean:kl-budget": ("lean", {"kl_budget": 0.01}),
    "lean:kl-budget-refreshed": ("lean", {"kl_budget": 0.01, "refresh_subspace": True}),
    "lazy:self-answers": ("lazy", {"self_answers": 0.5}),
    "sbr:one": ("sbr", {"anchors": 1}),
    # The published recipe with a part missing, and its projection alone.
    "safeanchor:no-update": _published(update_subspace=False),
    "safeanchor:no-relaxation": _published(relax=False),
    "safeanchor:no-anchor": _published(kl_weight=0.0),
    "safeanchor:no-csm": _published(monitored=False),
    "safeanchor:projection-only": _published(**PROJECTION),
}


Hyperparameters = collect(METHODS, {"safeanchor-exact": OURS})
"""Hyper-parameters of every method, a frozen record of frozen records.

``Hyperparameters()`` holds the published values, and ours of methods of our own. Its
fields have the methods' names, with underscores."""


def build(variant: str, methods: Any = None, **overrides: Any) -> Method:
    """Make a method or a variant by its name.

    Args:
      variant: a key of ``METHODS`` or ``VARIANTS``.
      methods: a :data:`Hyperparameters`; None for the published values. A variant's
        changes are applied on top.
      **overrides: further changes of hyper-parameters.

    Raises:
      UserError: for an unknown variant or hyper-parameter, with the nearest names.

    >>> build("plain").name
    'plain'
    """
    method, options = resolve(variant, methods)
    errors.check_names(f"option of {variant}", overrides, vars(options))
    options = dataclasses.replace(options, **overrides)
    return dataclasses.replace(METHODS[method](**vars(options)), name=variant)


def resolve(variant: str, methods: Any = None) -> tuple[str, Any]:
    """A variant's method, and the hyper-parameters with the variant's changes.

    Arguments and errors are those of :func:`build`.

    >>> resolve("sbr:one")[0], resolve("sbr:one")[1].anchors
    ('sbr', 1)
    """
    method, changes = VARIANTS.get(variant, (variant, {}))
    if method not in METHODS:
        raise errors.unknown("method", variant, [*METHODS, *VARIANTS])
    options = getattr(methods or Hyperparameters(), attribute(method), None)
    if options is None:  # The user's program registered it later.
        options = make_record(method, METHODS)()
    return method, dataclasses.replace(options, **changes)
