"""Defences: ``METHODS`` maps names to makers, ``VARIANTS`` names changed options."""

from sbr_jax.methods.base import InertProjectionWarning, Method, Problem
from sbr_jax.methods.registry import METHODS, VARIANTS, Hyperparameters, build, resolve

__all__ = [
    "METHODS",
    "VARIANTS",
    "Hyperparameters",
    "InertProjectionWarning",
    "Method",
    "Problem",
    "build",
    "resolve",
]
