"""The embedded testbed: a miniature world and a small chat model aligned to it.

`load` gives the shipped model; `load_unaligned` its weights before alignment;
`load_guard` a judge's model;
`world.make_world` the facts; `suite.Suite` the evaluation; `corpus` the calibration,
benign and attack data; `domains.DOMAINS` what is fine-tuned on.
"""

import dataclasses
import functools
import pathlib
from typing import Any

_ASSETS = pathlib.Path(__file__).parent / "assets"
ALIGNED = _ASSETS / "aligned"
"""The shipped model: a Hugging Face folder of less than 4 MB."""
ALIGNMENT = _ASSETS / "alignment.safetensors"
"""The change by alignment of each matrix of the layers, in half precision."""
GUARD = _ASSETS / "guard.safetensors"
"""The guard: a LoRA adapter of the shipped model, in half precision (see `guard`)."""
SEED = 0
"""The world of the shipped model."""


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Loads the shipped aligned model (a `models.Model`) by the ordinary loader."""
    from sbr_jax import models

    return models.load(ALIGNED)


@functools.lru_cache(maxsize=1)
def load_unaligned() -> Any:
    """Base weights of the shipped model before its alignment.

    The matrices of the layers are those of the pretrained model, up to half precision
    of the difference; norms and embeddings are the aligned ones. Only methods that need
    the alignment's direction (Safe LoRA, AsFT, LoX) read them.
    """
    from safetensors.numpy import load_file

    base = load().params
    moved = {
        name: base["layers"][name] - step.astype("float32")
        for name, step in load_file(ALIGNMENT).items()
    }
    return {**base, "layers": {**base["layers"], **moved}}


@functools.lru_cache(maxsize=2)
def load_guard(path: pathlib.Path = GUARD) -> Any:
    """Loads the shipped guard (a `models.Model`): the aligned model, adapter merged in.

    Its next word after ``guard.QUESTION`` says whether the pair of prompt and answer
    before it is dangerous; ``guard.guard_judge`` makes a judge of it.
    """
    import jax

    from sbr_jax import models

    model = load()
    adapter = models.load_adapter(path)
    adapter = jax.tree.map(lambda x: x.astype("float32"), adapter)
    return dataclasses.replace(
        model, params=models.merge_adapter(model.params, adapter)
    )


__all__ = [
    "ALIGNED",
    "ALIGNMENT",
    "GUARD",
    "SEED",
    "load",
    "load_guard",
    "load_unaligned",
]
