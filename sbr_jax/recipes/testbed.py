"""The testbed: three domains, five seeds, both recipes with ablations and controls.

    python -m experiments.run testbed --workdir runs/testbed
    python -m experiments.report runs/testbed

Cost: see `experiments/README.md`. Expected: over five seeds plain LoRA falls
from a composite of 100 to 45.7, `safeanchor-exact` retains 99.9 %. Learning rate,
steps and rank were chosen on plain LoRA alone, before any defence was run, and are
shared by all rows; a defence's own hyper-parameters are the published ones unless its
row says otherwise.
"""

from collections.abc import Sequence
from typing import Any

from sbr_jax.recipes import Preset

DOMAINS = ("medical", "legal", "code")


def known_domains() -> Sequence[str]:
    """Return every domain of the testbed's world."""
    from sbr_jax.testbed.domains import DOMAINS as known

    return tuple(known)


def study(domains: Sequence[str], **options: Any) -> Any:
    """Build the testbed's study."""
    from sbr_jax.studies.testbed import build_study

    return build_study(tuple(domains), **options)


SETTINGS = {
    "steps_per_domain": 80,
    "batch_size": 16,
    "learning_rate": 8e-4,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "repair_steps": 20,
}
"""Calibrated on plain LoRA alone, then frozen. A repair is about a fifth of a domain's
training as published, 200 of 940 steps, and a quarter here, 20 of 80."""

OPTIONS = {
    "hard": False,
    "split": "test",
    "calibration_examples": 480,
    "model_folder": None,
    "judge": "exact",
}
"""Keyword arguments of `sbr_jax.studies.testbed.build_study`."""

PRESET = Preset(
    name="testbed",
    summary="medical, legal, code; both recipes, ablations and controls; 5 seeds",
    study=study,
    domains=DOMAINS,
    known_domains=known_domains,
    methods=(
        "plain",
        "safeanchor",
        "safeanchor-exact",
        "safeanchor-exact:previous-reference",
        "safeanchor-exact:published-energy",
        "safeanchor-exact:no-update",
        "safeanchor-exact:no-relaxation",
        "safeanchor-exact:no-anchor",
        "safeanchor-exact:no-csm",
        "safeanchor-exact:projection-only",
        "safeanchor-exact:anchor-only",
        "safeanchor-exact:csm-only",
        "safeanchor-exact:random",
        "safeanchor-exact:shuffled",
        "safeanchor-exact:benign",
    ),
    seeds=(0, 1, 2, 3, 4),
    settings=SETTINGS,
    options=OPTIONS,
)
