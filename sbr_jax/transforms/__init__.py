"""Optax transformations that keep steps out of a `Subspace`."""

from sbr_jax.transforms.bypass import add_bypass, multi_steps
from sbr_jax.transforms.projection import (
    ProjectionState,
    fisher_relaxation,
    project_onto_complement,
    relaxed,
)
from sbr_jax.transforms.recipes import (
    UpdateProjectionState,
    gradient_projection,
    update_projection,
)
from sbr_jax.transforms.state import RelaxedState, read_subspace, replace_subspace
from sbr_jax.transforms.trust import TrustRegionState, trust_region

__all__ = [
    "ProjectionState",
    "RelaxedState",
    "TrustRegionState",
    "UpdateProjectionState",
    "add_bypass",
    "fisher_relaxation",
    "gradient_projection",
    "multi_steps",
    "project_onto_complement",
    "read_subspace",
    "relaxed",
    "replace_subspace",
    "trust_region",
    "update_projection",
]
