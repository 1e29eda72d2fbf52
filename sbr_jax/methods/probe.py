"""A linear probe of the aligned model: is a prompt harmful, before any answer?

The activation critic of Goel, Maji, Mazumder, arXiv:2602.17546: logistic regression on
the reference model's state at the last prompt token. With standardised features x,
labels y in {0, 1} and p = σ(w·x + b), it minimises

    −(1/N) Σ [y log p + (1 − y) log(1 − p)] + (μ/2) ‖w‖²

by Newton's method. The solution lies in the span of the N examples. So if F > N, the
features are first rotated onto that span, and a Newton step costs N³ and not F³. This
is exact, because a rotation keeps ‖w‖.

The released code differs: it averages over all tokens (answers too) and all layers,
trains a two-layer network, keeps the epoch that is best on its test set and returns the
hard label. Here layers are concatenated, the probability is the risk, and the quality
is measured on held-out examples.

Symbols: N examples, F features, L layers, B batch, T tokens, D width, μ the penalty.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, checks
from sbr_jax.data import TokenDataset, take
from sbr_jax.distributed import arrays
from sbr_jax.models import answers
from sbr_jax.typing import ApplyFn, PyTree, UserError

NEWTON_STEPS = 30
"""About ten are needed; a further step at the optimum changes nothing."""

HELD_OUT = 0.25
"""Share of each class's examples that the quality is measured on."""

BINS = 10
"""Number of equally wide bins of probability in which calibration is measured."""

VARIES = 1e-5
"""Relative spread up to which a feature counts as constant, because scaling it would
blow up rounding noise. The embedding is constant if a chat template ends every prompt
with the same token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe; it holds only arrays, so it can live in a method's state.

    Attributes:
      weights: ``[F]``, for the standardised features; 0 for constant features.
      bias: scalar.
      mean: ``[F]``, mean of the fitted examples.
      scale: ``[F]``, their standard deviation; 1 for constant features.
      auroc: AUROC on the held-out examples; 0.5 is chance.
      calibration_error: expected calibration error on the held-out examples.
    """

    weights: jax.Array
    bias: jax.Array
    mean: jax.Array
    scale: jax.Array
    auroc: jax.Array
    calibration_error: jax.Array


# --- features -----------------------------------------------------------------------


def stream_at(
    residual: jax.Array, last: jax.Array, layers: Sequence[int] | None = None
) -> jax.Array:
    """The residual stream at one place for each example, layers side by side.

    Args:
      residual: ``[L + 1, R, T, D]``, before each layer and after the last.
      last: int32 ``[B]``, flat index over rows and tokens.
      layers: which of the L + 1 states to use; negative numbers count from the end,
        None means all.

    Returns:
      float32 ``[B, len(layers) · D]``.

    Raises:
      UserError: for a layer that the model does not have.
    """
    count = residual.shape[0]
    layers = tuple(range(count)) if layers is None else tuple(layers)
    if not layers or not all(-count <= layer < count for layer in layers):
        raise UserError(
            f"layers: expected some of 0 to {count - 1} (the embedding, then the state "
            f"after each layer), got {layers}"
        )
    # Flat indices need one gather; single examples would need one each.
    states = residual.reshape(count, -1, residual.shape[-1])[np.asarray(layers)]
    states = jnp.moveaxis(jnp.take(states, last, axis=1, mode="clip"), 0, 1)
    return states.reshape(len(last), -1).astype(jnp.float32)


@functools.lru_cache(maxsize=16)
def _extractor(apply_fn: ApplyFn, layers: tuple[int, ...] | None):
    @jax.jit
    def extract(base, adapter, tokens, mask):
        _, seen = apply_fn(base, adapter, tokens, capture=True)
        last = answers.last_prompt({"mask": mask})
        return _mesh.constrain(stream_at(seen["residual"], last, layers))

    return extract


