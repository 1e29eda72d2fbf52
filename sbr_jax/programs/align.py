"""Teach a chat model that refuses little to refuse, and measure its over-refusal.

    sbr-jax align --model FOLDER_OR_HUB_ID --safety FILE --ordinary FILE
        --output FOLDER [--harmful FILE] [--share 0.2] [--epochs 1]

Trains LoRA on exchanges that refuse harmful requests and on ordinary ones, and merges
it into a new checkpoint: a start model for `sbr-jax tune`. All settings: sbr-jax align
--help.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sbr_jax.errors import counted
from sbr_jax.programs import cli, hosts, tune
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.recipes.own import ALIGNING
from sbr_jax.settings import Training
from sbr_jax.typing import UserError

PROGRAM = cli.command("align")
RISE = 10.0
"""An alignment that adds more points of over-refusal gives a warning."""


@dataclasses.dataclass(frozen=True)
class Arguments(tune.Shared):
    """Teach a chat model that refuses little to refuse."""

    safety: Annotated[str | None, REQUIRED] = None
    """Exchanges in which harmful requests are refused."""
    ordinary: Annotated[str | None, REQUIRED] = None
    """Ordinary exchanges, so that the model keeps answering."""
    share: float = 0.2
    """Share of rows that refuse."""
    training: Training = ALIGNING
    """Mathematics of the training."""


def align(args: Sequence[str]) -> None:
    """Carries out a command line."""
    arguments = cli.parse(Arguments, args, PROGRAM)
    with hosts.joined(arguments, args, tune.work_folder(arguments)):
        _align(arguments, args)


def _align(arguments: Arguments, args: Sequence[str]) -> None:
    for name in ("safety", "ordinary"):
        if not getattr(arguments, name):
            raise UserError(f"expected --{name}, got none: add --{name} FILE")
    tune.check(arguments, args, PROGRAM)
    from sbr_jax.data.conversations import read_conversations
    from sbr_jax.studies.own.aligning import mix_rows

    safe = read_conversations(str(arguments.safety), "--safety")
    ordinary = read_conversations(str(arguments.ordinary), "--ordinary")
    mixed = mix_rows(safe.rows, ordinary.rows, arguments.share)
    request = tune.request_of(
        arguments, args, examples=[mixed.rows], method="plain", epochs=1.0
    )
    # The alignment is about to mend exactly this.
    warnings.filterwarnings("ignore", "the start model refuses")
    output = Path(arguments.output or "")
    rows = counted(len(mixed.rows), "row")
    taught = f"{mixed.safe} of {rows} refuse"
    tuned = tune.execute(request, output, merged=True, taught=taught)
    before, after = (tuned.metrics[w]["over_refusal"] for w in ("before", "after"))
    if after > before + RISE:
        cli.show_warning(
            f"over-refusal rose from {before:.0f} to {after:.0f} %: lower --share "
            f"{arguments.share:g} or --epochs, and begin again"
        )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(align, args, None, interrupted=cli.KEPT)
