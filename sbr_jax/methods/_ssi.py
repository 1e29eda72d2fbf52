"""Safety subspace identification (SSI) for adapters.

SafeAnchor (arXiv:2604.17691), section 3.1: with δ = vec([B; A]) of one projection in
one layer, F = (1/N) Σ s sᵀ, s = ∇_δ log p_θ(y | x) over the calibration set, the
subspace is spanned by the leading eigenvectors that hold ρ of tr F.

A fresh adapter has B = 0, so ∂/∂A = 0. The first Fisher then has a B block only and
leaves A unprotected in the first domain. ``protect_a="perturb"`` adds the missing
block. To first order, ∂ log p/∂A = scale · xᵀ(g Bᵀ) is linear in B. So its directions
are measured at one small random B, with B's own gradient masked out, and its
eigenvalues are rescaled to the trace of the B block. The two blocks have disjoint
support, so their merge is exact; its trace is twice that of the B block.

With eigenvalue weights, F_0 + F_1 + … is a sum of Fishers whose traces differ by orders
of magnitude. A model that answers well has small gradients and a drifted model has
large ones, so the drifted model dominates the sum. ``weighting="unit-trace"`` merges
F_t / tr F_t instead, so that each domain counts equally in each layer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data.batches import TokenDataset, first_tokens, take
from sbr_jax.data.by_length import by_length
from sbr_jax.fisher import fisher_subspace
from sbr_jax.methods.base import LAYER_AXES, Problem, benign_control
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.models import is_lora_pair
from sbr_jax.progress import task
from sbr_jax.subspace import (
    Subspace,
    contrast,
    merge,
    random_subspace,
    shuffled_subspace,
    sketch,
)
from sbr_jax.transforms import fisher_relaxation
from sbr_jax.typing import PyTree, UserError

PERTURBATION = 0.01
"""Standard deviation of ``protect_a``'s random B, relative to A's."""


@dataclasses.dataclass(frozen=True)
class Ssi:
    """How subspaces are identified, merged and relaxed: options, no arrays.

    The attributes are keywords of :func:`sbr_jax.methods.safeanchor.safeanchor`.
    """

    energy: float
    max_rank: int
    fisher: str
    reduction: str
    weighting: str
    normalisation: str
    strictness: float
    relax: bool
    protect_a: str
    keep_base: bool
    basis: str
    calibration_tokens: int | None = None
    contrast: float | None = None

    @classmethod
    def of(cls, options: Any) -> "Ssi":
        """The subspace options among a method's hyper-parameters."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: getattr(options, name) for name in fields})

    def identify(
        self, problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> Subspace:
        """The subspace of the current model, from the set that ``basis`` names."""
        check_sizes(problem, adapter, self.max_rank)
        sets = self.sets(problem)
        return self.estimate(problem, base, adapter, sets[0], key, sets[1])

    def sets(self, problem: Problem) -> tuple[TokenDataset, TokenDataset | None]:
        """The set that gives the directions, and the set to contrast it with."""
        if self.basis == "benign":
            return benign_control(problem, "basis='benign'"), None
        if self.contrast is None:
            return problem.calibration, None
        benign = benign_control(problem, f"contrast={self.contrast}")
        return problem.calibration, benign

    def batches(self, problem: Problem, dataset: TokenDataset) -> Iterator[dict]:
        """The examples that the Fisher sees, grouped by length into microbatches."""
        if self.calibration_tokens is not None:
            dataset = first_tokens(dataset, self.calibration_tokens)
        dataset = some(dataset, _seen(problem, dataset))
        size = problem.hardware.fisher_microbatch
        yield from by_length(dataset, size, least=size)

    def estimate(
        self,
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        dataset: TokenDataset,
        key: jax.Array,
        against: TokenDataset | None = None,
    ) -> Subspace:
        """Leading directions of the Fisher on a dataset, optionally against another."""
        loss_fn = answer_loss(problem.apply_fn, self.reduction, self.fisher)
        found = self._leading(problem, loss_fn, base, adapter, dataset, key, against)
        if self.protect_a == "perturb" and _all_zero_b(adapter):
            noise_key, key = jax.random.split(key)
            perturbed = perturb_b(noise_key, adapter)
            masked = _without_b_gradient(loss_fn)
            given = (problem, masked, base, perturbed, dataset, key, against)
            block = _with_trace(self._leading(*given), found.trace)
            found = merge(found, block, max_rank=self.max_rank, energy=self.energy)
        return found

    def _leading(self, problem, loss_fn, base, adapter, dataset, key, against):
        def fisher(examples: TokenDataset, max_rank: int, energy: float) -> Subspace:
            given = (problem, loss_fn, base, adapter, examples, key)
            return self._fisher(*given, max_rank, energy)

        if against is None:
            return fisher(dataset, self.max_rank, self.energy)
        # All directions of both, as many as the buffer can hold.
        least = max(problem.training.fisher_buffer, self.max_rank)
        found = [
            fisher(x, min(_seen(problem, x), least), 1.0) for x in (dataset, against)
        ]
        return contrast(
            *found,
            max_rank=self.max_rank,
            energy=self.energy,
            regulariser=float(self.contrast or 1.0),
        )

    def _fisher(
        self, problem, loss_fn, base, adapter, dataset, key, max_rank, energy
    ) -> Subspace:
        with task("Fisher, examples", _seen(problem, dataset)) as done:
            return fisher_subspace(
                loss_fn,
                adapter,
                self.batches(problem, dataset),
                max_rank=max_rank,
                energy=energy,
                fisher=self.fisher,
                unit=is_lora_pair,
                layer_axes=LAYER_AXES,
                args=(base,),
                key=key,
                microbatch=problem.hardware.fisher_microbatch,
                buffer_rank=max(problem.training.fisher_buffer, max_rank),
                memory_budget=problem.training.memory_bytes,
                progress=done,
            )

    def stored(self, found: Subspace) -> Subspace:
        """The form in which a subspace is merged: with trace 1 for ``unit-trace``."""
        if self.weighting != "unit-trace":
            return found
        unit = jax.tree.map(lambda t: (t > 0).astype(t.dtype), found.trace)
        return _with_trace(found, unit)

    def merged(self, old: Subspace, new: Subspace, protected: Subspace | None):
        """Join a stored subspace and a new one under the cap on the rank.

        **Guarantee**: with ``unit-trace``, the scale of a Fisher changes nothing, and
        after t domains the stored subspace is that of Σ F_i / tr F_i, with trace 1 + t.
        """
        return merge(
            old,
            self.stored(new),
            max_rank=self.max_rank,
            energy=self.energy,
            weighting="uniform" if self.weighting == "uniform" else "eigenvalue",
            protected=protected if self.keep_base else None,
        )

    def active(self, stored: Subspace, key: jax.Array) -> Subspace:
        """The subspace to project away: the stored one, or a control of equal rank."""
        if self.basis == "random":
            return random_subspace(key, stored)
        if self.basis == "shuffled":
            return shuffled_subspace(key, stored)
        return stored

    def coefficients(self, subspace: Subspace, trace: PyTree) -> PyTree:
        """α per layer from the newest trace; 0 (strict) without relaxation."""
        if not self.relax:
            return jax.tree.map(jnp.zeros_like, trace)
        newest = dataclasses.replace(subspace, trace=trace)
        return fisher_relaxation(newest, self.strictness, self.normalisation)


def check_sizes(problem: Problem, adapter: PyTree, max_rank: int) -> None:
    """Refuse a rank cap above a unit's size, or one that exceeds the memory budget.

    Raises:
      UserError: naming ``max_rank`` and the unit, or the least budget.
    """
    for name, pair in adapter.items():
        size = sum(int(np.prod(x.shape[LAYER_AXES:])) for x in jax.tree.leaves(pair))
        if max_rank > size:
            raise UserError(
                f"max_rank: expected at most the {size} parameters of one layer's "
                f"{name} adapter, got {max_rank}"
            )
    count = sum(x.size for x in jax.tree.leaves(adapter))
    sketch.plan(count, max_rank, 1, max_rank, problem.training.memory_bytes)


def perturb_b(key: jax.Array, adapter: PyTree, scale: float = PERTURBATION) -> PyTree:
    """The adapter with B ~ N(0, (scale · std A)²), A unchanged."""
    pairs, treedef = jax.tree.flatten(adapter, is_leaf=is_lora_pair)
    changed = []
    for index, pair in enumerate(pairs):
        noise = jax.random.normal(
            jax.random.fold_in(key, index), pair.lora_b.shape, pair.lora_b.dtype
        )
        size = (scale * jnp.std(pair.lora_a)).astype(noise.dtype)
        changed.append(dataclasses.replace(pair, lora_b=noise * size))
    return treedef.unflatten(changed)


def _all_zero_b(adapter: PyTree) -> bool:
    pairs = jax.tree.leaves(adapter, is_leaf=is_lora_pair)
    return not any(bool(jnp.any(pair.lora_b != 0)) for pair in pairs)


@functools.lru_cache(maxsize=64)
def _without_b_gradient(loss_fn):
    def masked(adapter, example, *args):
        def freeze(pair):
            return dataclasses.replace(pair, lora_b=jax.lax.stop_gradient(pair.lora_b))

        frozen = jax.tree.map(freeze, adapter, is_leaf=is_lora_pair)
        return loss_fn(frozen, example, *args)

    return masked


def _with_trace(subspace: Subspace, trace: PyTree) -> Subspace:
    """Rescale eigenvalues so that the trace of each layer becomes ``trace``.

    A layer with trace 0 keeps it.
    """

    def rescale(values, old, new):
        ratio = jnp.where(old > 0, new / jnp.where(old > 0, old, 1.0), 0.0)
        return values * ratio[..., None]

    old = subspace.trace
    eigenvalues = jax.tree.map(rescale, subspace.eigenvalues, old, trace)
    trace = jax.tree.map(lambda o, n: jnp.where(o > 0, n, 0.0), old, trace)
    return dataclasses.replace(subspace, eigenvalues=eigenvalues, trace=trace)


def _seen(problem: Problem, dataset: TokenDataset) -> int:
    """Number of a dataset's examples that a Fisher averages over."""
    return min(len(dataset), problem.training.fisher_examples or len(dataset))


def some(dataset: TokenDataset, most: int) -> TokenDataset:
    """At most ``most`` examples, evenly spaced."""
    total = len(dataset)
    if most >= total:
        return dataset
    return take(dataset, np.linspace(0, total - 1, most).round().astype(int))
