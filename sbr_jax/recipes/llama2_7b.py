"""Llama-2-7B-Chat: medical, legal, code, as arXiv:2604.17691 sets it up.

    python -m experiments.run llama2-7b --workdir runs/llama2-7b
        --model FOLDER_OR_HUB_ID --data FOLDER [--dry-run]

Each domain has 5,000 examples and 3 epochs, with 16 examples a step (8, accumulated
twice). LoRA has rank 16, alpha 32 and dropout 0.05 on queries, keys, values and
outputs. AdamW runs at 2e-4 with 3 % warm-up and a cosine to 1e-6. Sequences have 512
tokens. There are 500 calibration examples, a probe of 200 prompts with answers of 256
tokens, and five seeds. Any chat checkpoint of a known family can replace Llama's.

Two things differ from the paper. No measurement uses the probe's prompts (the paper's
are HarmBench's own). A data set that the folder lacks is replaced by the stand-in that
`config.json` names. Safe LoRA also needs the weights before alignment:
`--methods safe-lora --study.unaligned-folder FOLDER`.

Cost: `--dry-run` computes it without reading weights; docs/real-models.md has a table.
Expected: in the paper (not run here), plain LoRA falls from a composite of 91.4 to
43.6, SafeAnchor to 85.2. The 91.4 is out of reach with TruthfulQA's MC2.
"""

from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import DOMAINS, ChatOptions

EXAMPLES, EPOCHS, BATCH = 5000, 3, 16

PRESET = Preset(
    name="llama2-7b",
    summary="a chat model (--model, --data): medical, legal, code; as published",
    study=ChatOptions(
        train=EXAMPLES,
        held_out=1273,  # The whole test split of MedQA.
        calibration=500,
        safety_mix=500,
        harmful=500,
        probe=200,
        benchmarks=("harmbench", "truthfulqa", "bbq", "xstest", "mmlu"),
        judge="keyword",
        max_length=512,
        max_new_tokens=256,
        dtype="bfloat16",
    ),
    domains=DOMAINS,
    methods=(
        "plain",
        "ewc",
        "o-lora",
        "vaccine",
        "safegrad",
        "interleaving",
        "safeanchor",
        "safeanchor-exact",
        "sbr",
        "adaptive-probe",
        "unified",
    ),
    seeds=(42, 123, 456, 789, 1234),
    training=Training(
        steps_per_domain=-(-EXAMPLES * EPOCHS // BATCH),
        batch_size=BATCH,
        learning_rate=2e-4,
        warmup_fraction=0.03,
        final_fraction=0.005,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lora_rank=16,
        lora_alpha=32.0,
        lora_dropout=0.05,
        lora_targets=r"(q|k|v|o)_proj",
        repair_steps=200,
        repair_blocks=2,
        repair_learning_rate_scale=0.1,
        replay_weight=1.0,
        tolerance=0.05,
        monitor_rule="point",
        monitor_confidence=0.95,
        fisher_examples=None,
        fisher_buffer=512,
    ),
    # Five seeds at once would need five times the activations, and a killed domain
    # should not start over.
    hardware=Hardware(
        accumulation=2,
        vmap_seeds="no",
        checkpoint_every=200,
        fisher_microbatch=8,
        remat="yes",
    ),
)
