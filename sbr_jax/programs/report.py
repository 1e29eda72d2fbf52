"""Tables and figures of finished runs.

    python -m experiments.report DIR... [--output FILE] [--figures FOLDER] [--quiet]

Writes `report.html` (one self-contained page) and `report.md` beside it, by default
into the first DIR, and prints the main table. The report is a pure function of
`results.jsonl`, `timings.jsonl`, `config.json` and `harness.json`. It says what a run
lacks and invents nothing.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from sbr_jax.programs import cli
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.reporting.report import build, print_tables


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tables and figures of finished runs."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], REQUIRED]
    """Folders of finished runs."""
    output: Path | None = None
    """File for the page; default: report.html in the first folder."""
    figures: Path | None = None
    """Also write the figures as PNG files into this folder."""
    quiet: bool = False
    """Print nothing but errors."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, cli.command("report"))
        runs, output = build(arguments.folders, arguments.output, arguments.figures)
        if not arguments.quiet:
            print_tables(runs, output)

    return cli.guarded(program, interrupted="interrupted: nothing else was written")
