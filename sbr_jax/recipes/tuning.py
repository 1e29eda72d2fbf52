"""Tuning of methods: one hyper-parameter each, around the published value.

    python -m experiments.sweep testbed-tuning --seeds 2 --jobs 2

It runs on the validation split with seeds that no table uses. The chosen value has the
highest mean of composite safety at the end and domain accuracy when learnt. A tie goes
to the published value, which comes first. Further values were added if the best of
three was at the edge, or if no value let the model learn anything. Where a method
holds a reference or states, that hyper-parameter is the weight of holding them.
"""

from collections.abc import Mapping
from typing import Any

FIRST_SEED = 100

GRID: dict[str, tuple[str, tuple[Any, ...]]] = {
    "safeanchor": ("kl_weight", (0.1, 0.3, 1.0, 3.0, 10.0)),
    "safeanchor-exact": ("kl_weight", (0.1, 0.3, 1.0, 3.0)),
    "lean": ("kl_weight", (3.0, 0.3, 1.0, 10.0)),
    "lazy": ("kl_weight", (1.0, 0.03, 0.1, 0.3, 3.0)),
    "der": ("logit_weight", (0.5, 0.05, 0.15, 1.5)),
    "sbr": ("anchor_weight", (50.0, 0.5, 5.0, 500.0)),
    "adaptive-judge": ("beta_min", (0.1, 0.5, 0.8)),
    "adaptive-probe": ("beta_min", (0.1, 0.5, 0.8)),
    "interleaving": ("fraction", (0.1, 0.3, 0.5)),
    "ewc": ("penalty", (100.0, 1e4, 1e6, 1e7)),
    "o-lora": ("orthogonality", (0.5, 5.0, 50.0, 500.0)),
    "safegrad": ("kl_weight", (1.0, 0.1, 10.0, 100.0)),
    "safe-lora": ("threshold", (0.35, 0.6, 0.9)),
    "asft": ("penalty", (1.0, 0.01, 0.1, 10.0, 100.0)),
    "lox": ("strength", (1.0, 0.5, 2.0, 4.0)),
    "antidote": ("fraction", (0.1, 0.001, 0.01, 0.3)),
    "salora": ("safety_rank", (32, 8, 96)),
    "vaccine": ("radius", (2.0, 0.5, 5.0)),
    "booster": ("regulariser", (5.0, 1.0, 20.0)),
    "lisa": ("proximal", (1.0, 0.01, 0.1, 10.0, 100.0)),
}
"""Maps a method to its hyper-parameter and values, the published value first."""


BEST: dict[str, Any] = {
    "safeanchor": 10.0,
    "lazy": 0.1,
    "sbr": 0.5,
    "adaptive-judge": 0.5,
    "adaptive-probe": 0.5,
    "ewc": 1e6,
    "o-lora": 500.0,
    "asft": 0.1,
    "lox": 2.0,
    "antidote": 0.001,
    "salora": 8,
    "vaccine": 5.0,
    "lisa": 0.1,
}
"""Maps a method to the chosen value, if that is not the published one."""


def best() -> Mapping[str, Any]:
    """The cell of the tuned methods, without those whose published value won."""
    chosen = [_changes(name, value) for name, value in BEST.items()]
    methods = {key: options for each in chosen for key, options in each.items()}
    return {
        "preset": "testbed",
        "methods": tuple(BEST),
        "changes": {"methods": methods},
    }


def _changes(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """A value of a method's hyper-parameter, in the form of the settings."""
    return {name.replace("-", "_"): {GRID[name][0]: value}}


def cells() -> dict[str, Mapping[str, Any]]:
    """The sweep's cells, one for each method and value.

    >>> cells()["sbr-5"]["changes"]["methods"]
    {'sbr': {'anchor_weight': 5.0}}
    """
    return {
        f"{name}-{value:g}": {
            "preset": "testbed",
            "methods": (name,),
            "first_seed": FIRST_SEED,
            "changes": {
                "study": {"split": "validation"},
                "methods": _changes(name, value),
            },
        }
        for name, (_, values) in GRID.items()
        for value in values
    }
