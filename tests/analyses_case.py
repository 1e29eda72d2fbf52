"""A tiny model with subspaces of its adapter, and examples of made-up kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import tiny

from sbr_jax import from_factors, models
from sbr_jax.analysis import coupling
from sbr_jax.studies.examples import Examples

ADAPTER = models.init_adapter(jax.random.key(1), tiny.CONFIG, rank=2, alpha=4.0)


def lora_subspace(seed, count, adapter=ADAPTER, reach_a=False):
    """A subspace of the adapter from made-up gradients; of B alone, as when fresh."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    rows = jax.tree.map(
        lambda x: jax.random.normal(next(keys), (count, *x.shape)), adapter
    )
    if not reach_a:
        rows = {
            name: dataclasses.replace(pair, lora_a=jnp.zeros_like(pair.lora_a))
            for name, pair in rows.items()
        }
    return from_factors(
        rows,
        max_rank=min(count, 32),
        energy=1.0,
        unit=models.is_lora_pair,
        layer_axes=1,
    )


SAFETY, BENIGN = lora_subspace(2, 3), lora_subspace(3, 3)
STEPS = coupling.steps(jax.random.key(4), ADAPTER, SAFETY, BENIGN, draws=2)


EXAMPLES = Examples(
    kinds={"refusal": tiny.dataset(30, 24, 0), "truth": tiny.dataset(31, 24, 3)},
    refusing=tiny.dataset(32, 12, 0),
    complying=tiny.dataset(32, 12, 7),
    harmless=tiny.dataset(33, 12, 5),
)

REQUESTS = {
    "harmful": {"direct": tiny.dataset(34, 12, 0)},
    "harmless": {"look-alikes": tiny.dataset(35, 10, 5)},
}
