"""The small chat model of the preset `realtext`, made from real text."""

from sbr_jax.studies.realtext.model import STEPS, build, write

__all__ = ["STEPS", "build", "write"]
