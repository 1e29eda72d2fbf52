"""The demo: plain LoRA against SafeAnchor and the best row, on three seeds.

    make demo
    python -m experiments.run demo --workdir runs/demo

Cost: some 3 minutes on two cores. Expected: the composite of plain LoRA falls from 100
to about 44, that of the published SafeAnchor to about 93; `lean` retains 100 %.
"""

import dataclasses

from sbr_jax.recipes.testbed import PRESET as TESTBED

PRESET = dataclasses.replace(
    TESTBED,
    name="demo",
    summary="plain LoRA against SafeAnchor and lean; what 'make demo' runs",
    methods=("plain", "safeanchor", "lean"),
    seeds=(0, 1, 2),
)
