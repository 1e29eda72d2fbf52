"""Runs the tiny study in its own process, to be killed: ``python ... FOLDER``."""

import sys
import warnings

import conftest  # noqa: F401
import tiny

from sbr_jax.methods import InertProjectionWarning
from sbr_jax.training.pipeline import run

VARIANTS = ["plain", "safeanchor-exact:projection-only"]
OVERRIDES = {"safeanchor-exact": {"max_rank": 6, "refresh_every": 2}}
CONFIG = tiny.with_options(
    tiny.config(steps_per_domain=5, checkpoint_every=2), OVERRIDES
)


def main(folder, seeds=(0, 1)):
    warnings.simplefilter("ignore", InertProjectionWarning)
    run(tiny.study(), VARIANTS, seeds, folder, CONFIG, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1])
