"""Named presets: what to run, on what, with which settings and at what cost.

A preset is data. Building its study is left to a function that imports what it needs,
so that listing presets and refusing a bad command line stay instantaneous.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """One named experiment.

    Attributes:
        name: on the command line.
        summary: one line for `--list`.
        study: `(domains, **options) -> Study`; imports inside.
        domains: the default sequence.
        known_domains: all that may be asked for; called when a name is to be checked.
        methods: the default rows, of `METHODS` or `ABLATIONS`.
        seeds: the default seeds.
        settings: fields of `sbr_jax.training.settings.Settings`, shared by all rows.
        options: keyword arguments of `study` with their defaults; `--set study.KEY=…`.
        check: `(rows, options, *, overrides, settings) -> None` refuses, before
            anything is read, what the study could only refuse later.
        survey: as `study` for `--dry-run`, but without weights; None: `study` is cheap.
    """

    name: str
    summary: str
    study: Callable[..., Any]
    domains: tuple[str, ...]
    known_domains: Callable[[], Sequence[str]]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[..., None] | None = None
    survey: Callable[..., Any] | None = None


HARDWARE = ("mesh", "remat", "generation_batch", "score_tokens")
"""Options of a study that change how a result is computed, and not the result."""


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a run's folder remembers, and that must not change.

    Not the place of a folder, for the fingerprint says what was read from it; not the
    hardware; nor the date, which is recorded where a template asks for it; nor the
    usual judge, so that folders from before there was a choice can be continued.

    >>> recorded({"split": "test", "model_folder": "/models/a", "judge": "exact"})
    {'split': 'test'}
    """
    usual = {"judge": "exact"}
    return {
        name: value
        for name, value in options.items()
        if "folder" not in name
        and name not in (*HARDWARE, "date")
        and usual.get(name) != value
    }


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
    """Return the preset of this name, a key of `MODULES`."""
    return importlib.import_module(f"{__name__}.{MODULES[name]}").PRESET
