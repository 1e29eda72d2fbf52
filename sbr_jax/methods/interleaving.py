"""Safety interleaving: replace a part of every domain's data by safety examples.

The simplest defence, a baseline of SafeAnchor (Guo, Wu, Yiu, arXiv:2604.17691): of the
N training examples of a domain, round(f N) come from the safety mix and the rest from
the domain, f = 0.1. The loss and the optimizer are those of plain fine-tuning.

As the paper writes, examples are *replaced*, so that every method trains on as many.
Its code instead adds max(1, n f / (1 − f)) safe examples to a batch of n: the same
share, but longer batches and no domain example left out.

Symbols: f ``fraction``, N examples of a domain.
"""

from sbr_jax.checks import checked
from sbr_jax.data import TokenDataset, mixture
from sbr_jax.methods.base import Method, Problem
from sbr_jax.settings import Fraction
from sbr_jax.typing import UserError


@checked
def interleaving(*, fraction: Fraction = 0.1, monitored: bool = False) -> Method:
    """Plain fine-tuning on domains that are in part safety examples.

    Which examples are replaced, and by which, is drawn anew for every domain and seed.
    No safety example repeats before all were used.

    Args:
      fraction: f in [0, 1); 0 is plain fine-tuning in another order.
      monitored: run CSM.

    Returns:
      The method. Its ``mix`` raises a UserError without a safety mix, or where f is so
      small that it would replace nothing.

    References:
      arXiv:2604.17691
    """

    def mix(problem: Problem, domain: TokenDataset, seed: int) -> TokenDataset:
        safe = problem.safety_mix
        if safe is None or not len(safe):
            raise UserError(
                "interleaving: expected safety examples to mix in, got "
                f"{'None' if safe is None else 'an empty set'}: give the study some in "
                "`safety_mix`"
            )
        if fraction and not round(fraction * len(domain)):
            raise UserError(
                "interleaving: expected a fraction that replaces at least one of the "
                f"domain's {len(domain)} examples, got {fraction!r}: raise it"
            )
        return mixture(domain, safe, fraction, seed)

    return Method("interleaving", monitored, mix=mix)
