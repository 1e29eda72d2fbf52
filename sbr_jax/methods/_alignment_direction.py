"""The direction of alignment: the change of each projection's weights by alignment.

W_aligned are the weights that fine-tuning starts from, W_unaligned the weights before
alignment (:attr:`sbr_jax.methods.base.Problem.unaligned`). Per layer and projection:

    V = W_aligned − W_unaligned            C = Vᵀ V / ‖V‖_F

Safe LoRA (arXiv:2405.16833) and AsFT (arXiv:2506.08473) store W as ``[out, in]``, write
C = V Vᵀ / ‖V‖_F and multiply the update from the left, C · (B A). Here W is
``[in, out]`` and the update is A B, so V is the transpose of theirs, and the same C
(out × out) acts on the right: (A B) C. C is never formed: x C = ((x Vᵀ) V) / ‖V‖_F.

C is kept as published. Its eigenvalues are σ² / ‖V‖_F for the singular values σ of V.
So C is no projector: C C ≠ C, and it shrinks or stretches with the size of V. A layer
that alignment did not change has no direction. There C is the identity, so the layer is
neither projected nor penalised.

Legend: L layers, r rank of the adapter.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sbr_jax import _mesh, checks
from sbr_jax.methods.base import Problem
from sbr_jax.models.quantize import require_dense
from sbr_jax.typing import PyTree, UserError


class Alignment(NamedTuple):
    """V of one projection in all layers."""

    direction: jax.Array
    """V ``[L, in, out]``, in the dtype of the weights."""
    norm: jax.Array
    """‖V‖_F ``[L]``, float32; 0 where alignment changed nothing."""


def unaligned_layers(problem: Problem, method: str) -> Mapping[str, jax.Array]:
    """Layer weights ``{name: [L, ...]}`` before alignment.

    ``method`` is the name of the method that needs them, for the message.

    Raises:
      UserError: if the study does not have them.
    """
    if problem.unaligned is None:
        raise UserError(
            f"{method}: expected the weights before alignment in the study's "
            "`unaligned`, got None; this method needs W_aligned − W_unaligned"
        )
    return problem.unaligned["layers"]


def weight_change(
    base: PyTree, unaligned: Mapping[str, jax.Array], name: str, method: str
) -> jax.Array:
    """V = W_aligned − W_unaligned of one projection, float32 ``[L, in, out]``.

    ``unaligned`` comes from :func:`unaligned_layers`; V is placed like W_aligned.

    Raises:
      UserError: if the two have different architectures, or are quantised.
    """
    require_dense(
        {"the aligned weights": base["layers"][name], "unaligned": unaligned.get(name)},
        f"{method}: {name}",
        "load both without quantize=: codes round by more than alignment changed",
    )
    weight = jnp.asarray(base["layers"][name])
    before = unaligned.get(name)
    if before is None or before.shape != weight.shape:
        found = "none" if before is None else before.shape
        raise UserError(
            f"{method}: unaligned['layers'][{name!r}]: expected shape {weight.shape} "
            f"as in the aligned weights, got {found}; give the same architecture"
        )
    if _mesh.holding(weight) is not None:  # Only the weights are placed on the mesh.
        before = jax.device_put(before, weight.sharding)
    return weight.astype(jnp.float32) - jnp.asarray(before, jnp.float32)


def alignments(
    problem: Problem, base: PyTree, adapter: PyTree, method: str
) -> dict[str, Alignment]:
    """V and ‖V‖_F of every projection of the adapter.

    Raises:
      UserError: without weights before alignment, or if they equal the aligned ones.
    """
    unaligned = unaligned_layers(problem, method)
    found = {}
    for name in adapter:
        change = weight_change(base, unaligned, name, method)
        norm = jnp.sqrt(jnp.sum(jnp.square(change), axis=(1, 2)))
        found[name] = Alignment(change.astype(base["layers"][name].dtype), norm)
    norms = [alignment.norm for alignment in found.values()]
    if not any(checks.is_traced(norm) or bool(jnp.any(norm > 0)) for norm in norms):
        raise UserError(
            f"{method}: expected unaligned weights that differ from the aligned ones "
            f"in {', '.join(adapter)}, got equal ones; give the weights from before "
            "alignment"
        )
    return found


def project(rows: jax.Array, alignment: Alignment) -> jax.Array:
    """Rows ``[L, r, out]`` times C, ``((rows Vᵀ) V) / ‖V‖_F``, without forming C.

    Float32. Layers with V = 0 return the rows themselves.

    >>> twos = Alignment(jnp.full((1, 2, 2), 2.0), jnp.array([4.0]))  # C: twos too
    >>> project(jnp.array([[[1.0, 0.0]]]), twos).tolist()
    [[[2.0, 2.0]]]
    """
    rows = rows.astype(jnp.float32)
    direction = alignment.direction.astype(jnp.float32)
    inner = jnp.einsum("lro,lio->lri", rows, direction, precision="highest")
    outer = jnp.einsum("lri,lio->lro", inner, direction, precision="highest")
    norm = alignment.norm[:, None, None]
    return jnp.where(norm > 0, outer / jnp.where(norm > 0, norm, 1.0), rows)


def inner_product(lora_a: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Frobenius inner products ⟨A X, A Y⟩ = Σ (AᵀA) ∘ (X Yᵀ), float32 ``[L]``.

    A is ``[L, in, r]``, X and Y are ``[L, r, out]``; no in × out matrix is formed.

    >>> a, x = jnp.ones((1, 3, 1)), jnp.full((1, 1, 2), 2.0)
    >>> inner_product(a, x, x).tolist()  # A X is 3 × 2, every entry 2
    [24.0]
    """
    lora_a, left, right = (x.astype(jnp.float32) for x in (lora_a, left, right))
    inputs = jnp.einsum("lir,lis->lrs", lora_a, lora_a, precision="highest")
    outputs = jnp.einsum("lro,lso->lrs", left, right, precision="highest")
    return jnp.sum(inputs * outputs, axis=(1, 2))
