"""Named sweeps: lists of cells for `experiments.sweep`, data and nothing else.

    python -m experiments.sweep testbed-table --workdir runs/table --seeds 5

A cell is one working directory: one preset with one sequence of domains and one set of
overrides. Its fields, all but the first optional:

    preset    of experiments.run
    methods   rows; None for every defence at its published defaults
    domains   sequence; default: the preset's
    set       overrides, as after --set
    attack    fields of experiments.attack (attack, ratio, examples, epochs): the cell
              is then an attack
    first_seed  the first of its seeds; default: 0

A tuned variant of a row is a cell of its own, named after it: the folder of the
published defaults has no place for it.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from experiments.configs import tuning

PAPERS = (
    "plain",
    "safeanchor",
    "safeanchor-exact",
    "unified",
    "sbr",
    "sbr:one",
    "adaptive-judge",
    "adaptive-probe",
)
BASELINES = tuple(row for row in tuning.GRID if row not in PAPERS)
ORDERS = tuple(itertools.permutations(("medical", "legal", "code")))
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.5)
RATES = (5e-4, 1e-3, 2e-3)
EPOCHS = (5, 20, 50)

SWEEPS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    # Every defence on the testbed, as published and at its best: work for processes.
    "testbed-table": {
        "papers": {"preset": "testbed", "methods": PAPERS},
        "baselines": {"preset": "testbed", "methods": BASELINES},
        **({"tuned": tuning.best()} if tuning.BEST else {}),
    },
    # Each baseline around its published value, on the validation split.
    "testbed-tuning": tuning.cells(),
    # Does the order of the domains matter?
    "testbed-orders": {
        "-".join(order): {
            "preset": "testbed",
            "methods": ("plain", "safeanchor-exact"),
            "domains": order,
        }
        for order in ORDERS
    },
    # Where does an attack begin to work? A ratio of 0 is benign training as long.
    "testbed-map": {
        f"ratio-{ratio}-rate-{rate:g}-epochs-{epochs}": {
            "preset": "testbed",
            "methods": ("plain", "safeanchor-exact"),
            "set": (f"learning_rate={rate}",),
            "attack": {"attack": "poison", "ratio": ratio, "epochs": epochs},
        }
        for ratio, rate, epochs in itertools.product(RATIOS, RATES, EPOCHS)
    },
}
"""Name to cells, in the order in which they are run."""
