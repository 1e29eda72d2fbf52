"""Safety subspace identification (SSI) for adapters, and what is reported about it.

SafeAnchor (arXiv:2604.17691), section 3.1: with δ = vec([B; A]) of one projection in
one layer, F = (1/N) Σ s sᵀ, s = ∇_δ log p_θ(y | x) over the calibration set, the
subspace is spanned by the leading eigenvectors that hold ρ of tr F.

A fresh adapter has B = 0, so ∂/∂A = 0: the first Fisher has a B block only and leaves
A unprotected in the first domain. ``protect_a="perturb"`` adds the missing block: to
first order ∂ log p/∂A = scale · xᵀ(g Bᵀ) is linear in B, so its directions are measured
at one small random B (B's own gradient masked out) and its eigenvalues are rescaled to
the trace of the B block. The two blocks have disjoint support, so their merge is exact;
its trace is twice that of the B block.

In its own examples a subspace holds ρ of the energy by construction. Whether it is
about safety, examples say that had no part in it: the directions of one half of the
calibration set are measured on the other half and on the task,

    held-out share = Σ ‖Vᵀ s‖² / Σ ‖s‖²  over the other half,   task share likewise,
    selectivity    = held-out share / task share.

Merged by eigenvalue, F_0 + F_1 + … is a sum of Fishers whose traces differ by orders:
a model that answers well has small gradients, one that drifted has large ones, and the
sum is then about the latter. ``weighting="unit-trace"`` merges F_t / tr F_t instead:
each domain's counts alike, in each layer.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data.batches import TokenDataset, first_tokens, take
from sbr_jax.data.layout import by_length
from sbr_jax.fisher import fisher_subspace
from sbr_jax.fisher.share import energy_shares
from sbr_jax.methods.base import LAYER_AXES, Problem
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.models import is_lora_pair
from sbr_jax.progress import task
from sbr_jax.subspace import (
    Subspace,
    contrast,
    discarded_energy,
    effective_rank,
    merge,
    principal_angles,
    random_subspace,
    shuffled_subspace,
    sketch,
)
from sbr_jax.transforms import fisher_relaxation
from sbr_jax.typing import PyTree, UserError

ANGLES = 8
"""Principal angles kept in the results for each layer."""

SHARED = 32
"""Examples of either kind that a share is measured on, at most."""

PERTURBATION = 0.01
"""Standard deviation of the random B of ``protect_a``, relative to A's."""


