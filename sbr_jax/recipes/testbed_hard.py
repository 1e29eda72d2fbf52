"""The hard testbed: larger learning rate, ten domains, held-out harm categories.

    python -m experiments.run testbed-hard --workdir runs/testbed-hard
    python -m experiments.report runs/testbed-hard

Cost: about 25 minutes on two cores. Expected: plain LoRA ends at 30, `safeanchor` at
97, `safeanchor-exact` at 100, its projection alone at 30 and its anchor alone at 100,
after a first domain between 77 and 94. Use at least three seeds; a single one misleads
here.
"""

import dataclasses

from sbr_jax.recipes.testbed import PRESET as TESTBED
from sbr_jax.studies.options import TestbedOptions

DOMAINS = (
    "medical",
    "legal",
    "code",
    "finance",
    "science",
    "travel",
    "music",
    "sport",
    "history",
    "cooking",
)

PRESET = dataclasses.replace(
    TESTBED,
    name="testbed-hard",
    summary="ten domains, larger learning rate, held-out harm categories; 3 seeds",
    study=TestbedOptions(
        hard=True,
        split="test",
        calibration_examples=480,
        judge="exact",
        probe_set="one-phrasing",
    ),
    domains=DOMAINS,
    methods=(
        "plain",
        "safeanchor",
        "safeanchor-exact",
        "safeanchor-exact:projection-only",
        "safeanchor-exact:anchor-only",
        "safeanchor-exact:csm-only",
        "safeanchor-exact:random",
    ),
    seeds=(0, 1, 2),
    training=dataclasses.replace(TESTBED.training, learning_rate=1.6e-3),
)
