"""Real text: a small chat model of our own on medical, legal and code data.

    python -m experiments.realtext --data FOLDER --output runs/realtext-model
    python -m experiments.run realtext --workdir runs/realtext
        --model runs/realtext-model --data FOLDER

The first command trains a Llama of 3.4 M parameters on the text of a data folder. It
learns to answer benign instructions and to refuse harmful ones, in about 32 minutes on
one core. The second command fine-tunes it on MedMCQA, LegalBench and CodeAlpaca. It
measures refusal on HarmBench, AdvBench and JailbreakBench prompts that the model never
saw, over-refusal on XSTest and held-out Alpaca, and how well the first token tells
harmful from harmless prompts.

This is the integration test of all real loaders, not a scientific claim. Such a small
model recognises harmful topics rather than harmful intent, and its curves are reported
as they are (docs/realtext.md). A refusal is a phrase of the list `jbb12`, which no
answer of the three domains contains. Learning rate, steps and rank were set on plain
LoRA alone.

Cost: 4 to 12 minutes per seed and variant on one core; `--seed 0` for a first look.
Expected: docs/realtext.md has the measured table; erosion need not be monotone.
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import RealtextOptions

BENCHMARKS = (
    "harmbench",
    "advbench",
    "jailbreakbench",
    "xstest",
    "alpaca",
    "refusal-auc",
)
"""Benchmarks that measure the new model, and the model after every domain."""


PRESET = Preset(
    name="realtext",
    summary="a 3.4 M chat model made from real text; medmcqa, legalbench, codealpaca",
    study=RealtextOptions(
        train=2000,
        held_out=100,
        calibration=300,
        safety_mix=300,
        harmful=300,
        probe=100,
        calibration_source="safety_tuned_llamas",
        benchmarks=BENCHMARKS,
        limit=100,
        judge="keyword:jbb12",
        max_length=256,
        max_new_tokens=24,
        dtype="float32",
        drop_overlaps=True,
    ),
    domains=("medmcqa", "legalbench", "codealpaca"),
    methods=(
        "plain",
        "safeanchor",
        "safeanchor-exact",
        "safeanchor-exact:projection-only",
        "safeanchor-exact:random",
        "safeanchor-exact:benign",
        "sbr",
        "unified",
    ),
    seeds=(0, 1, 2),
    training=Training(
        steps_per_domain=60,
        batch_size=8,
        learning_rate=2e-3,
        lora_rank=8,
        lora_alpha=16.0,
        repair_steps=15,
    ),
    hardware=Hardware(generation_batch=16),
)
