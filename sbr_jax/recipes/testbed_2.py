"""The second testbed: erosion in every order, harm that no defence sees.

    python -m experiments.run testbed-2 --workdir runs/testbed-2
    python -m experiments.report runs/testbed-2

Cost: a domain of plain LoRA takes some 6 s on one core, all scores after it about 20.
Expected: on the validation split plain LoRA falls from a composite of 95.8 to between
44 and 71 in the six orders of its domains, and learns each to 92 at least. Learning
rate and the share of alignment that is kept were chosen on plain LoRA alone, with a
seed that no table uses, before any defence was run; `docs/testbed2.md` has what the
model misses.
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Training
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
    # Calibrated on plain LoRA alone, then frozen.
    training=Training(
        steps_per_domain=80,
        batch_size=16,
        learning_rate=1.6e-3,
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
