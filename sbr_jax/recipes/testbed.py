"""The testbed: three domains, five seeds, both recipes, ablations and controls.

    python -m experiments.run testbed --workdir runs/testbed
    python -m experiments.report runs/testbed

Cost: see `experiments/README.md`. Expected: over five seeds, plain LoRA falls from a
composite of 100 to 45.7, and `safeanchor-exact` retains 99.8 %. Learning rate, steps
and rank were chosen on plain LoRA alone, before any defence was run, and all variants
share them. A defence's own hyper-parameters are the published ones unless its variant
says otherwise.
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Training
from sbr_jax.studies.options import TestbedOptions

PRESET = Preset(
    name="testbed",
    summary="medical, legal, code; both recipes, ablations and controls; 5 seeds",
    study=TestbedOptions(
        hard=False,
        split="test",
        calibration_examples=480,
        judge="exact",
        probe_set="one-phrasing",
    ),
    domains=("medical", "legal", "code"),
    methods=(
        "plain",
        "safeanchor",
        "safeanchor-exact",
        "safeanchor-exact:previous-reference",
        "safeanchor-exact:published-energy",
        "safeanchor-exact:no-update",
        "safeanchor-exact:relaxed",
        "safeanchor-exact:no-anchor",
        "safeanchor-exact:no-csm",
        "safeanchor-exact:projection-only",
        "safeanchor-exact:relaxed-only",
        "safeanchor-exact:anchor-only",
        "safeanchor-exact:csm-only",
        "safeanchor-exact:random",
        "safeanchor-exact:shuffled",
        "safeanchor-exact:benign",
    ),
    seeds=(0, 1, 2, 3, 4),
    # Calibrated on plain LoRA alone, then frozen. A repair takes about a fifth of a
    # domain's training in the paper (200 of 940 steps) and a quarter here.
    training=Training(
        steps_per_domain=80,
        batch_size=16,
        learning_rate=8e-4,
        warmup_fraction=0.03,
        final_fraction=0.005,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lora_rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        lora_targets=r"(q|k|v|o)_proj",
        repair_steps=20,
        repair_blocks=2,
        repair_learning_rate_scale=0.1,
        replay_weight=1.0,
        tolerance=0.05,
        monitor_rule="point",
        monitor_confidence=0.95,
        fisher_examples=None,
        fisher_buffer=512,
    ),
)
