"""The small chat model that the preset `realtext` runs on, made from real text."""

from sbr_jax.studies.realtext.model import STEPS, build, write

__all__ = ["STEPS", "build", "write"]
