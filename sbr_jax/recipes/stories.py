"""Real text: a 260K-parameter story model fine-tuned on three public data sets.

    python -m experiments.run stories --workdir runs/stories
        [--data FOLDER] [--model FOLDER] [--domains gsm8k medmcqa ...]

It shows that nothing depends on the testbed: this is the same pipeline, with losses
instead of judges. The model is not a chat model, so there is no refusal to measure or
to monitor. The Fisher comes from pairs of unsafe instructions and safe answers.

Cost: about 2 minutes per seed and variant on two cores; `--seed 0` for a first look.
Expected: each domain's loss falls by 0.6 to 3.5 nats while it is learnt. Under plain
LoRA, the loss on held-out safe answers ends higher than it started (3.55 against 3.14);
under both recipes it ends no higher. Without `--data` and `--model`, the folder
`shared` beside the repository is read. The premise, a low-rank safety spectrum, need
not hold in such a small model; the report measures the spectrum.
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Training
from sbr_jax.studies.options import StoriesOptions

PRESET = Preset(
    name="stories",
    summary="stories260K on real text: gsm8k, alpaca, codealpaca; losses and spectra",
    study=StoriesOptions(
        calibration=100,
        train=2000,
        held_out=96,
        max_length=128,
        calibration_source="safety_tuned_llamas",
        control_source="alpaca",
    ),
    domains=("gsm8k", "alpaca", "codealpaca"),
    methods=("plain", "safeanchor", "safeanchor-exact"),
    seeds=(0, 1, 2),
    training=Training(
        steps_per_domain=100,
        batch_size=8,
        learning_rate=3e-3,
        lora_rank=8,
        lora_alpha=16.0,
        repair_steps=200,
    ),
)
