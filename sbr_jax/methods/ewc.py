"""EWC: hold each parameter near its old value, weighted by a diagonal Fisher.

Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on the adapter, like
the baseline of the SafeAnchor paper (arXiv:2604.17691):

    L(θ) + λ Σ_i F_i (θ_i − θ*_i)²          F_i = (1/N) Σ_n (∂ℓ_n/∂θ_i)²

Symbols: θ adapter, θ* its value when F was measured, i parameters, N examples, ℓ_n the
loss of a single example, λ = ``penalty``. There is no ½, so λ here is half of
Kirkpatrick's.

**λ has no portable scale.** F grows with the square of the loss's scale. Published
settings run from λ = 100 (SafeAnchor's code) to 1e9 (Vaccine's script). For each model
and each ``reduction``, tune λ by comparing the metrics ``penalty`` and ``loss``.

Where B = 0, the gradient of A vanishes and so does its F. A penalty measured on a fresh
adapter therefore holds B only.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax.checks import checked, one_of
from sbr_jax.data.batches import TokenDataset, take
from sbr_jax.data.by_length import by_length
from sbr_jax.fisher import per_example_gradients
from sbr_jax.methods._compose import with_gradients
from sbr_jax.methods.base import Cost, Method, Problem
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.settings import Count, NonNegative
from sbr_jax.typing import LossFn, PyTree, UserError


@checked
def ewc(
    *,
    penalty: NonNegative = 100.0,
    data: Literal["domain", "safety"] = "domain",
    keep: Literal["last", "all", "first"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    fisher_examples: Count | None = None,
    monitored: bool = False,
) -> Method:
    """EWC on one adapter that continues through all domains.

    Args:
      penalty: λ ≥ 0.
      data: F from the ``"domain"`` just learned (EWC proper, SafeAnchor's baseline;
        the first domain has no penalty) or from the ``"safety"`` calibration set
        (Vaccine's FITrainer; the penalty starts with the aligned model).
      keep: which quadratics count: the ``"last"`` one, the sum of ``"all"``, or only
        the ``"first"``, the aligned model's (published with ``"safety"``). None is
        ``"last"`` for ``"domain"`` (published) and ``"all"`` for ``"safety"``.
      reduction: ℓ as the ``"mean"`` over an example's answer tokens, as in training, or
        their ``"sum"``, −log p(y | x).
      fisher_examples: most examples N, evenly spaced (None: the study's number).
      monitored: run CSM.

    Returns:
      The method. It reports ``penalty``, the whole second term.
    """
    if keep is None:
        keep = "last" if data == "domain" else "all"
    # The first quadratic belongs to the aligned model, which has learned no domain.
    if data == "domain":
        one_of("ewc.keep", keep, ("last", "all"))

    def fisher(problem: Problem, base: PyTree, adapter: PyTree) -> PyTree:
        dataset = problem.calibration if data == "safety" else problem.domain
        if dataset is None:
            raise UserError(
                "ewc: data='domain': expected the domain just learned in "
                "problem.domain, got None; pass it to end_domain"
            )
        limit = fisher_examples
        if limit is None:
            limit = problem.training.fisher_examples
        loss_fn = answer_loss(problem.apply_fn, reduction)
        return diagonal_fisher(
            loss_fn,
            adapter,
            base,
            dataset,
            max_examples=limit,
            microbatch=problem.hardware.fisher_microbatch,
        )

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        if data == "safety":
            return _quadratic(fisher(problem, base, adapter), adapter)
        return _quadratic(jax.tree.map(_zeros, adapter), adapter)

    def end_domain(problem, base, adapter, state, key):
        if keep == "first":
            return adapter, state
        newest = _quadratic(fisher(problem, base, adapter), adapter)
        return adapter, newest if keep == "last" else add_quadratics(state, newest)

    def held(hook):
        """The hook with the penalty's value and gradient added."""

        def gradient(problem, base, adapter, state, *rest):
            grads, extra, metrics = hook(problem, base, adapter, state, *rest)
            value, pull = quadratic_penalty(adapter, state)

            def add(g, p):
                return g + (penalty * p).astype(g.dtype)

            grads = jax.tree.map(add, grads, pull)
            return grads, extra, {**metrics, "penalty": penalty * value}

        return gradient

    cost = Cost(own_fishers=1, fisher_examples=fisher_examples)
    if data == "safety":
        cost = Cost(
            fishers=1,
            domain_fishers=int(keep != "first"),
            fisher_examples=fisher_examples,
        )
    return with_gradients(
        Method("ewc", monitored, cost, init=init, end_domain=end_domain), held
    )


def diagonal_fisher(
    loss_fn: LossFn,
    adapter: PyTree,
    base: PyTree,
    dataset: TokenDataset,
    *,
    max_examples: int | None = None,
    microbatch: int = 32,
) -> PyTree:
    """The diagonal of the empirical Fisher: F_i = (1/N) Σ_n (∂ℓ_n/∂θ_i)², float32.

    Each example's own gradient is squared. The released baselines square batch
    gradients, which gives values smaller by about the batch size.

    **Guarantee**: ``microbatch`` changes the result by rounding only.

    Args:
      loss_fn: ``loss_fn(adapter, example, base) -> scalar``.
      adapter: θ.
      base: frozen weights.
      dataset: host-side examples.
      max_examples: cap on N; rows are evenly spaced. None for all.
      microbatch: how many per-example gradients are held at once.

    Raises:
      UserError: for an empty set, or gradients that are not finite.
    """
    total = len(dataset)
    if not total:
        raise UserError("ewc: expected at least one example for the Fisher, got none")
    count = min(total, max_examples or total)
    rows = np.linspace(0, total - 1, count).round().astype(int)
    found = jax.tree.map(_zeros, adapter)
    for part in by_length(take(dataset, rows), count, least=microbatch):
        held = len(part["tokens"])
        size = min(microbatch, held)
        # Repeat the last row to fill whole groups; a repeat has weight zero.
        order = np.pad(np.arange(held), (0, -held % size), mode="edge")
        groups = {k: x[order].reshape(-1, size, *x.shape[1:]) for k, x in part.items()}
        real = (np.arange(order.size) < held).reshape(-1, size)
        weights = real.astype(np.float32) / np.float32(count)
        found = _weighted_squares(
            adapter, base, groups, weights, found, loss_fn=loss_fn
        )
    if not np.isfinite(np.asarray(optax.tree.sum(found))):
        raise UserError(
            "ewc: expected finite gradients, got a Fisher that is not; the loss or "
            "the model diverged: lower the learning rate or the penalty"
        )
    return found


@functools.partial(jax.jit, static_argnames=("loss_fn",))
def _weighted_squares(
    adapter: PyTree,
    base: PyTree,
    examples: PyTree,
    weights: jax.Array,
    start: PyTree,
    *,
    loss_fn: LossFn,
) -> PyTree:
    """Add Σ w_n g_n² over groups of examples, with weights ``[groups, microbatch]``."""

    def body(total, item):
        group, weight = item
        grads = per_example_gradients(loss_fn, adapter, group, base)

        def add(t, g):
            squares = jnp.square(g.astype(jnp.float32))
            # At default precision, accelerators would round the squares to 10 bits.
            return t + jnp.tensordot(weight, squares, axes=1, precision="highest")

        return jax.tree.map(add, total, grads), None

    return jax.lax.scan(body, start, (examples, weights))[0]


# --- sums of quadratics --------------------------------------------------------------


def quadratic_penalty(adapter: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
    """Σ_i F_i (θ_i − c_i)² + ``offset``, and its gradient 2 F (θ − c), float32.

    The state holds ``fisher`` F, ``centre`` c and ``offset``.

    >>> import jax.numpy as jnp
    >>> state = {"fisher": jnp.full(2, 3.0), "centre": jnp.ones(2), "offset": 0.0}
    >>> value, gradient = quadratic_penalty(jnp.array([1.0, 3.0]), state)
    >>> float(value), gradient.tolist()
    (12.0, [0.0, 12.0])
    """
    gap = jax.tree.map(_difference, adapter, state["centre"])
    force = jax.tree.map(jnp.multiply, state["fisher"], gap)
    value = optax.tree.vdot(force, gap) + state["offset"]
    return value, jax.tree.map(lambda x: 2.0 * x, force)


def add_quadratics(first: PyTree, second: PyTree) -> dict[str, Any]:
    """The sum of two quadratics: F₁(θ−c₁)² + F₂(θ−c₂)² = F(θ−c)² + const.

    With F = F₁ + F₂: c = c₁ + (F₂/F)(c₂ − c₁) and const = Σ_i (F₁F₂/F)(c₂ − c₁)². So
    any number of domains takes two trees, and the state keeps its shape. Where F = 0,
    the centre is c₁.
    """

    def share(f, g):
        total = f + g
        return jnp.where(total > 0, g / jnp.where(total > 0, total, 1.0), 0.0)

    shares = jax.tree.map(share, first["fisher"], second["fisher"])
    gap = jax.tree.map(_difference, second["centre"], first["centre"])
    step = jax.tree.map(jnp.multiply, shares, gap)
    apart = optax.tree.vdot(jax.tree.map(jnp.multiply, first["fisher"], step), gap)
    return {
        "fisher": jax.tree.map(jnp.add, first["fisher"], second["fisher"]),
        "centre": jax.tree.map(jnp.add, first["centre"], step),
        "offset": first["offset"] + second["offset"] + apart,
    }


def _quadratic(fisher: PyTree, centre: PyTree) -> dict[str, Any]:
    centre = jax.tree.map(lambda x: jnp.array(x, jnp.float32), centre)
    return {"fisher": fisher, "centre": centre, "offset": jnp.float32(0)}


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) - y.astype(jnp.float32)


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.float32)
