"""Preset: one named experiment with all its numbers."""

import dataclasses

from sbr_jax.methods import Hyperparameters
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import StudyOptions


@dataclasses.dataclass(frozen=True)
class Preset:
    """One named experiment.

    Attributes:
        name: name on the command line.
        summary: one line for `--list`.
        study: options that build the study.
        domains: the default sequence.
        methods: the default variants, from `METHODS` or `VARIANTS`.
        seeds: the default seeds.
        training: the mathematics, shared by all variants.
        hardware: how it is computed.
        hyperparameters: hyper-parameters of every method; the published ones unless a
            recipe says otherwise.
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
