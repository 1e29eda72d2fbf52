"""Mistral-7B-Instruct-v0.2: the second model of arXiv:2604.17691, same settings.

    python -m experiments.run mistral-7b --workdir runs/mistral-7b
        --model FOLDER_OR_HUB_ID --data FOLDER [--dry-run]

Compared with Llama-2-7B-Chat, only the model and the methods differ: the paper does not
report O-LoRA and Vaccine for it. Safe LoRA also needs the weights before alignment:
`--methods safe-lora --study.unaligned-folder FOLDER`.

Cost: `--dry-run` computes it without reading weights; docs/real-models.md has a table.
Expected: in the paper (not run here), plain LoRA falls from a composite of 88.7 to
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
