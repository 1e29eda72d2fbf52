"""A program's real command with the preset `tiny`, in a process of its own.

    python distributed_child.py run tiny --workdir FOLDER ...

`SBR_JAX_PAUSE` is the seconds that a step takes longer, to have it stopped in between,
and `SBR_JAX_STEPS` a file that grows with every step.
"""

import dataclasses
import os
import sys
import time

import conftest  # noqa: F401
import tiny

from sbr_jax import recipes
from sbr_jax.methods import Hyperparameters
from sbr_jax.programs import main
from sbr_jax.recipes.preset import Preset

METHODS = ("plain", "safeanchor-exact:projection-only")
STEPS = os.environ.get("SBR_JAX_STEPS")
PAUSE = float(os.environ.get("SBR_JAX_PAUSE", "0"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the made-up study, which is made once there are devices."""

    def known_domains(self):
        return ("medical", "legal")

    def check(self, variants, methods, sources):
        pass

    def build(self, domains, sources, hardware, *, weights=True):
        from sbr_jax.training import sharding

        place = sharding.place_batch

        def late(*args):
            if STEPS:
                with open(STEPS, "a") as file:
                    file.write(".")
            time.sleep(PAUSE)
            return place(*args)

        sharding.place_batch = late
        return tiny.study()


CONFIG = tiny.config(steps_per_domain=8, batch_size=8)
CONFIG = tiny.with_options(CONFIG, {"safeanchor-exact": {"max_rank": 6}})
PRESET = Preset(
    name="tiny",
    summary="",
    study=Options(),
    domains=("medical",),
    methods=METHODS,
    seeds=(3,),
    training=CONFIG.training,
    hardware=CONFIG.hardware,
    hyperparameters=CONFIG.methods or Hyperparameters(),
)


def load(name):
    """The preset of these tests, or a real one."""
    return PRESET if name == "tiny" else LOADED(name)


LOADED = recipes.load

if __name__ == "__main__":
    recipes.MODULES["tiny"] = "tiny"
    recipes.load = load
    sys.exit(main(sys.argv[1:]))
