"""Which parts of a study a variant reads, and whether it deploys an adapter.

Programs ask the user only for the parts that a variant reads.
"""

from collections.abc import Callable
from typing import Any

from sbr_jax.methods.base import as_aligned
from sbr_jax.methods.registry import build, resolve

SAFE, MIX, HARMFUL = "calibration", "safety_mix", "harmful"
PAIRS, BENIGN = "harmful_answers", "benign"
UNALIGNED, JUDGE = "unaligned", "judge"
"""Parts: safe exchanges, further ones to mix in, harmful prompts, harmful requests with
compliant answers, the benign control, weights before alignment, a judge of training
pairs."""

ABOUT = {
    SAFE: "safe exchanges (--safety FILE), or harmful prompts that the model refuses "
    "itself (--harmful FILE)",
    MIX: "safe exchanges (--safety FILE), or harmful prompts that the model refuses "
    "itself (--harmful FILE)",
    HARMFUL: "harmful prompts (--harmful FILE)",
    PAIRS: "harmful requests with compliant answers (--study.pairs-file FILE)",
    UNALIGNED: "the weights before alignment (--study.unaligned-folder FOLDER)",
    JUDGE: "a guard model that rates training pairs (--study.judge llama-guard "
    "--study.judge-folder FOLDER)",
}
"""What a user gives for each part; the benign control is made automatically."""


def _safeanchor(options: Any) -> set[str]:
    benign = options.basis == "benign" or options.contrast is not None
    return {SAFE, *([BENIGN] if benign else [])}


def _unified(options: Any) -> set[str]:
    rated = {"probe": {HARMFUL, BENIGN}, "judge": {JUDGE}}.get(options.risk, set())
    return {SAFE, *rated, *([HARMFUL] if options.anchors else [])}


def _self_answering(options: Any) -> set[str]:
    return {SAFE} if options.self_answers is None else {SAFE, HARMFUL, BENIGN}


def _lean(options: Any) -> set[str]:
    if options.held == "safety":
        return _self_answering(options)
    region = options.epsilon is not None or options.kl_budget is not None
    answering = set() if options.self_answers is None else {HARMFUL}
    return {BENIGN, *answering, *([SAFE] if region else [])}


_READ: dict[str, set[str] | Callable[[Any], set[str]]] = {
    "plain": set(),
    "safeanchor": _safeanchor,
    "safeanchor-exact": _safeanchor,
    "unified": _unified,
    "lean": _lean,
    "lazy": _self_answering,
    "sbr": {HARMFUL},
    "adaptive-judge": {JUDGE},
    "adaptive-probe": {HARMFUL, BENIGN},
    "interleaving": {MIX},
    "ewc": lambda options: {SAFE} if options.data == "safety" else set(),
    "o-lora": set(),
    "safegrad": {SAFE},
    "der": {SAFE},
    "safe-lora": {UNALIGNED},
    "safe-delta": {SAFE},
    "asft": {UNALIGNED},
    "lox": {UNALIGNED},
    "antidote": {PAIRS},
    "salora": {SAFE},
    "vaccine": {SAFE},
    "booster": {SAFE, PAIRS},
    "lisa": {SAFE},
}
"""Method to the parts that its hooks read, or a function of its hyper-parameters."""


def needs(variant: str, methods: Any = None) -> frozenset[str]:
    """The parts that a variant's hooks read.

    The monitor's parts (its probe, and the calibration set for repairs) do not count.

    Args:
      variant: a key of ``METHODS`` or ``VARIANTS``.
      methods: a ``Hyperparameters``; None for the published values.

    Raises:
      UserError: for an unknown variant.

    >>> sorted(needs("plain")), sorted(needs("sbr")), sorted(needs("safegrad"))
    ([], ['harmful'], ['calibration'])
    """
    method, options = resolve(variant, methods)
    found = _READ[method]
    return frozenset(found(options) if callable(found) else found)


_EDITED: dict[str, Callable[[Any], bool]] = {
    "antidote": lambda options: options.weights == "merged",
    "safe-delta": lambda options: True,
}
"""Methods whose ``deploy`` may edit base weights, and whether given options do so."""


def fits_adapter(variant: str, methods: Any = None) -> bool:
    """Whether a variant deploys the weights it was given plus an adapter.

    >>> fits_adapter("safegrad"), fits_adapter("antidote"), fits_adapter("lox")
    (True, False, False)
    """
    method, options = resolve(variant, methods)
    edited = method in _EDITED and _EDITED[method](options)
    return not edited and build(variant, methods).prepare is as_aligned
