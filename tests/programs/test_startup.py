"""What a command line may load before it answers."""

import subprocess
import sys

import sbr_jax
from sbr_jax import Subspace, losses, subspace

ASKED = """
import sys
import sbr_jax
from sbr_jax.programs import main

for words in (
    ["--help"],
    ["run", "--help"],
    ["attack", "--help"],
    ["rum"],
    ["run", "demmo"],
    ["export", "demmo", "--workdir", "x"],
):
    print(main(words), file=sys.stderr)
assert {"fisher_subspace", "losses", "Subspace", "tune"} <= set(dir(sbr_jax))
heavy = ["jax", "numpy", "optax", "flax", "orbax", "transformers", "matplotlib", "tyro"]
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def test_help_and_misspelt_names_load_no_library():
    done = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, check=True
    )
    said = done.stderr.splitlines()
    assert [line for line in said if line.isdigit()] == ["0", "0", "0", "2", "2", "2"]
    assert said[-1] == "[]"
    assert "--dry-run" in done.stdout
    assert "    sbr-jax run PRESET --workdir DIR" in done.stdout
    assert "experiments" not in done.stdout
    assert "nearest: demo" in done.stderr


def test_public_names_are_those_of_their_rooms():
    assert not hasattr(sbr_jax, "nothing")
    assert sbr_jax.Subspace is Subspace is subspace.Subspace
    assert losses.token_cross_entropy
