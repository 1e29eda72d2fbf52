"""Recipes: named presets with every number of an experiment, and nothing else."""

import dataclasses
import importlib

from sbr_jax.methods import Hyperparameters
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import StudyOptions


@dataclasses.dataclass(frozen=True)
class Preset:
    """One named experiment.

    Attributes:
        name: on the command line.
        summary: one line for `--list`.
        study: options of the study, which build it.
        domains: the default sequence.
        methods: the default variants, of `METHODS` or `VARIANTS`.
        seeds: the default seeds.
        training: mathematics, shared by all variants.
        hardware: how it is computed.
        hyperparameters: of every method; the published ones unless a recipe says
            otherwise.
    """

    name: str
    summary: str
    study: StudyOptions
    domains: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    training: Training = Training()
    hardware: Hardware = Hardware()
    hyperparameters: Hyperparameters = Hyperparameters()  # pyright: ignore[reportInvalidTypeForm]


MODULES = {
    "demo": "demo",
    "testbed": "testbed",
    "testbed-hard": "testbed_hard",
    "stories": "stories",
    "llama2-7b": "llama2_7b",
    "mistral-7b": "mistral_7b",
    "realtext": "realtext",
}
"""Name of a preset to its module in this package."""


def load(name: str) -> Preset:
    """The preset of this name, a key of `MODULES`."""
    return importlib.import_module(f"{__name__}.{MODULES[name]}").PRESET
