"""Low-rank subspaces of parameter trees: estimating, merging, projecting, comparing."""

from sbr_jax.subspace.angles import discarded_energy, overlap, principal_angles
from sbr_jax.subspace.contrasting import contrast
from sbr_jax.subspace.controls import random_subspace, shuffled_subspace
from sbr_jax.subspace.factors import from_factors
from sbr_jax.subspace.geometry import project_onto, project_out
from sbr_jax.subspace.merging import merge
from sbr_jax.subspace.record import Subspace, effective_rank, empty_subspace

__all__ = [
    "Subspace",
    "contrast",
    "discarded_energy",
    "effective_rank",
    "empty_subspace",
    "from_factors",
    "merge",
    "overlap",
    "principal_angles",
    "project_onto",
    "project_out",
    "random_subspace",
    "shuffled_subspace",
]
