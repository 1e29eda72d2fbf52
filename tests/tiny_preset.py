"""A preset `tiny` over the made-up study, for tests of the programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import tiny

from sbr_jax import recipes
from sbr_jax.methods import Hyperparameters
from sbr_jax.programs import job
from sbr_jax.recipes.preset import Preset

STUDY = tiny.study()


@dataclasses.dataclass(frozen=True)
class TinyOptions:
    """Options of the made-up study; a kind of testbed for what asks for one.

    Attributes:
        size: of nothing.
        hard: neither.
        judge_folder: that a run does not remember.
    """

    size: int = 1
    hard: bool = False
    judge_folder: str | None = None

    def known_domains(self) -> Sequence[str]:
        return ("medical", "legal")

    def check(self, variants, methods, sources) -> None:
        pass

    def build(self, domains, sources, hardware, *, weights=True) -> Any:
        return STUDY


CONFIG = tiny.config(steps_per_domain=2)
PRESET = Preset(
    name="tiny",
    summary="",
    study=TinyOptions(),
    domains=("medical", "legal"),
    methods=("plain",),
    seeds=(3,),
    training=CONFIG.training,
    hardware=CONFIG.hardware,
    hyperparameters=Hyperparameters(),
)


@pytest.fixture
def tiny_presets(monkeypatch):
    """The command line knows the preset `tiny` as well."""
    load = recipes.load
    monkeypatch.setitem(recipes.MODULES, "tiny", "tiny")
    monkeypatch.setattr(
        recipes, "load", lambda name: PRESET if name == "tiny" else load(name)
    )


def make_job(*words: str, kind: type = job.JobArguments, preset: Preset = PRESET):
    """The job of a command line; nothing but its words is looked at."""
    arguments = job.parse_preset(kind, preset, words, "tests")
    return job.make_job(preset, arguments, forecast=True)
