"""Study of a user's own chat model and files: only what a defence needs."""

from sbr_jax.studies.own.given import Given, read_given
from sbr_jax.studies.own.parts import Parts, make_parts
from sbr_jax.studies.own.refusals import write_refusals
from sbr_jax.studies.own.study import build_study, read_model

__all__ = [
    "Given",
    "Parts",
    "build_study",
    "make_parts",
    "read_given",
    "read_model",
    "write_refusals",
]