@dataclasses.dataclass(frozen=True)
class Ssi:
    """Identification, merging and relaxation of subspaces: options, no arrays.

    Attributes are the keywords of :func:`sbr_jax.methods.safeanchor.safeanchor`.
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
        """Those of a method's hyper-parameters that are about subspaces."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: getattr(options, name) for name in fields})

    def identify(
        self, problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> Subspace:
        """The subspace of the present model, from the set that ``basis`` names."""
        check_sizes(problem, adapter, self.max_rank)
        sets = self._sets(problem)
        return self.estimate(problem, base, adapter, sets[0], key, sets[1])

    def _sets(self, problem: Problem) -> tuple[TokenDataset, TokenDataset | None]:
        """The set of the directions, and the one that they are contrasted with."""

        def benign(name: str) -> TokenDataset:
            found = problem.calibration_controls.get("benign")
            if found is None:
                raise UserError(
                    f"{name}: expected calibration_controls['benign'] in the study, "
                    "got none"
                )
            return found

        if self.basis == "benign":
            return benign("basis='benign'"), None
        if self.contrast is None:
            return problem.calibration, None
        return problem.calibration, benign(f"contrast={self.contrast}")

    def shares(
        self,
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        key: jax.Array,
        task: TokenDataset | None,
    ) -> dict[str, PyTree]:
        """How much of held-out safety and of a task lies in the subspace of a half.

        Args:
          problem: its calibration set gives the half, and what is held out.
          base: frozen weights.
          adapter: of the present model.
          key: as for :meth:`identify`.
          task: examples of what is to be learnt; None for none.

        Returns:
          ``held_out_share`` and, with a task, ``task_share`` and their ratio
          ``selectivity``, for each layer; empty where a half would be empty.
        """
        half = self.half(problem, base, adapter, key)
        if half is None:
            return {}
        sets = {"held_out_share": held_out(problem)}
        if task is not None and len(task):
            sets["task_share"] = task
        found = {
            name: self.shares_of(problem, base, adapter, dataset, [half])[0]
            for name, dataset in sets.items()
        }
        if len(found) > 1:
            found["selectivity"] = jax.tree.map(_ratio, *found.values())
        return found

    def half(
        self, problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> Subspace | None:
        """The subspace that half of the examples would have projected away.

        None where a half would be empty.
        """
        chosen, against = self._sets(problem)
        if min(len(chosen), len(problem.calibration)) < 2:
            return None
        half = _every_second(chosen, 0)
        other = None if against is None else _every_second(against, 0)
        return self.active(self.estimate(problem, base, adapter, half, key, other), key)

    def shares_of(
        self,
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        dataset: TokenDataset,
        subspaces: Sequence[Subspace],
        most: int = SHARED,
    ) -> list[PyTree]:
        """The share of a set, of so many examples at most, that lies in each."""
        return energy_shares(
            answer_loss(problem.apply_fn, self.reduction),
            adapter,
            _batches(problem, self._cut(_some(dataset, most))),
            subspaces,
            args=(base,),
        )

    def _cut(self, dataset: TokenDataset) -> TokenDataset:
        """The dataset with as many answer tokens as the Fisher sees."""
        count = self.calibration_tokens
        return dataset if count is None else first_tokens(dataset, count)

    def estimate(
        self,
        problem: Problem,
        base: PyTree,
        adapter: PyTree,
        dataset: TokenDataset,
        key: jax.Array,
        against: TokenDataset | None = None,
    ) -> Subspace:
        """The leading directions of the Fisher on one dataset, or against another's."""
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
        # Every direction of both, as far as the buffer goes.
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
        dataset = self._cut(dataset)
        with task("Fisher, examples", _seen(problem, dataset)) as done:
            return fisher_subspace(
                loss_fn,
                adapter,
                _batches(problem, dataset),
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
        """What is kept of a subspace to be merged: of trace 1 where those are."""
        if self.weighting != "unit-trace":
            return found
        unit = jax.tree.map(lambda t: (t > 0).astype(t.dtype), found.trace)
        return _with_trace(found, unit)

    def merged(self, old: Subspace, new: Subspace, protected: Subspace | None):
        """Joins a stored subspace and a new one under the cap.

        **Guarantee**: by unit traces a factor of any Fisher changes nothing, and what
        is stored after t domains is Σ F_i / tr F_i, of trace 1 + t.
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
        """Subspace that is projected away: this one, or a control of equal rank."""
        if self.basis == "random":
            return random_subspace(key, stored)
        if self.basis == "shuffled":
            return shuffled_subspace(key, stored)
        return stored

    def coefficients(self, subspace: Subspace, trace: PyTree) -> PyTree:
        """α per layer from the newest trace; zeros (strict) without relaxation."""
        if not self.relax:
            return jax.tree.map(jnp.zeros_like, trace)
        newest = dataclasses.replace(subspace, trace=trace)
        return fisher_relaxation(newest, self.strictness, self.normalisation)


def check_sizes(problem: Problem, adapter: PyTree, max_rank: int) -> None:
    """Refuses a rank cap that a unit cannot hold, and a memory that cannot hold it.

    Raises:
      UserError: naming ``max_rank`` and the smallest unit, or the least budget.
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
    """Rescales eigenvalues so that the trace of each layer becomes ``trace``.

    A layer without a trace stays so.
    """

    def rescale(values, old, new):
        ratio = jnp.where(old > 0, new / jnp.where(old > 0, old, 1.0), 0.0)
        return values * ratio[..., None]

    old = subspace.trace
    eigenvalues = jax.tree.map(rescale, subspace.eigenvalues, old, trace)
    trace = jax.tree.map(lambda o, n: jnp.where(o > 0, n, 0.0), old, trace)
    return dataclasses.replace(subspace, eigenvalues=eigenvalues, trace=trace)


def _seen(problem: Problem, dataset: TokenDataset) -> int:
    """How many of a dataset's examples a Fisher is a mean over."""
    return min(len(dataset), problem.training.fisher_examples or len(dataset))


def _some(dataset: TokenDataset, most: int) -> TokenDataset:
    """At most so many examples, evenly spaced."""
    total = len(dataset)
    if most >= total:
        return dataset
    return take(dataset, np.linspace(0, total - 1, most).round().astype(int))


def _every_second(dataset: TokenDataset, first: int) -> TokenDataset:
    """Half of a dataset; sets are drawn in random order, so either half is like it."""
    return take(dataset, np.arange(first, len(dataset), 2))


def held_out(problem: Problem) -> TokenDataset:
    """The half of the calibration set that :meth:`Ssi.half` does not see."""
    return _every_second(problem.calibration, 1)


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Their quotient; 0 where nothing of the task lies in the subspace."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)


def _batches(problem: Problem, dataset: TokenDataset) -> Iterator[dict]:
    """The dataset by length, in batches of what is differentiated at once."""
    dataset = _some(dataset, _seen(problem, dataset))
    size = problem.hardware.fisher_microbatch
    yield from by_length(dataset, size, least=size)


# --- diagnostics --------------------------------------------------------------------


def describe(subspace: Subspace, alpha: PyTree, trace: PyTree) -> dict[str, PyTree]:
    """α, tr F and effective rank of every layer of every unit."""
    rank = effective_rank(subspace)
    return {"alpha": alpha, "trace": trace, "effective_rank": rank}


def describe_change(old: Subspace, fresh: Subspace, new: Subspace) -> dict[str, PyTree]:
    """Movement of a subspace over a domain, for each layer.

    Between ``old`` and ``fresh``, that of the model after the domain,
    ``principal_angles [*L, 8]`` at evenly spaced places of the ascending list; and
    ``discarded``, the share of the old basis that their merge ``new`` lost.
    """
    shared = jax.tree.map(jnp.minimum, effective_rank(old), effective_rank(fresh))
    angles = jax.tree.map(_spread, principal_angles(old, fresh), shared)
    return {"principal_angles": angles, "discarded": discarded_energy(old, new)}


def _spread(angles: jax.Array, count: jax.Array) -> jax.Array:
    """Eight of the first ``count`` angles, the first and the last among them."""
    share = jnp.linspace(0.0, 1.0, ANGLES, dtype=jnp.float32)
    last = jnp.maximum(count - 1, 0)[..., None].astype(jnp.float32)
    share = share.reshape((1,) * count.ndim + (ANGLES,))
    places = jnp.round(last * share).astype(jnp.int32)
    return jnp.take_along_axis(angles, places, axis=-1)
