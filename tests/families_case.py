"""Tiny models of every family, and what PyTorch computes with them."""

import functools
import json
import pathlib
import tempfile

from parity.make_checkpoints import CASES, GOLDEN, seeded_weights
from safetensors.numpy import save_file

from sbr_jax import models

NAMES = sorted(CASES)
ROLLED = models.Hardware(unroll=1)
"""A real loop over the layers: shorter programs, and the scan is what is tested."""
FILE = "model.safetensors"


@functools.cache
def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write(folder, name, **changes):
    """The checkpoint of a case, as transformers would have written it."""
    found = golden(name)
    weights = seeded_weights(
        found["tensors"], found["seed"], found["config"]["model_type"]
    )
    save_file(weights, folder / FILE)
    text = json.dumps({**found["config"], **changes})
    (folder / "config.json").write_text(text)
    return folder


@functools.cache
def loaded(name):
    with tempfile.TemporaryDirectory() as folder:
        return models.load(write(pathlib.Path(folder), name), hardware=ROLLED)


SMALL = models.ModelConfig(
    vocab_size=24, width=16, mlp_width=20, layers=1, heads=2, init_scale=0.3
)
