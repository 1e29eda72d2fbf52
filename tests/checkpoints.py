"""Where the tests find the small trained checkpoint, and tiny models of their own."""

import collections
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sbr_jax import models
from sbr_jax.models import weights

SHARED = Path(os.environ.get("SBR_JAX_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "checkpoints" / "stories260K"

needs_stories = pytest.mark.skipif(
    not (STORIES / "hf").is_dir(), reason="the stories260K checkpoint is not here"
)

CONFIG = models.ModelConfig(
    vocab_size=24,
    width=16,
    mlp_width=20,
    layers=2,
    heads=4,
    kv_heads=2,
    context=64,
    init_scale=0.3,
    bos=1,
    eos=(2,),
)


def golden():
    return json.loads((STORIES / "golden.json").read_text())


def params(config=CONFIG, dtype=jnp.float32):
    return models.init_params(jax.random.key(0), config, dtype)


def adapter(config=CONFIG, seed=1, targets=".*", rank=2):
    """An adapter with a B that is not zero."""
    pairs = models.init_adapter(
        jax.random.key(seed), config, rank=rank, alpha=4.0, targets=targets
    )
    return {
        name: models.LoraPair(
            0.3 * jax.random.normal(jax.random.key(seed + i), pair.lora_b.shape),
            pair.lora_a,
            pair.scale,
        )
        for i, (name, pair) in enumerate(pairs.items())
    }


def tokens(batch=3, length=9, config=CONFIG, seed=5):
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 3, config.vocab_size
    )


def counting(patch, key=lambda checkpoint, name: name):
    """Bytes that are read of each tensor of weights from now on."""
    read: collections.Counter[str] = collections.Counter()
    real = weights.Checkpoint.slice

    def noted(self, name):
        handle = real(self, name)

        class Handle:
            def __getattr__(self, attribute):
                return getattr(handle, attribute)

            def __getitem__(_, index):
                found = handle[index]
                read[key(self, name)] += found.nbytes
                return found

        return Handle()

    patch.setattr(weights.Checkpoint, "slice", noted)
    return read