def activations(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree | None,
    dataset: TokenDataset,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """:func:`stream_at` the last prompt token of every example, float32 ``[N, F]``.

    The result is on the host. ``adapter`` is None for the reference, and each forward
    pass takes ``batch_size`` examples.

    **Guarantee**: with a causal model, the answer has no influence.

    Raises:
      UserError: for an empty set, or an example without a prompt or an answer.
    """
    tokens, mask = dataset.tokens, dataset.mask
    answered = (mask > 0).any(axis=1) & (mask[:, 0] == 0)
    if not len(dataset) or not answered.all():
        raise UserError(
            "activations: expected examples with a prompt and an answer, got "
            f"{len(dataset) - answered.sum()} without one among {len(dataset)}"
        )
    extract = _extractor(apply_fn, None if layers is None else tuple(layers))
    size = min(batch_size, len(dataset))
    parts = []
    for start in range(0, len(dataset), size):
        # Rows repeat at the end, so that every batch has one compiled shape.
        rows = np.arange(start, start + size) % len(dataset)
        with _mesh.using(_mesh.holding(base)):
            found = extract(base, adapter, tokens[rows], mask[rows])
        parts.append(arrays.fetch(found))
    return np.concatenate(parts)[: len(dataset)]


def distinct_prompts(dataset: TokenDataset) -> TokenDataset:
    """The first example of every prompt; repeats across a split would inflate scores.

    >>> tokens = np.array([[1, 2, 3], [1, 2, 4], [5, 2, 3]])
    >>> data = TokenDataset(tokens, np.array([[0, 0, 1]] * 3))
    >>> distinct_prompts(data).tokens.tolist()
    [[1, 2, 3], [5, 2, 3]]
    """
    seen: dict[bytes, int] = {}
    for row, first in enumerate(np.argmax(dataset.mask > 0, axis=1)):
        seen.setdefault(dataset.tokens[row, :first].tobytes(), row)
    return take(dataset, list(seen.values()))


def probe_shapes(
    apply_fn: ApplyFn, base: PyTree, layers: Sequence[int] | None = None
) -> Probe:
    """Shapes of the probe that :func:`fit_probe` returns for these activations."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    extract = _extractor(apply_fn, None if layers is None else tuple(layers))
    size = jax.eval_shape(extract, base, None, tokens, mask).shape[-1]
    each: Any = jax.ShapeDtypeStruct((size,), jnp.float32)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return Probe(each, number, each, each, number, number)


# --- fitting ------------------------------------------------------------------------


def fit_probe(
    features: np.ndarray, labels: np.ndarray, *, l2: float = 1e-2, key: jax.Array
) -> Probe:
    """Fit the probe on one part of the examples and measure it on the other.

    A quarter of each class is held out. The probe is not refitted on all examples, so
    the reported quality is that of the probe in use. Classes are not balanced: the
    prior of the probability is the share of harmful examples.

    Args:
      features: ``[N, F]``.
      labels: ``[N]``, 1 for harmful and 0 for benign.
      l2: μ > 0, penalty on the weights of standardised features, not on the bias.
      key: random key of the split.

    Raises:
      UserError: for arguments of another kind, or fewer than two examples of a class.

    >>> x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    >>> probe = fit_probe(x, np.array([0, 0, 1, 1]), key=jax.random.key(0))
    >>> float(probe.auroc), bool(probe_risk(probe, jnp.array([[3.0]]))[0] > 0.5)
    (1.0, True)
    """
    checks.number("l2", l2, above=0)
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UserError(
            "fit_probe: expected features [N, F] and labels [N], got "
            f"{features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all() or not np.isin(labels, (0, 1)).all():
        raise UserError("fit_probe: expected finite features and labels 0 and 1 only")
    held_out = _validation_rows(labels, key)
    fitted = features[~held_out]
    mean, spread = fitted.mean(axis=0), fitted.std(axis=0)
    varies = spread > VARIES * np.hypot(mean, spread)
    scale = np.where(varies, spread, 1.0)
    x = np.where(varies, (fitted - mean) / scale, 0.0)
    y = labels[~held_out]
    # Accelerators round the factors of a float32 product unless told otherwise.
    with jax.default_matmul_precision("float32"):
        weights, bias = _fit(*(jnp.asarray(v, jnp.float32) for v in (x, y, l2)))
    centre, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32)
    unmeasured = jnp.float32(jnp.nan)
    probe = Probe(weights, bias, centre, scale, unmeasured, unmeasured)
    unseen = jnp.asarray(features[held_out], jnp.float32)
    risk, truth = np.asarray(probe_risk(probe, unseen)), labels[held_out]
    return dataclasses.replace(
        probe,
        auroc=jnp.float32(auroc(risk, truth)),
        calibration_error=jnp.float32(expected_calibration_error(risk, truth)),
    )


def _validation_rows(labels: np.ndarray, key: jax.Array) -> np.ndarray:
    """Mark held-out rows ``[N]``: the same share of each class, at least one row."""
    order = np.asarray(jax.random.permutation(key, len(labels)))
    held_out = np.zeros(len(labels), bool)
    for value in (0, 1):
        rows = order[labels[order] == value]
        if len(rows) < 2:
            raise UserError(
                "fit_probe: expected two examples of each label (one to fit, one to "
                f"validate), got {len(rows)} of label {value}"
            )
        count = min(max(round(HELD_OUT * len(rows)), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    return held_out


@jax.jit
def _fit(x: jax.Array, y: jax.Array, l2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights ``[F]`` and bias from standardised features x ``[N, F]`` and y ``[N]``.

    Full Newton steps can overshoot. So every step is the best of several shortened
    steps and no step, and the objective never rises. Near its minimum the objective is
    flat in float32, so there only the slope tells whether a last full step helps.
    """
    count, size = x.shape
    wide = size > count
    basis, coordinates = jnp.linalg.qr(x.T) if wide else (None, x.T)
    z = jnp.concatenate([coordinates.T, jnp.ones((count, 1))], axis=1)
    penalty = l2 * jnp.ones(z.shape[1]).at[-1].set(0.0)
    sign = 2.0 * y - 1.0
    lengths = jnp.concatenate([jnp.zeros(1), 0.5 ** jnp.arange(10.0)])

    def objective(u):
        fit = jnp.mean(jax.nn.softplus(-sign * (z @ u)))
        return fit + 0.5 * jnp.sum(penalty * u**2)

    def slope_at(u):
        return z.T @ (jax.nn.sigmoid(z @ u) - y) / count + penalty * u

    def newton_step(u):
        p = jax.nn.sigmoid(z @ u)
        curvature = z.T @ (z * (p * (1.0 - p) / count)[:, None]) + jnp.diag(penalty)
        # The jitter only shortens steps: if the slope is 0, so is the step.
        return jnp.linalg.solve(curvature + 1e-7 * jnp.eye(len(u)), slope_at(u))

    def newton(_, u):
        tried = u[None] - lengths[:, None] * newton_step(u)[None]
        return tried[jnp.argmin(jax.vmap(objective)(tried))]

    def polish(_, u):
        there = u - newton_step(u)
        flatter = jnp.linalg.norm(slope_at(there)) < jnp.linalg.norm(slope_at(u))
        return jnp.where(flatter, there, u)

    u = jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros(z.shape[1]))
    u = jax.lax.fori_loop(0, 4, polish, u)
    return basis @ u[:-1] if wide else u[:-1], u[-1]


