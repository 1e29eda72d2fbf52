"""Plain sequential fine-tuning, the reference for every defence."""

from sbr_jax.checks import checked
from sbr_jax.methods.base import Method


@checked
def plain(*, monitored: bool = False) -> Method:
    """Cross-entropy on the domain, AdamW, nothing else.

    Args:
      monitored: run cumulative safety monitoring (CSM) after each domain, and repair
        the model if the monitor asks for it.

    Returns:
      A method that has only neutral hooks.
    """
    return Method("plain", monitored)
