"""A user's own chat model and files, as `sbr-jax tune` sets them up.

    sbr-jax tune --model FOLDER_OR_HUB_ID --train FILE --output FOLDER
        [--harmful FILE] [--safety FILE] [--eval FILE] [--method NAME] [--epochs 3]

Training takes three epochs with 8 examples a step. LoRA has rank 16 and alpha 32 on
queries, keys, values and outputs. AdamW runs at 2e-4 with 3 % warm-up and a cosine to a
two-hundredth. The number of steps follows from the data; a repair takes a fifth of a
domain's steps, as in arXiv:2604.17691.

The default is `safegrad`. Among the methods that need only safe exchanges, it withstood
both benign drift and poison on the testbed and learnt everything (docs/results.md); on
a real chat model it kept more refusals than plain training (docs/claims.md). The
monitor is on if harmful prompts are given. The spectrum of random tokens, which costs a
second Fisher, is off.

Cost: printed before it starts. Expected: depends on the model and the data.
"""

import dataclasses

from sbr_jax.methods import Hyperparameters
from sbr_jax.settings import Hardware, Training

METHOD = "safegrad"
EPOCHS = 3.0

TRAINING = Training(
    steps_per_domain=200,  # Used only if --epochs does not decide.
    batch_size=8,
    learning_rate=2e-4,
    warmup_fraction=0.03,
    final_fraction=0.005,
    weight_decay=0.01,
    max_grad_norm=1.0,
    lora_rank=16,
    lora_alpha=32.0,
    lora_dropout=0.0,
    lora_targets=r"(q|k|v|o)_proj",
    repair_steps=200,
    repair_blocks=2,
    repair_learning_rate_scale=0.1,
    replay_weight=1.0,
    tolerance=0.05,
    monitor_rule="point",
    monitor_confidence=0.95,
    fisher_examples=None,
    fisher_buffer=256,
)

# With all projections adapted, the model soon learns to refuse, and soon too much.
ALIGNING = dataclasses.replace(
    TRAINING,
    learning_rate=1e-3,
    lora_targets=r"(q|k|v|o|gate|up|down)_proj",
    warmup_fraction=0.1,
)

# There is seldom more than one seed. A step may take seconds, so show every loss.
HARDWARE = Hardware(
    vmap_seeds="no", checkpoint_every=50, log_every=1, fisher_microbatch=4
)


def _hyperparameters() -> Hyperparameters:  # pyright: ignore[reportInvalidTypeForm]
    """Published hyper-parameters, monitored, without the random control's spectrum."""
    found = Hyperparameters()
    changed = {}
    for field in dataclasses.fields(found):
        own = getattr(found, field.name)
        values = {"control_spectrum": False, "monitored": field.name != "plain"}
        known = {k: v for k, v in values.items() if hasattr(own, k)}
        changed[field.name] = dataclasses.replace(own, **known)
    return dataclasses.replace(found, **changed)


HYPERPARAMETERS = _hyperparameters()
