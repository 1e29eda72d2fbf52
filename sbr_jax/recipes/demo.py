"""The demo: plain LoRA against both recipes of SafeAnchor, on three seeds.

    make demo
    python -m experiments.run demo --workdir runs/demo

Cost: about 5 minutes on two cores. Expected: the composite of plain LoRA falls from 100
to about 44; `safeanchor-exact` retains 100 %.
"""

import dataclasses

from sbr_jax.recipes.testbed import PRESET as TESTBED

PRESET = dataclasses.replace(
    TESTBED,
    name="demo",
    summary="plain LoRA against both recipes of SafeAnchor; what 'make demo' runs",
    methods=("plain", "safeanchor", "safeanchor-exact"),
    seeds=(0, 1, 2),
)
