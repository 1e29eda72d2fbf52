"""Mistral-7B-Instruct-v0.2: the second model of arXiv:2604.17691, settings alike.

    python -m experiments.run mistral-7b --workdir runs/mistral-7b
        --model FOLDER_OR_HUB_ID --data FOLDER [--dry-run]

What the paper reports for it differs in the model and in the methods only: O-LoRA and
Vaccine are missing. Safe LoRA needs the weights before alignment as well:
`--methods safe-lora --study.unaligned-folder FOLDER`.

Cost: `--dry-run` computes it, and reads no weights; docs/real-models.md has a table.
Expected: as published, and not run here, plain LoRA falls from a composite of 88.7 to
39.2, SafeAnchor to 82.6.
"""

import dataclasses

from sbr_jax.recipes.llama2_7b import PRESET as LLAMA2

PRESET = dataclasses.replace(
    LLAMA2,
    name="mistral-7b",
    summary="the same on Mistral-7B-Instruct (--model, --data), methods as published",
    methods=tuple(m for m in LLAMA2.methods if m not in ("o-lora", "vaccine")),
)
