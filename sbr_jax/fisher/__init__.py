"""Fisher subspaces, per-example gradients and their energy in a subspace."""

from sbr_jax.fisher.estimate import fisher_subspace
from sbr_jax.fisher.gradients import per_example_gradients
from sbr_jax.fisher.share import energy_share

__all__ = ["energy_share", "fisher_subspace", "per_example_gradients"]
