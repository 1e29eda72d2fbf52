"""Recipes: named presets with every number of an experiment, and nothing else.

Looking up a name loads nothing, so that a mistyped name is reported at once.
"""

import importlib
from typing import TYPE_CHECKING

from sbr_jax import errors

if TYPE_CHECKING:
    from sbr_jax.recipes.preset import Preset

MODULES = {
    "demo": "demo",
    "testbed": "testbed",
    "testbed-hard": "testbed_hard",
    "testbed-2": "testbed_2",
    "stories": "stories",
    "llama2-7b": "llama2_7b",
    "mistral-7b": "mistral_7b",
    "realtext": "realtext",
    "smollm2": "smollm2",
}
"""Maps the name of a preset to its module in this package."""


def load(name: str) -> "Preset":
    """Return the preset with this name."""
    if name not in MODULES:
        raise errors.unknown("preset", name, MODULES)
    return importlib.import_module(f"{__name__}.{MODULES[name]}").PRESET
