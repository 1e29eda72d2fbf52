"""Risk of learning an example, and the two loss weights computed from it.

Goel, Maji, Mazumder, arXiv:2602.17546, with a risk s in [0, 1]:

    β = β_min + (β_max − β_min) s          weight of the pull to the reference
    α = 1 − β                              weight of the task

The paper can also smooth s over batches. Here batches come in random order, so one says
nothing about the next. The released code rates from r = 1 to 5 and takes
β = clip((r − 2)/3, 0.1, 0.9), so that every rating up to r = 2.3 gets the floor. It
also turns a failing judge into a number (4 on an exception, 0 on an answer that it
cannot parse). Here a failing judge is an error, because a made-up risk silently
switches the defence off.

Symbols: N examples of a data set, B of a batch.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import checks
from sbr_jax.data import TokenDataset
from sbr_jax.typing import UserError

BETA_MIN, BETA_MAX = 0.1, 0.9
"""The released code's bounds; the paper does not print any."""


class JudgeError(UserError):
    """Raised by a judge that does not have a risk in [0, 1] for every example."""


class Judge(Protocol):
    """Interface of a judge, which rates how harmful learning each example would be.

    A judge that cannot rate raises :class:`JudgeError`; it never makes up a number.
    """

    def __call__(self, dataset: TokenDataset, /) -> np.ndarray:
        """The risk ``[N]`` in [0, 1] of each pair of a prompt and its answer."""
        ...


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Maps risks to the weights (α, β) of task and reference.

    **Guarantee**: no gradient flows through the weights, and α + β = 1.

    Attributes:
      beta_min: smallest β.
      beta_max: largest β.
      granularity: ``"example"``, or ``"batch"`` for the mean risk (published).
      mapping: ``"linear"`` in the risk, or ``"legacy"``, the released code's map of
        the rating r = 1 + 4 s. (That code clips α to [0.1, 0.9] as well, which changes
        nothing within its own bounds.)

    Raises:
      UserError: for an unknown option, or bounds that are not 0 ≤ β_min ≤ β_max ≤ 1.

    >>> alpha, beta = Weighting(beta_max=0.5)(jnp.array([0.0, 0.5]))
    >>> [round(float(x), 3) for x in (*alpha, *beta)]
    [0.9, 0.7, 0.1, 0.3]
    """

    beta_min: float = BETA_MIN
    beta_max: float = BETA_MAX
    granularity: str = "example"
    mapping: str = "linear"

    def __post_init__(self):
        """Refuse unknown options and bounds out of order."""
        checks.one_of("granularity", self.granularity, ("example", "batch"))
        checks.one_of("mapping", self.mapping, ("linear", "legacy"))
        if not 0 <= self.beta_min <= self.beta_max <= 1:
            raise UserError(
                "beta_min, beta_max: expected 0 ≤ β_min ≤ β_max ≤ 1, got "
                f"{self.beta_min!r} and {self.beta_max!r}"
            )

    def __call__(self, risk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(α, β)``, float32 ``[B]`` each, of the risks ``[B]`` in [0, 1]."""
        risk = jnp.asarray(risk, jnp.float32)
        if self.granularity == "batch":
            risk = jnp.full_like(risk, jnp.mean(risk))
        if self.mapping == "legacy":
            rating = 1.0 + 4.0 * risk
            beta = jnp.clip((rating - 2.0) / 3.0, self.beta_min, self.beta_max)
        else:
            beta = self.beta_min + (self.beta_max - self.beta_min) * risk
        beta = jax.lax.stop_gradient(beta)
        return 1.0 - beta, beta


def judged(judge: Judge, dataset: TokenDataset) -> TokenDataset:
    """A data set with a judge's risks ``[N]``; its batches then hold ``"risk"``.

    Raises:
      JudgeError: for anything but N finite numbers in [0, 1], naming the first fault.
        Errors of the judge itself pass through.

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
