"""Defences: ``METHODS`` makes them, ``ABLATIONS`` names variants of them.

Adding one: write its file, add one line to ``METHODS`` and its row to the README's
table. ``build`` makes any row of either dict by name.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sbr_jax.methods.adaptive import adaptive_judge, adaptive_probe
from sbr_jax.methods.antidote import antidote
from sbr_jax.methods.asft import asft
from sbr_jax.methods.base import InertProjectionWarning, Method, Problem
from sbr_jax.methods.booster import booster
from sbr_jax.methods.ewc import ewc
from sbr_jax.methods.interleaving import interleaving
from sbr_jax.methods.lisa import lisa
from sbr_jax.methods.lox import lox
from sbr_jax.methods.o_lora import o_lora
from sbr_jax.methods.plain import plain
from sbr_jax.methods.safe_lora import safe_lora
from sbr_jax.methods.safeanchor import safeanchor, safeanchor_exact
from sbr_jax.methods.safegrad import safegrad
from sbr_jax.methods.salora import salora
from sbr_jax.methods.sbr import sbr
from sbr_jax.methods.unified import unified
from sbr_jax.methods.vaccine import vaccine
from sbr_jax.typing import UserError

METHODS: dict[str, Callable[..., Method]] = {
    "plain": plain,
    "safeanchor": safeanchor,
    "safeanchor-exact": safeanchor_exact,
    "unified": unified,
    "sbr": sbr,
    "adaptive-judge": adaptive_judge,
    "adaptive-probe": adaptive_probe,
    "interleaving": interleaving,
    "ewc": ewc,
    "o-lora": o_lora,
    "safegrad": safegrad,
    "safe-lora": safe_lora,
    "asft": asft,
    "lox": lox,
    "antidote": antidote,
    "salora": salora,
    "vaccine": vaccine,
    "booster": booster,
    "lisa": lisa,
}

_BRIEF = {"control_spectrum": False}

ABLATIONS: dict[str, tuple[str, Mapping[str, Any]]] = {
    # A part missing.
    "safeanchor-exact:no-update": (
        "safeanchor-exact",
        {"update_subspace": False, **_BRIEF},
    ),
    "safeanchor-exact:no-relaxation": ("safeanchor-exact", {"relax": False, **_BRIEF}),
    "safeanchor-exact:no-anchor": (
        "safeanchor-exact",
        {"anchor_weight": 0.0, **_BRIEF},
    ),
    "safeanchor-exact:no-csm": ("safeanchor-exact", {"monitored": False, **_BRIEF}),
    # One part alone.
    "safeanchor-exact:projection-only": (
        "safeanchor-exact",
        {"anchor_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:anchor-only": (
        "safeanchor-exact",
        {"projection": "none", "monitored": False},
    ),
    "safeanchor-exact:csm-only": ("plain", {"monitored": True}),
    # Controls: the projection alone, off another subspace of the same rank.
    "safeanchor-exact:random": (
        "safeanchor-exact",
        {"basis": "random", "anchor_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:shuffled": (
        "safeanchor-exact",
        {"basis": "shuffled", "anchor_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    "safeanchor-exact:benign": (
        "safeanchor-exact",
        {"basis": "benign", "anchor_weight": 0.0, "monitored": False, **_BRIEF},
    ),
    # Our two changes beside the exact projection, taken back one at a time.
    "safeanchor-exact:previous-reference": (
        "safeanchor-exact",
        {"anchor_reference": "previous", **_BRIEF},
    ),
    "safeanchor-exact:published-energy": (
        "safeanchor-exact",
        {"energy": 0.9, **_BRIEF},
    ),
    # The paper prefers KL(reference ‖ model) to KL(model ‖ reference).
    "safeanchor:reverse-kl": ("safeanchor", {"anchor_kl": "reverse", **_BRIEF}),
    "safeanchor-exact:reverse-kl": (
        "safeanchor-exact",
        {"anchor_kl": "reverse", **_BRIEF},
    ),
    # Improvements, one at a time.
    "safeanchor-exact:sampled-fisher": (
        "safeanchor-exact",
        {"fisher": "sampled", **_BRIEF},
    ),
    "safeanchor-exact:refresh": ("safeanchor-exact", {"refresh_every": 50, **_BRIEF}),
    "safeanchor-exact:keep-base": ("safeanchor-exact", {"keep_base": True, **_BRIEF}),
    "safeanchor-exact:protect-a": (
        "safeanchor-exact",
        {"protect_a": "perturb", **_BRIEF},
    ),
    "safeanchor-exact:replay-bypass": (
        "safeanchor-exact",
        {"replay_bypass": True, **_BRIEF},
    ),
    # Our best with a part missing, or another rater.
    "unified:no-projection": ("unified", {"project": False}),
    "unified:no-anchors": ("unified", {"anchors": 0, **_BRIEF}),
    "unified:no-risk": ("unified", {"risk": "none", **_BRIEF}),
    "unified:no-kl": ("unified", {"kl_weight": 0.0, **_BRIEF}),
    "unified:judge": ("unified", {"risk": "judge", **_BRIEF}),
    "sbr:one": ("sbr", {"anchors": 1}),
    # The published recipe with a part missing or alone.
    "safeanchor:no-update": ("safeanchor", {"update_subspace": False, **_BRIEF}),
    "safeanchor:no-relaxation": ("safeanchor", {"relax": False, **_BRIEF}),
    "safeanchor:no-anchor": ("safeanchor", {"anchor_weight": 0.0, **_BRIEF}),
    "safeanchor:no-csm": ("safeanchor", {"monitored": False, **_BRIEF}),
    "safeanchor:projection-only": (
        "safeanchor",
        {"anchor_weight": 0.0, "monitored": False, **_BRIEF},
    ),
}


def build(row: str, **overrides: Any) -> Method:
    """Makes the method of a row, named after the row.

    Args:
      row: a key of ``METHODS`` or ``ABLATIONS``.
      **overrides: hyper-parameters on top of the row's.

    Returns:
      The method.

    Raises:
      UserError: for an unknown row or hyper-parameter, with the nearest names.

    >>> build("plain").name
    'plain'
    """
    if row in ABLATIONS:
        method, options = ABLATIONS[row]
        overrides = {**options, **overrides}
    else:
        method = row
    if method not in METHODS:
        raise UserError(unknown("method", row, [*METHODS, *ABLATIONS]))
    maker = METHODS[method]
    known = _options(maker)
    for option in overrides:
        if option not in known:
            raise UserError(f"{row}: " + unknown("option", option, sorted(known)))
        _check_type(row, option, overrides[option], known[option])
    return dataclasses.replace(maker(**overrides), name=row)


def _options(maker: Callable[..., Method]) -> dict[str, str]:
    """Keywords of a maker and their types; ``**options`` stands for safeanchor's."""
    found: dict[str, str] = {}
    for name, parameter in inspect.signature(maker).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found = {**_options(safeanchor), **found}
        else:
            kind = parameter.annotation
            found[name] = kind.__name__ if isinstance(kind, type) else str(kind)
    found.pop("name", None)
    return found


_KINDS = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_type(row: str, option: str, value: Any, annotation: str) -> None:
    """Refuses a value of a type that the option does not take (bool is no number)."""
    wanted = [part.strip() for part in annotation.split("|")]
    if any(kind not in _KINDS for kind in wanted):
        return  # A maker's own type: the maker checks it.
    kinds = tuple(k for kind in wanted for k in _KINDS[kind])
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or value in (float("inf"), float("-inf")) or value != value:
        raise UserError(
            f"{row}: {option}: expected a finite {' or '.join(wanted)}, got {value!r}"
        )


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for an unknown name: nearest names first, then all of them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})"


__all__ = [
    "ABLATIONS",
    "METHODS",
    "InertProjectionWarning",
    "Method",
    "Problem",
    "build",
    "unknown",
]
