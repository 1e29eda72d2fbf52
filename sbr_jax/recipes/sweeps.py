"""Named sweeps: lists of cells for `experiments.sweep`, data and nothing else.

    python -m experiments.sweep testbed-table --workdir runs/table --seeds 5

A cell is one working directory: one preset with one sequence of domains and one set of
settings. All fields except the first are optional:

    preset    name of a preset of experiments.run
    methods   variants; None for every defence at its published defaults
    domains   sequence; default: the preset's
    changes   changes of the preset's study, training and methods, as in config.json
    attack    fields of experiments.attack (attack, ratio, examples, epochs), which
              make the cell an attack
    first_seed  the first of its seeds; default: 0

Tuned methods have their own cell, because one folder holds one set of settings.
"""

import itertools
import random
from collections.abc import Mapping
from typing import Any

from sbr_jax.recipes import tuning

# The first three, five and ten are the sequences of T = 3, 5 and 10 domains.
from sbr_jax.recipes.testbed_hard import DOMAINS

PAPERS = (
    "plain",
    "safeanchor",
    "safeanchor-exact",
    "unified",
    "lean",
    "lazy",
    "sbr",
    "sbr:one",
    "adaptive-judge",
    "adaptive-probe",
)
BASELINES = (
    *(name for name in tuning.GRID if name not in PAPERS),
    "safe-delta",
)
ORDERS = tuple(itertools.permutations(DOMAINS[:3]))
SAMPLED = 6
"""Number of orders of a longer sequence; the first is the default order."""


def sampled_orders(domains: tuple[str, ...], count: int) -> tuple[tuple[str, ...], ...]:
    """The given order and further orders, drawn without repetition.

    >>> sampled_orders(("a", "b", "c"), 2)[0]
    ('a', 'b', 'c')
    """
    # Only `random()` gives the same values in every version of Python.
    draw = random.Random(0).random
    orders = {domains: None}
    while len(orders) < count:
        ranks = {name: draw() for name in domains}
        orders[tuple(sorted(domains, key=ranks.__getitem__))] = None
    return tuple(orders)


def _benign(orders: tuple[tuple[str, ...], ...]) -> dict[str, Mapping[str, Any]]:
    """A cell for each order of the domains, without an attack."""
    return {
        "-".join(order): {
            "preset": "testbed",
            "methods": ("plain", "safeanchor-exact"),
            "domains": order,
        }
        for order in orders
    }


RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 1.0)
RATES = (3e-4, 1e-3)
EPOCHS = (5, 20)
PERSISTENT = ((0.1, 3e-4, 50), (0.1, 1e-3, 50))
"""Ratio, rate and epochs of further cells, as long as the published long attack."""


def _poisoned(ratio: float, rate: float, epochs: int) -> Mapping[str, Any]:
    return {
        "preset": "testbed",
        "methods": ("plain", "sbr", "safegrad", "adaptive-probe", "lean", "unified"),
        "changes": {"training": {"learning_rate": rate}},
        "attack": {"attack": "poison", "ratio": ratio, "epochs": epochs},
    }


PROJECTIONS = ("gradient", "update", "metric")
MERGES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"weighting": "uniform"},
    "eigenvalue": {"weighting": "eigenvalue"},
    "unit-trace": {"weighting": "unit-trace"},
    "keep-base": {"weighting": "eigenvalue", "keep_base": True},
}
NORMALISED: Mapping[str, Mapping[str, Any]] = {
    "none": {"relax": True, "normalisation": "none"},
    "mean": {"relax": True, "normalisation": "mean"},
    "kind": {"relax": True, "normalisation": "kind"},
    "strict": {"relax": False},
}
"""Normalisations of the traces that relax a projection, or no relaxation."""


def _projecting(projection: str, merge: str, normalised: str) -> Mapping[str, Any]:
    """A single way to project, without anchor, monitor or shares that only report."""
    options = {**MERGES[merge], **NORMALISED[normalised]}
    options |= {"projection": projection, "selectivity": False}
    return {
        "preset": "testbed",
        "methods": ("safeanchor-exact:projection-only",),
        "first_seed": tuning.FIRST_SEED,
        "changes": {
            "study": {"split": "validation"},
            "methods": {"safeanchor_exact": options},
        },
    }


SWEEPS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    # Every defence on the testbed, as published and tuned, for several processes.
    "testbed-table": {
        "papers": {"preset": "testbed", "methods": PAPERS},
        "baselines": {"preset": "testbed", "methods": BASELINES},
        **({"tuned": tuning.best()} if tuning.BEST else {}),
    },
    # Each method around its published value, on the validation split.
    "testbed-tuning": tuning.cells(),
    # Projection × merge × normalisation, on the validation split.
    "projection-grid": {
        "-".join(parts): _projecting(*parts)
        for parts in itertools.product(PROJECTIONS, MERGES, NORMALISED)
    },
    # Does the order of the domains matter? All orders of three, some of more.
    "testbed-orders": _benign(ORDERS),
    "testbed-orders-5": _benign(sampled_orders(DOMAINS[:5], SAMPLED)),
    "testbed-orders-10": _benign(sampled_orders(DOMAINS, SAMPLED)),
    # Where does an attack begin to work? A ratio of 0 is equally long benign training.
    "testbed-map": {
        f"ratio-{ratio}-rate-{rate:g}-epochs-{epochs}": _poisoned(ratio, rate, epochs)
        for ratio, rate, epochs in (
            *itertools.product(RATIOS, RATES, EPOCHS),
            *PERSISTENT,
        )
    },
}
"""Maps a name to its cells, in the order in which they are run."""
