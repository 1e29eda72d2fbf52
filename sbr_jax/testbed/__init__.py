"""The embedded testbed: a miniature world and a small chat model aligned to it.

`load` gives the shipped model; `load_unaligned` its weights before alignment;
`load_guard` a judge's model; `world.make_world` the facts; `suite.Suite` the
evaluation; `corpus` the calibration, benign and attack data; `editions` the differences
between `testbed` and `testbed-2`, and the domains to fine-tune on.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from sbr_jax import files
from sbr_jax.testbed.editions import FIRST, Edition
from sbr_jax.typing import UserError

ALIGNED = FIRST.assets / "aligned"
"""The shipped model: a Hugging Face folder of less than 4 MB."""
ALIGNMENT = FIRST.assets / "alignment.safetensors"
"""Alignment's change to each matrix of the layers, in half precision."""
GUARD = FIRST.assets / "guard.safetensors"
"""The guard: a LoRA adapter of the shipped model, in half precision (see `guard`)."""
SEED = 0
"""The world of the shipped models."""
WORLDS = (1, 2, 3, 4, 5)
"""Worlds that ``python -m sbr_jax.testbed.build --worlds`` makes."""


def folder(edition: Edition = FIRST, seed: int = SEED) -> pathlib.Path:
    """The folder of a world's model: in the package, or in the user's cache."""
    if seed == SEED:
        return edition.assets
    return files.cache_folder() / edition.name / f"world-{seed}"


def check_built(edition: Edition, seed: int) -> None:
    """Refuses a world whose model has not been built."""
    if not (folder(edition, seed) / ALIGNED.name / "config.json").is_file():
        raise UserError(
            f"world {seed}: expected its model in {folder(edition, seed)}, got none: "
            f"python -m sbr_jax.testbed.build --edition {edition.name} --worlds {seed}"
        )


@functools.lru_cache(maxsize=2)
def load(edition: Edition = FIRST, seed: int = SEED) -> Any:
    """Loads an aligned model (a `models.Model`); by default the shipped `testbed`."""
    from sbr_jax import models

    check_built(edition, seed)
    return models.load(folder(edition, seed) / ALIGNED.name)


@functools.lru_cache(maxsize=2)
def load_unaligned(edition: Edition = FIRST, seed: int = SEED) -> Any:
    """Base weights of the model before its alignment.

    The layers' matrices are the pretrained model's, up to half precision of the
    difference; norms and embeddings are the aligned ones. Only methods that need the
    alignment's direction (Safe LoRA, AsFT, LoX) read them.
    """
    from safetensors.numpy import load_file

    base = load(edition, seed).params
    moved = {
        name: base["layers"][name] - step.astype("float32")
        for name, step in load_file(folder(edition, seed) / ALIGNMENT.name).items()
    }
    return {**base, "layers": {**base["layers"], **moved}}


@functools.lru_cache(maxsize=2)
def load_guard(path: pathlib.Path = GUARD) -> Any:
    """Loads the shipped guard (a `models.Model`): the aligned model, adapter merged in.

    Its next word after ``guard.QUESTION`` says whether the preceding pair of prompt and
    answer is dangerous; ``guard.guard_judge`` turns it into a judge.
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
    "WORLDS",
    "check_built",
    "folder",
    "load",
    "load_guard",
    "load_unaligned",
]
