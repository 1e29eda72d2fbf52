"""The second testbed: erosion in every order, and harm that no defence sees.

    python -m experiments.run testbed-2 --workdir runs/testbed-2
    python -m experiments.report runs/testbed-2

Cost: about 6 s on one core for a domain of plain LoRA, and about 20 s for all scores
after it. Expected: on the validation split, plain LoRA falls from a composite of 95.8
to between 37 and 71 over the six orders of its domains, and learns each domain to at
least 92. Learning rate and the kept share of alignment were chosen on plain LoRA alone,
with a seed that no table uses, before any defence was run. `docs/testbed2.md` lists
what the model misses.
"""

import dataclasses

from sbr_jax.recipes.preset import Preset
from sbr_jax.recipes.testbed import PRESET as TESTBED
from sbr_jax.studies.options import Testbed2Options

PRESET = Preset(
    name="testbed-2",
    summary="medical, legal, code in a second world; harm no defence sees; 5 seeds",
    study=Testbed2Options(
        split="test",
        calibration_examples=480,
        probe_set="stratified",
        world=0,
        unseen_kinds=3,
        judge_auroc=1.0,
    ),
    domains=("medical", "legal", "code"),
    methods=(
        "plain",
        "safeanchor",
        "safeanchor-exact",
        "safeanchor-exact:projection-only",
        "safeanchor-exact:anchor-only",
        "safeanchor-exact:random",
    ),
    seeds=(0, 1, 2, 3, 4),
    # Calibrated on plain LoRA alone, then frozen; the rest is as in `testbed`.
    training=dataclasses.replace(TESTBED.training, learning_rate=1.6e-3),
)
