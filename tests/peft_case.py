"""An adapter in PEFT's layout, and how to change its files."""

import json

from checkpoints import CONFIG, adapter

from sbr_jax.models import peft

PREFIX = "base_model.model.model.layers."


def save_pair(folder):
    """An adapter of two projections, scale 2."""
    peft.save_peft(folder, CONFIG, adapter(targets="(q|o)_proj"))
    return folder


def settings(folder, **changes):
    path = folder / peft.SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
