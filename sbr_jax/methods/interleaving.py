"""Safety interleaving: replace a part of each domain's data by safety examples.

This is the simplest defence, a baseline of SafeAnchor (Guo, Wu, Yiu, arXiv:2604.17691).
Of a domain's N training examples, round(f N) come from the safety mix and the rest from
the domain, with f = 0.1. The loss and the optimizer are those of plain fine-tuning.

As in the paper, examples are *replaced*, so that every method trains on equally many.
Its code instead adds max(1, n f / (1 − f)) safe examples to a batch of n. That gives
the same share, but larger batches, and leaves out no domain example.

Symbols: f ``fraction``, N examples of a domain.
"""

from sbr_jax.checks import checked
from sbr_jax.data import TokenDataset, mixture
from sbr_jax.methods.base import Method, Problem
from sbr_jax.settings import Fraction
from sbr_jax.typing import UserError


@checked
def interleaving(*, fraction: Fraction = 0.1, monitored: bool = False) -> Method:
    """Plain fine-tuning with a share of each domain replaced by safety examples.

    Every domain and seed draws anew which examples are replaced, and by which. No
    safety example repeats before all were used.

    Args:
      fraction: f in [0, 1); 0 is plain fine-tuning in another order.
      monitored: run CSM.

    Returns:
      The method. Its ``mix`` raises a UserError without a safety mix, or if f is too
      small to replace a single example.

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
