"""Attacks on aligned models: poisoned data, edited weights, adversarial suffixes.

An attack is a pure function from data to data or from weights to weights, or a search
for suffixes against a model's ``apply_fn``. It knows neither defences nor the trainer.
"""

from sbr_jax.attacks.ablation import WRITERS, ablate_direction
from sbr_jax.attacks.gcg import FULL, REDUCED, REDUCED_PROMPTS, GcgResult, gcg
from sbr_jax.attacks.harmful_finetuning import (
    Row,
    attack_count,
    backdoor_rows,
    identity_rows,
    poison,
    steps_for_epochs,
    with_identity,
    with_trigger,
)
from sbr_jax.attacks.suffix import (
    SplitPrompt,
    ascii_tokens,
    gcg_prompts,
    round_trips,
    text_round_trips,
)

__all__ = [
    "FULL",
    "REDUCED",
    "REDUCED_PROMPTS",
    "WRITERS",
    "GcgResult",
    "Row",
    "SplitPrompt",
    "ablate_direction",
    "ascii_tokens",
    "attack_count",
    "backdoor_rows",
    "gcg",
    "gcg_prompts",
    "identity_rows",
    "poison",
    "round_trips",
    "steps_for_epochs",
    "text_round_trips",
    "with_identity",
    "with_trigger",
]
