"""Registry of defences: ``METHODS`` makes them, ``VARIANTS`` names changes of them.

Adding one: write its file and add a line to ``METHODS``; CONTRIBUTING.md has the rest.
``build`` makes any of either dict by name.
"""

import dataclasses
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

_BRIEF = {"control_spectrum": False}
SELECTIVE = {"calibration_tokens": 4, "contrast": 0.1, "normalisation": "kind"}
"""The three changes of the subspace and its relaxation together."""

VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    # A part missing.
    "safeanchor-exact:no-update": (
        "safeanchor-exact",
        {"update_subspace": False, **_BRIEF},
    ),
    "safeanchor-exact:no-relaxation": ("safeanchor-exact", {"relax": False, **_BRIEF}),
    "safeanchor-exact:no-anchor": (
        "safeanchor-exact",
        {"kl_weight": 0.0, **_BRIEF},
    ),
    "safeanchor-exact:no-csm": ("safeanchor-exact", {"monitored": False, **_BRIEF}),
    # One part alone.
    "safeanchor-exact:projection-only": (
        "safeanchor-exact",
        {"kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:anchor-only": (
        "safeanchor-exact",
        {"projection": "none", "monitored": False},
    ),
    "safeanchor-exact:csm-only": ("plain", {"monitored": True}),
    # Controls: the projection alone, off another subspace of the same rank.
    "safeanchor-exact:random": (
        "safeanchor-exact",
        {"basis": "random", "kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:shuffled": (
        "safeanchor-exact",
        {"basis": "shuffled", "kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:benign": (
        "safeanchor-exact",
        {"basis": "benign", "kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    # Our two changes beside the exact projection, taken back one at a time.
    "safeanchor-exact:previous-reference": (
        "safeanchor-exact",
        {"kl_reference": "previous", **_BRIEF},
    ),
    "safeanchor-exact:published-energy": (
        "safeanchor-exact",
        {"energy": 0.9, **_BRIEF},
    ),
    # The paper prefers KL(reference ‖ model) to KL(model ‖ reference).
    "safeanchor:reverse-kl": ("safeanchor", {"kl_direction": "reverse", **_BRIEF}),
    "safeanchor-exact:reverse-kl": (
        "safeanchor-exact",
        {"kl_direction": "reverse", **_BRIEF},
    ),
    # Improvements, one at a time.
    "safeanchor-exact:metric": ("safeanchor-exact", {"projection": "metric", **_BRIEF}),
    "safeanchor-exact:sampled-fisher": (
        "safeanchor-exact",
        {"fisher": "sampled", **_BRIEF},
    ),
    "safeanchor-exact:refresh": ("safeanchor-exact", {"refresh_every": 50, **_BRIEF}),
    "safeanchor-exact:unit-trace": (
        "safeanchor-exact",
        {"weighting": "unit-trace", **_BRIEF},
    ),
    "safeanchor-exact:keep-base": ("safeanchor-exact", {"keep_base": True, **_BRIEF}),
    "safeanchor-exact:protect-a": (
        "safeanchor-exact",
        {"protect_a": "perturb", **_BRIEF},
    ),
    "safeanchor-exact:replay-bypass": (
        "safeanchor-exact",
        {"replay_bypass": True, **_BRIEF},
    ),
    # Which subspace: where refusing is decided, against what benign answers need too.
    "safeanchor-exact:first-tokens": (
        "safeanchor-exact",
        {"calibration_tokens": 4, **_BRIEF},
    ),
    "safeanchor-exact:contrastive": ("safeanchor-exact", {"contrast": 0.1, **_BRIEF}),
    "safeanchor-exact:per-kind": (
        "safeanchor-exact",
        {"normalisation": "kind", **_BRIEF},
    ),
    "safeanchor-exact:selective": ("safeanchor-exact", {**SELECTIVE, **_BRIEF}),
    "safeanchor-exact:selective-only": (
        "safeanchor-exact",
        {**SELECTIVE, "kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    # Our best with a part missing, or another rater.
    "unified:no-projection": ("unified", {"project": False}),
    "unified:no-anchors": ("unified", {"anchors": 0, **_BRIEF}),
    "unified:no-risk": ("unified", {"risk": "none", **_BRIEF}),
    "unified:no-kl": ("unified", {"kl_weight": 0.0, **_BRIEF}),
    "unified:judge": ("unified", {"risk": "judge", **_BRIEF}),
    "der:plus-plus": ("der", {"label_weight": 0.5}),
    "lean:self-answers": ("lean", {"self_answers": 0.5}),
    "lean:trust-region": ("lean", {"epsilon": 3e-5}),
    "lean:kl-budget": ("lean", {"kl_budget": 0.01}),
    "lean:kl-budget-refreshed": (
        "lean",
        {"kl_budget": 0.01, "refresh_subspace": True},
    ),
    "lazy:self-answers": ("lazy", {"self_answers": 0.5}),
    "sbr:one": ("sbr", {"anchors": 1}),
    # The published recipe with a part missing or alone.
    "safeanchor:no-update": ("safeanchor", {"update_subspace": False, **_BRIEF}),
    "safeanchor:no-relaxation": ("safeanchor", {"relax": False, **_BRIEF}),
    "safeanchor:no-anchor": ("safeanchor", {"kl_weight": 0.0, **_BRIEF}),
    "safeanchor:no-csm": ("safeanchor", {"monitored": False, **_BRIEF}),
    "safeanchor:projection-only": (
        "safeanchor",
        {"kl_weight": 0.0, "monitored": False, **_BRIEF},
    ),
}


Hyperparameters = collect(METHODS, {"safeanchor-exact": OURS})
"""Hyper-parameters of every method, a frozen record of frozen records.

``Hyperparameters()`` holds the published values; its fields are named as the methods
are, with underscores."""


def build(variant: str, methods: Any = None, **overrides: Any) -> Method:
    """Makes a method, or a variant of one, named after it.

    Args:
      variant: a key of ``METHODS`` or ``VARIANTS``.
      methods: a :data:`Hyperparameters`; None for the published values. A variant
        changes its method's.
      **overrides: hyper-parameters on top of these.

    Returns:
      The method.

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
    """The method behind a variant, and its hyper-parameters with the variant's changes.

    Args:
      variant: a key of ``METHODS`` or ``VARIANTS``.
      methods: a :data:`Hyperparameters`; None for the published values.

    Raises:
      UserError: for an unknown variant, with the nearest names.

    >>> resolve("sbr:one")[0], resolve("sbr:one")[1].anchors
    ('sbr', 1)
    """
    method, changes = VARIANTS.get(variant, (variant, {}))
    if method not in METHODS:
        raise errors.unknown("method", variant, [*METHODS, *VARIANTS])
    options = getattr(methods or Hyperparameters(), attribute(method), None)
    if options is None:  # Registered since, by a program of its own.
        options = make_record(method, METHODS)()
    return method, dataclasses.replace(options, **changes)
