"""A small chat model from real text, for the preset `realtext`.

    python -m experiments.realtext --data DIR --output DIR [--steps N] [--seed N]
        [--quiet]

Trains a Llama of 3.4 M parameters from scratch to answer benign instructions and to
refuse harmful ones (`studies.realtext`), and measures it. It takes about 32 minutes on
one core.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from sbr_jax import checks
from sbr_jax.programs import cli
from sbr_jax.recipes.realtext import BENCHMARKS
from sbr_jax.studies import realtext
from sbr_jax.typing import UserError

PROGRAM = cli.command("realtext")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train the small chat model of the preset realtext on the text of a folder."""

    data: Path
    """Data folder."""
    output: Path
    """New folder: a Hugging Face checkpoint with training.json."""
    steps: int = realtext.STEPS
    """Optimizer steps."""
    seed: int = 0
    """Seed of weights, held-out rows, wording and batches."""
    quiet: bool = False
    """Print nothing but errors."""


def _checked(arguments: Arguments) -> Arguments:
    checks.seed("seed", arguments.seed)
    if arguments.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {arguments.steps}")
    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"--output: expected a folder that is not there yet, got {output}: remove "
            "it, or name another"
        )
    # The output is made at the end, so that an early mistake or kill leaves nothing.
    there = next(folder for folder in output.parents if os.path.exists(folder))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(
            f"--output: cannot make {output} below {there}: name another place"
        )
    return arguments


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    cli.quiet_libraries()

    def program() -> None:
        given = _checked(cli.parse(Arguments, args, PROGRAM))
        cli.enable_compilation_cache()
        model, record = realtext.build(
            given.data,
            BENCHMARKS,
            steps=given.steps,
            seed=given.seed,
            quiet=given.quiet,
        )
        realtext.write(given.output, model, record)
        if not given.quiet:
            for name in ("held_out_loss", "measured"):
                for key, value in record[name].items():
                    print(f"{name} {key:<32} {value:.2f}")
            print(f"model: {given.output}")

    return cli.guarded(
        program, interrupted="interrupted: nothing was written; start again"
    )
