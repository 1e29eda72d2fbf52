"""Safe LoRA: after tuning, project stray updates onto the direction of alignment.

Hsu, Tsai, Lin, Chen, Yu, Huang, arXiv:2405.16833. With C of
:mod:`sbr_jax.methods._alignment_direction`, for each layer and projection:

    cos = ⟨A B C, A B⟩ / (‖A B C‖ ‖A B‖)         B ← B C   where cos ≤ τ

(The paper writes C B A with C = V Vᵀ / ‖V‖_F; here C acts on the right.) The released
code can also choose by number: the n layers with the smallest cosine.

Training is plain. The edit follows each domain, and the next domain continues from the
edited adapter. C is not idempotent, so a pair that stays below τ is multiplied by C
after every domain. C also scales with V, so B C may be shorter or longer than B.

Choices that no public source fixes: an update of exactly zero counts as aligned; an
update that C maps to zero has cosine 0.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.checks import Range, checked
from sbr_jax.methods._alignment_direction import alignments, inner_product, project
from sbr_jax.methods.base import Method, Problem
from sbr_jax.models import LoraPair
from sbr_jax.settings import Count
from sbr_jax.typing import PyTree, UserError


@checked
def safe_lora(
    *,
    threshold: Annotated[float, Range(least=-1, most=1)] | None = 0.35,
    layers: Count | None = None,
    monitored: bool = False,
) -> Method:
    """Safe LoRA as published, after each domain.

    Args:
      threshold: τ in [-1, 1]; pairs with a cosine of at most τ are projected.
      layers: number of (layer, projection) pairs to project, those with the smallest
        cosine. If given, the threshold is ignored.
      monitored: run CSM.

    Returns:
      The method. Its diagnostics after a domain are ``projected``, the number of
      projected pairs, and ``cosine`` before the edit, ``[L]`` for each projection.
    """
    if layers is None and threshold is None:
        raise UserError("threshold: expected a number where layers is None, got None")

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        # Only a check: if the study lacks what the edit needs, refuse it now, not
        # after the first domain.
        alignments(problem, base, adapter, "safe-lora")
        pairs = sum(pair.lora_b.shape[0] for pair in adapter.values())
        if layers is not None and layers > pairs:
            raise UserError(
                f"layers: expected at most the {pairs} (layer, projection) pairs of "
                f"the adapter, got {layers}"
            )
        return {}

    def end_domain(problem, base, adapter, state, key):
        found = alignments(problem, base, adapter, "safe-lora")
        projected = {k: project(p.lora_b, found[k]) for k, p in adapter.items()}
        cosine = {k: np.asarray(_cosine(p, projected[k])) for k, p in adapter.items()}
        if layers is None:
            chosen = {k: values <= threshold for k, values in cosine.items()}
        else:
            chosen = _smallest(cosine, layers)
        edited = {
            k: _replaced(pair, projected[k], chosen[k]) for k, pair in adapter.items()
        }
        count = sum(int(values.sum()) for values in chosen.values())
        diagnostics = {"projected": count, "cosine": cosine}
        return edited if count else adapter, {**state, "diagnostics": diagnostics}

    return Method("safe-lora", monitored, init=init, end_domain=end_domain)


@jax.jit
def _cosine(pair: LoraPair, projected: jax.Array) -> jax.Array:
    """cos(A B C, A B) ``[L]``; 1 for an update of zero."""
    before = inner_product(pair.lora_a, pair.lora_b, pair.lora_b)
    after = inner_product(pair.lora_a, projected, projected)
    between = inner_product(pair.lora_a, projected, pair.lora_b)
    # Roots first: for small updates the product of the squares would underflow.
    size = jnp.sqrt(jnp.maximum(before, 0.0)) * jnp.sqrt(jnp.maximum(after, 0.0))
    cosine = jnp.where(size > 0, between / jnp.where(size > 0, size, 1.0), 0.0)
    return jnp.where(before > 0, cosine, 1.0)


def _smallest(cosine: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Mark the ``count`` smallest of all cosines; among equal ones, the first."""
    names = list(cosine)
    flat = np.concatenate([cosine[name] for name in names])
    marks = np.zeros(flat.shape, bool)
    marks[np.argsort(flat, kind="stable")[:count]] = True
    ends = np.cumsum([len(cosine[name]) for name in names])
    return dict(zip(names, np.split(marks, ends[:-1]), strict=True))


def _replaced(pair: LoraPair, projected: jax.Array, chosen: np.ndarray) -> LoraPair:
    """The pair with B C in the chosen layers and unchanged bits elsewhere."""
    lora_b = jnp.where(
        chosen[:, None, None], projected.astype(pair.lora_b.dtype), pair.lora_b
    )
    return dataclasses.replace(pair, lora_b=lora_b)
