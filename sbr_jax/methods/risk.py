"""Risk of learning an example, and the two loss weights that follow from it.

Goel, Maji, Mazumder, arXiv:2602.17546, with a risk s in [0, 1]:

    β = β_min + (β_max − β_min) s          weight of the pull to the reference
    α = 1 − β                              weight of the task

The paper may also smooth s over batches; here batches are drawn in random order, so
that one says nothing of the next. The released code rates from r = 1 to 5 and takes
β = clip((r − 2)/3, 0.1, 0.9), so that everything up to r = 2.3 sits on the floor. It
also turns a judge that fails into a number (4 on an exception, 0 on an answer it cannot
parse); here a judge that fails is an error, because a made-up risk is a defence that is
silently off.

Symbols: N examples of a data set, B of a batch.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.typing import UserError

BETA_MIN, BETA_MAX = 0.1, 0.9
"""What the released code acts on; the paper does not print its bounds."""


class JudgeError(UserError):
    """Error of a judge without one risk in [0, 1] for every example."""


class Judge(Protocol):
    """Interface of a rater of how harmful it would be to learn each example.

    A judge that cannot rate raises :class:`JudgeError`; it never makes up a number.
    """

    def __call__(self, dataset: TokenDataset, /) -> np.ndarray:
        """The risk ``[N]`` in [0, 1] of each pair of a prompt and its answer."""
        ...


def risk_to_weights(
    s: jax.Array, *, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX
) -> tuple[jax.Array, jax.Array]:
    """Weights (α, β) of the task and of the reference: β = β_min + (β_max − β_min) s.

    **Guarantee**: no gradient flows through the weights, and α + β = 1.

    Args:
      s: risks in [0, 1], any shape.
      beta_min: β at s = 0.
      beta_max: β at s = 1.

    Raises:
      UserError: unless 0 ≤ β_min ≤ β_max ≤ 1.

    >>> alpha, beta = risk_to_weights(jnp.array([0.0, 0.5]), beta_max=0.5)
    >>> [round(float(x), 3) for x in (*alpha, *beta)]
    [0.9, 0.7, 0.1, 0.3]
    """
    check_bounds(beta_min, beta_max)
    s = jnp.asarray(s, jnp.float32)
    beta = jax.lax.stop_gradient(beta_min + (beta_max - beta_min) * s)
    return 1.0 - beta, beta


def legacy_risk_to_weights(
    r: jax.Array, *, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX
) -> tuple[jax.Array, jax.Array]:
    """The released code's map of a rating r in [1, 5] to weights (α, β).

    β = clip((r − 2)/3, β_min, β_max) and α = 1 − β.

    The released code clips α = 1 − β to [0.1, 0.9] as well, which changes nothing
    within its own bounds. Guarantee and errors are those of :func:`risk_to_weights`.

    >>> [round(float(legacy_risk_to_weights(r)[1]), 3) for r in (1.0, 3.5, 5.0)]
    [0.1, 0.5, 0.9]
    """
    check_bounds(beta_min, beta_max)
    r = jnp.asarray(r, jnp.float32)
    beta = jax.lax.stop_gradient(jnp.clip((r - 2.0) / 3.0, beta_min, beta_max))
    return 1.0 - beta, beta


def check_bounds(beta_min: float, beta_max: float) -> None:
    """Refuses bounds of β that are no convex weights.

    Raises:
      UserError: unless 0 ≤ β_min ≤ β_max ≤ 1.
    """
    if not 0 <= beta_min <= beta_max <= 1:
        raise UserError(
            "beta_min, beta_max: expected 0 ≤ β_min ≤ β_max ≤ 1, got "
            f"{beta_min!r} and {beta_max!r}"
        )


def judged(judge: Judge, dataset: TokenDataset) -> TokenDataset:
    """A data set with a judge's risks ``[N]``; its batches then hold ``"risk"``.

    Raises:
      JudgeError: for anything but N finite numbers in [0, 1], naming the first fault;
        what the judge raises is passed on.

    >>> data = TokenDataset(np.zeros((2, 3)), np.ones((2, 3)))
    >>> judged(lambda data: np.array([0.0, 0.25]), data).risk.tolist()
    [0.0, 0.25]
    """
    risk = np.asarray(judge(dataset))
    hint = "a judge that cannot rate must raise JudgeError, not answer"
    if risk.dtype.kind not in "biuf":
        raise JudgeError(f"judge: expected numbers, got dtype {risk.dtype}: {hint}")
    if risk.shape != (len(dataset),):
        raise JudgeError(
            f"judge: expected one risk for each of the {len(dataset)} examples, got "
            f"shape {risk.shape}"
        )
    # Negated, so that NaN counts as outside.
    outside = np.flatnonzero(~((risk >= 0) & (risk <= 1)))
    if outside.size:
        raise JudgeError(
            f"judge: expected risks in [0, 1], got {risk[outside[0]]} for example "
            f"{outside[0]} ({outside.size} of {len(risk)} are outside): {hint}"
        )
    return dataclasses.replace(dataset, risk=risk.astype(np.float32))


__all__ = [
    "BETA_MAX",
    "BETA_MIN",
    "Judge",
    "JudgeError",
    "check_bounds",
    "judged",
    "legacy_risk_to_weights",
    "risk_to_weights",
]
