"""Keep a chat model safe while it is fine-tuned, with Optax transformations.

The core works on pytrees and losses only. It has a `Subspace` of directions that matter
for safety, an estimate of that subspace (`fisher_subspace`), and transformations that
keep an optimizer's steps out of it. jax and optax are loaded on first use, so that the
command line can report a mistake without loading them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbr_jax import losses
    from sbr_jax.fisher import energy_share, fisher_subspace, per_example_gradients
    from sbr_jax.subspace import (
        Subspace,
        contrast,
        discarded_energy,
        effective_rank,
        empty_subspace,
        from_factors,
        merge,
        overlap,
        principal_angles,
        project_onto,
        project_out,
        random_subspace,
        shuffled_subspace,
    )
    from sbr_jax.transforms import (
        add_bypass,
        fisher_relaxation,
        gradient_projection,
        multi_steps,
        project_onto_complement,
        read_subspace,
        relaxed,
        replace_subspace,
        trust_region,
        update_projection,
    )
    from sbr_jax.tuning import Tuned as Tuned
    from sbr_jax.tuning import tune as tune
    from sbr_jax.typing import UserError

__all__ = [
    "Subspace",
    "UserError",
    "add_bypass",
    "contrast",
    "discarded_energy",
    "effective_rank",
    "empty_subspace",
    "energy_share",
    "fisher_relaxation",
    "fisher_subspace",
    "from_factors",
    "gradient_projection",
    "losses",
    "merge",
    "multi_steps",
    "overlap",
    "per_example_gradients",
    "principal_angles",
    "project_onto",
    "project_onto_complement",
    "project_out",
    "random_subspace",
    "read_subspace",
    "relaxed",
    "replace_subspace",
    "shuffled_subspace",
    "trust_region",
    "update_projection",
]

_ROOMS = ("typing", "losses", "fisher", "subspace", "transforms")
_TUNING = ("Tuned", "tune")
"""They load language models, and are in no `import *`."""


def __getattr__(name: str) -> Any:
    """Load public names and their packages on first use."""
    if name in _TUNING:
        return getattr(importlib.import_module(f"{__name__}.tuning"), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for room in _ROOMS:
            found = getattr(importlib.import_module(f"{__name__}.{room}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, *_TUNING})
