"""Fine-tune your own chat model on your own examples, and keep it safe.

    sbr-jax tune --model FOLDER_OR_HUB_ID --train FILE [FILE ...] --output FOLDER
        [--harmful FILE] [--safety FILE] [--eval FILE ...] [--method NAME]
        [--epochs 3] [--merged]

Writes a PEFT adapter (or a merged checkpoint), a model card, report.html and
summary.json into a new folder. Refusal, over-refusal and your own examples are measured
before and after. After a kill the same command continues: work is kept beside the
output, in FOLDER.work. All other settings: sbr-jax tune --help.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sbr_jax import checks, distributed, files
from sbr_jax.methods import Hyperparameters
from sbr_jax.methods.needs import fits_adapter
from sbr_jax.programs import cli, hosts
from sbr_jax.programs.parsing import REQUIRED, values_of
from sbr_jax.recipes.own import EPOCHS, HARDWARE, HYPERPARAMETERS, METHOD, TRAINING
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.options import OwnOptions
from sbr_jax.typing import UserError

PROGRAM = cli.command("tune")
STEPS = "--training.steps-per-domain"


@dataclasses.dataclass(frozen=True)
class Shared:
    """Arguments that `tune` and `align` share."""

    model: Annotated[str | None, REQUIRED] = None
    """Checkpoint folder of a chat model, a hub id, or a .gguf file."""
    output: Annotated[Path | None, REQUIRED] = None
    """New folder for weights and report; work is kept beside it, in OUTPUT.work."""
    harmful: str | None = None
    """Prompts to refuse: a .txt with one per line, a table, or a data set's folder."""
    epochs: float | None = None
    """Passes over the examples; default: 3 (align: 1)."""
    seed: int = 0
    """Seed of adapter and order."""
    distributed: str = "off"
    """Several processes: auto (Cloud TPU, SLURM), or HOST:PORT,N,I: process I of N."""
    quiet: bool = False
    """Print nothing but errors."""
    study: OwnOptions = OwnOptions()
    """Sizes, lengths and the judge."""
    training: Training = TRAINING
    """Mathematics of the training."""
    hardware: Hardware = HARDWARE
    """How the training is computed."""
    hyperparameters: Annotated[
        Hyperparameters,  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(name="methods"),
    ] = HYPERPARAMETERS
    """Hyper-parameters of the methods."""


@dataclasses.dataclass(frozen=True)
class Arguments(Shared):
    """Fine-tune your own chat model on your own examples, and keep it safe."""

    train: Annotated[tuple[str, ...], REQUIRED] = ()
    """Examples: csv, json, jsonl, parquet, folder or hub id; several: in this order."""
    method: str = METHOD
    """Defence; plain for no defence."""
    safety: str | None = None
    """Exchanges with safe answers; default: the model's own refusals of --harmful."""
    eval: tuple[str, ...] = ()
    """Examples to measure on; default: a tenth of --train is held back for it."""
    merged: bool = False
    """Write a whole checkpoint with base and adapter joined, instead of the adapter."""


def work_of(output: Path) -> Path:
    """The folder beside an output that keeps a run's work."""
    return output.with_name(f"{output.name}.work")


def work_folder(arguments: Shared) -> Path | None:
    """The work folder of a command line; None if it names no output."""
    return work_of(arguments.output) if arguments.output else None


def check(arguments: Shared, words: Sequence[str], program: str) -> None:
    """Refuses mistakes that can be found without reading a file."""
    for name, example in (("model", "FOLDER_OR_HUB_ID"), ("output", "adapters/mine")):
        if not getattr(arguments, name):
            raise UserError(
                f"expected --{name}, got none: add --{name} {example}; see "
                f"{program} --help"
            )
    output = Path(arguments.output or "")
    for folder in (output, work_of(output)):
        cli.check_folder(folder, "--output")
    if not files.is_free(output):
        raise UserError(
            f"--output {output}: expected a new or empty folder, found something "
            "there: name another, or remove it"
        )
    files.require_place(work_of(output), f"--output {output}")
    checks.seed("seed", arguments.seed)
    if values_of(STEPS, words) and arguments.epochs is not None:
        raise UserError(f"expected --epochs or {STEPS}, got both: drop one")


def request_of(
    arguments: Shared, words: Sequence[str], *, epochs: float, **more: Any
) -> Any:
    """The request of a checked command line.

    If ``words`` name a number of steps, it replaces the default epochs.
    """
    from sbr_jax.tuning import Request

    said = epochs if arguments.epochs is None else arguments.epochs
    return Request(
        model=str(arguments.model),
        folder=work_of(Path(arguments.output or "")),
        harmful=arguments.harmful,
        epochs=None if values_of(STEPS, words) else said,
        seed=arguments.seed,
        study=arguments.study,
        training=arguments.training,
        hardware=arguments.hardware,
        hyperparameters=arguments.hyperparameters,
        quiet=arguments.quiet,
        **more,
    )


def make_request(arguments: Arguments, words: Sequence[str] = ()) -> Any:
    """Checks a command line, cheap checks first; see :func:`check`."""
    if not arguments.train:
        raise UserError("expected --train, got none: add --train my.jsonl")
    check(arguments, words, PROGRAM)
    fits = fits_adapter(arguments.method, arguments.hyperparameters)
    if not fits and not arguments.merged:
        raise UserError(
            f"--method {arguments.method}: it changes base weights too, which an "
            "adapter does not hold: add --merged"
        )
    return request_of(
        arguments,
        words,
        epochs=EPOCHS,
        examples=arguments.train,
        evaluation=arguments.eval,
        safety=arguments.safety,
        method=arguments.method,
    )


def execute(
    request: Any, output: Path, *, merged: bool, taught: str | None = None
) -> Any:
    """Reads the files, forecasts the cost, trains, measures and writes the output.

    Args:
        request: what to tune, and how.
        output: new or empty folder.
        merged: whether to write a whole checkpoint.
        taught: what the rows teach, if they are not examples of a user's task.

    Returns:
        The result of `tuning.carry_out`.
    """
    compiled = cli.enable_compilation_cache()
    from sbr_jax import tuning
    from sbr_jax.costs import defending
    from sbr_jax.reporting import tuned as report

    def say(lines: Sequence[str]) -> None:
        if not request.quiet:
            print("\n".join(lines), flush=True)

    with cli.telling(request.quiet):
        plan = tuning.plan(request)
        say([*([f"rows     {taught}"] if taught else []), *report.plan_lines(plan)])
        study = plan.make_study()
        cli.serve_profiler()
        cost = defending.lines(plan, study)
        lines = [f"{'cost' * (not i):<8} {line}" for i, line in enumerate(cost)]
        say([*report.study_lines(study), *lines])
        tuned = tuning.carry_out(plan, study)
        if merged:
            tuned = tuned.merged()
        distributed.decide(
            lambda: report.write(
                output, plan, study, tuned, merged=merged, taught=taught
            )
        )
    say(["", report.text_table(tuned.metrics), "", compiled()])
    kind = "checkpoint" if merged else "adapter"
    say([f"{kind}: {output}", f"report: {output / 'report.html'}"])
    say([f"work: {request.folder} (may be deleted)"])
    return tuned


def tune(args: Sequence[str]) -> None:
    """Carries out a command line."""
    arguments = cli.parse(Arguments, args, PROGRAM)
    with hosts.joined(arguments, args, work_folder(arguments)):
        request = make_request(arguments, args)
        execute(request, Path(arguments.output or ""), merged=arguments.merged)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(tune, args, None, interrupted=cli.KEPT)