def probe_risk(probe: Probe, features: jax.Array) -> jax.Array:
    """The probability σ(w·x + b) that each prompt is harmful.

    ``features`` are ``[N, F]``, not standardised; the result is ``[N]``.
    """
    x = jnp.asarray(features, jnp.float32)
    x = (x - probe.mean[None]) / probe.scale[None]
    score = jnp.dot(x, probe.weights, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.sigmoid(score + probe.bias)


# --- quality ------------------------------------------------------------------------


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative; a tie counts half.

    With mid-ranks R: (Σ_{y=1} R − N₁(N₁ + 1)/2) / (N₁ N₀).

    ``scores`` are ``[N]`` and finite. ``labels`` are 0 and 1, and both must occur. A
    value of 0.5 is chance.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    0.875
    """
    scores, harmful = np.asarray(scores), np.asarray(labels) == 1
    ones, zeros = int(harmful.sum()), int((~harmful).sum())
    if not ones or not zeros or not np.isfinite(scores).all():
        raise UserError(
            f"auroc: expected finite scores of both classes, got {ones} of label 1 in "
            f"{len(scores)}, {np.isfinite(scores).sum()} finite"
        )
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    return float((ranks[harmful].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean gap between probability and frequency: Σ_b (N_b/N) |ȳ_b − p̄_b|.

    ``probs`` are ``[N]`` in [0, 1], ``labels`` are 0 and 1; 0 is perfectly calibrated.

    >>> round(expected_calibration_error(np.array([0.8, 0.8]), np.array([1, 1])), 3)
    0.2
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels, np.float64)
    if not len(probs) or not ((probs >= 0) & (probs <= 1)).all():
        raise UserError("probs: expected some probabilities in [0, 1], got others")
    index = np.minimum((probs * BINS).astype(int), BINS - 1)
    gaps = np.bincount(index, weights=labels - probs, minlength=BINS)
    return float(np.abs(gaps).sum() / len(probs))
