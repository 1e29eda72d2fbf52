r"""Coupling of the safety subspace and the refusal direction, tested by steps.

The subspace U of the parameters and the direction r in the activations are found
independently. The causal test moves the adapter by steps of equal length,

    leading    ± v_1 of every layer
    inside     Π z,              z random: a random combination of U's eigenvectors
    benign     (I − Π) Π' z,     Π' of equally many benign examples: not about safety
    outside    (I − Π) z,        z random

and measures how the direction and the log-odds of refusals change:

    cosine(δ)   = mean over layers of cos(r(θ), r(θ + δ))
    log_odds    = mean over requests of log p(refusal | x) − log p(compliance | x)

All steps move only parameters that U reaches. In a fresh adapter B = 0, so a step in A
changes nothing at all. Steps outside U that moved A would look harmless for a reason
that has nothing to do with U.

Symbols: θ adapter, Π projection onto U, V basis [P, K], L layers, D width, δ a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from sbr_jax.analysis.directions import drift
from sbr_jax.analysis.harm_types import REACHED
from sbr_jax.models import Model, token_log_probs
from sbr_jax.subspace import Subspace, project_onto, project_out, units
from sbr_jax.typing import PyTree, UserError

LOST = 1e-3
"""Share below which the remainder of a projection is rounding."""


def steps(
    key: jax.Array,
    adapter: PyTree,
    subspace: Subspace,
    control: Subspace | None = None,
    *,
    draws: int = 4,
) -> dict[str, list[PyTree]]:
    """Directions to step in, inside and outside the subspace.

    **Guarantee**: each has the global norm 1, spread evenly over the layers where the
    subspace has a rank above 0. ``leading`` and ``inside`` lie in the subspace; the
    others are orthogonal to it. None moves a parameter that the subspace does not
    reach.

    Args:
      key: key of the random steps; all kinds share the same draws.
      adapter: the tree to step in.
      subspace: U.
      control: another subspace of the same parameters, for ``benign``.
      draws: random steps of each kind.

    Returns:
      A list of trees like the adapter for each kind; ``leading`` has two, one of each
      sign.

    Raises:
      UserError: if a kind has no direction to step in, because the subspace has rank 0,
        fills everything it reaches, or contains the control.
    """
    mark = subspace.fingerprint
    vectors = mark.entries(jax.tree.map(lambda v: v[..., 0], subspace.basis))
    reached = mark.entries(
        jax.tree.map(
            lambda v: (jnp.linalg.norm(v, axis=-1) > REACHED).astype(v.dtype),
            subspace.basis,
        )
    )
    leading = _tree(vectors, adapter, subspace)
    mask = _tree(reached, adapter, subspace)
    found: dict[str, list[PyTree]] = {
        "leading": [leading, optax.tree.scale(-1.0, leading)],
        "inside": [],
        **({} if control is None else {"benign": []}),
        "outside": [],
    }
    for draw in jax.random.split(key, draws):
        noise = optax.tree.random_like(draw, adapter, jax.random.normal)
        noise = jax.tree.map(jnp.multiply, noise, mask)
        found["inside"].append(project_onto(noise, subspace))
        found["outside"].append(_rest(noise, subspace))
        if control is not None:
            other = jax.tree.map(jnp.multiply, project_onto(noise, control), mask)
            found["benign"].append(_rest(other, subspace))
    return {
        kind: [_even(kind, tree, subspace, vectors) for tree in trees]
        for kind, trees in found.items()
    }


def _tree(vectors: Sequence[Any], adapter: PyTree, subspace: Subspace) -> PyTree:
    """A tree like the adapter from one vector per unit."""
    mark = subspace.fingerprint
    parts = zip(vectors, mark.split(adapter), strict=True)
    return mark.join([units.from_vector(v, part, mark.layer_axes) for v, part in parts])


def _vectors(tree: PyTree, subspace: Subspace) -> list[jax.Array]:
    mark = subspace.fingerprint
    return [units.to_vector(part, mark.layer_axes) for part in mark.split(tree)]


def _rest(tree: PyTree, subspace: Subspace) -> PyTree:
    """The part outside the subspace; zero in layers where only rounding is left."""
    rest = project_out(tree, subspace)
    kept = [
        jnp.where(_norm(after) > LOST * _norm(before), after, 0.0)
        for after, before in zip(
            _vectors(rest, subspace), _vectors(tree, subspace), strict=True
        )
    ]
    return _tree(kept, tree, subspace)


def _norm(vector: jax.Array) -> jax.Array:
    return jnp.linalg.norm(vector, axis=-1, keepdims=True)


def _even(kind: str, tree: PyTree, subspace: Subspace, leading: list) -> PyTree:
    """Scale every layer to the same length, and the whole to length 1."""
    scaled = []
    for vector, first in zip(_vectors(tree, subspace), leading, strict=True):
        size = _norm(vector)
        moves = (size > 0) & (_norm(first) > 0)
        scaled.append(jnp.where(moves, vector / jnp.where(moves, size, 1.0), 0.0))
    total = float(optax.tree.norm(scaled))
    if total == 0:
        raise UserError(
            f"coupling: expected a direction for steps of kind '{kind}', got none: the "
            "subspace has rank 0, fills all that it reaches, or holds the control"
        )
    return _tree([vector / total for vector in scaled], tree, subspace)


def mean_cosine(before: NDArray, after: NDArray) -> float:
    """Mean over layers of the cosine between two directions ``[L + 1, D]``.

    The stream before the first layer is left out, because no adapter changes it.

    Raises:
      UserError: if no layer has a direction.

    >>> mean_cosine(np.eye(3), np.eye(3))
    1.0
    """
    cosines = drift(before, after)[1:]
    known = cosines[np.isfinite(cosines)]
    if not known.size:
        raise UserError(
            "coupling: expected a layer that tells harmful from harmless requests, got "
            "none; do the two sets of prompts differ?"
        )
    return float(known.mean())


def refusal_log_odds(
    model: Model, base: PyTree, adapter: PyTree, refusing: Any, complying: Any
) -> float:
    """Mean of log p(refusal | x) − log p(compliance | x), in nats.

    Args:
      model: the model's record.
      base: its weights.
      adapter: ``{name: LoraPair}`` or None.
      refusing: a token dataset of requests with refusals.
      complying: the same requests in the same order, with compliant answers.
    """
    scores = [
        token_log_probs(model, base, adapter, data.tokens, data.mask)
        for data in (refusing, complying)
    ]
    return float(np.mean(scores[0].astype(np.float64) - scores[1]))


Measure = Callable[[PyTree], tuple[NDArray, float]]
"""Maps an adapter to its direction ``[L + 1, D]`` and the log-odds of refusals."""


def causal(
    measure: Measure,
    adapter: PyTree,
    directions: Mapping[str, Sequence[PyTree]],
    sizes: Sequence[float],
) -> dict[str, Any]:
    """Take each step, and measure the refusal direction and the refusals after it.

    Args:
      measure: measures an adapter.
      adapter: the adapter to start from.
      directions: the result of :func:`steps`.
      sizes: lengths of the steps.

    Returns:
      ``sizes``, ``start`` (the log-odds before) and, by kind, ``cosine`` and
      ``log_odds``: ``{"mean", "low", "high"}`` over the steps of a kind, each a list
      over sizes; ``log_odds`` is the change.
    """
    before, start = measure(adapter)
    found: dict[str, Any] = {"sizes": list(sizes), "start": start}
    found |= {"cosine": {}, "log_odds": {}}
    for kind, trees in directions.items():
        values = np.zeros((2, len(sizes), len(trees)))
        for i, size in enumerate(sizes):
            for j, tree in enumerate(trees):
                moved = jax.tree.map(lambda a, s, c=size: a + c * s, adapter, tree)
                direction, log_odds = measure(moved)
                values[:, i, j] = mean_cosine(before, direction), log_odds - start
        for name, part in zip(("cosine", "log_odds"), values, strict=True):
            found[name][kind] = {
                "mean": part.mean(1).tolist(),
                "low": part.min(1).tolist(),
                "high": part.max(1).tolist(),
            }
    return found
