"""The main job: fine-tune over a sequence of domains and measure safety after each.

    python -m experiments.run PRESET --workdir DIR [--methods A B ...] [--domains ...]
        [--seed N N ...] [--mesh fsdp=4,tp=2] [--model M] [--data D] [--quiet]
        [--training.learning-rate 1e-3 ...] [--harness [TASK ...]] [--dry-run]
        [--distributed auto|HOST:PORT,N,I] [--jobs N|auto]
    python -m experiments.run PRESET --help    # every setting, with the preset's value
    python -m experiments.run --list

Finished stages are kept: the same command continues after an interruption. A mistake
is one line on stderr and exit code 2, before any work is spent.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbr_jax import recipes, storage
from sbr_jax.costs.devices import DeviceOptions
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli, harness, hosts, spread
from sbr_jax.programs.job import (
    Job,
    JobArguments,
    Options,
    check_folder,
    execute,
    make_job,
    parse,
)
from sbr_jax.programs.spread import Jobs
from sbr_jax.recipes.preset import Preset
from sbr_jax.typing import UserError

PROGRAM = cli.command("run")


@dataclasses.dataclass(frozen=True)
class RunArguments(JobArguments[Options]):
    """Fine-tune over a sequence of domains and measure safety after each."""

    harness: tuple[str, ...] | None = None
    """Then put start and final weights through lm-eval: tasks, or none for all."""
    harness_limit: int | None = None
    """Most items of each task of --harness; default: --study.limit, or all."""
    dry_run: bool = False
    """Check every file and print memory and hours; train nothing."""
    device: DeviceOptions = DeviceOptions()
    """The device to assume in --dry-run, instead of this machine's."""
    jobs: Jobs = 1
    """Processes that share the variants and seeds, on a CPU; auto: one per core."""
    only: tuple[str, ...] | None = None
    """Run only these variants and seeds, as VARIANT/SEED."""


def check(arguments: RunArguments, job: Job) -> None:
    """Refuses mistakes in the options of this program alone."""
    if arguments.device != DeviceOptions() and not arguments.dry_run:
        raise UserError("--device: only --dry-run has use for a device; drop it")
    if arguments.harness is not None:
        if arguments.only is not None:
            raise UserError(
                "--only with --harness: expected a whole run for lm-eval, got a part "
                "of one; drop one, and put the whole through it afterwards"
            )
        harness.check(arguments.harness, job)
    limit = arguments.harness_limit
    if limit is not None and (arguments.harness is None or limit < 1):
        raise UserError(
            f"--harness-limit {limit}: expected a number of at least 1 beside --harness"
        )
    spread.check(job, arguments.jobs, arguments.only)


def listing() -> str:
    """The presets, methods, variants and domains, as `--list` prints them."""
    presets = {name: recipes.load(name) for name in recipes.MODULES}
    lines = ["presets", *(f"  {n:<14} {p.summary}" for n, p in presets.items())]
    lines += ["", "methods", *(f"  {name}" for name in METHODS)]
    lines += ["", "variants", *(f"  {name}" for name in VARIANTS), "", "domains"]
    groups: dict[str, list[str]] = {}
    for name, preset in presets.items():
        groups.setdefault(", ".join(preset.study.known_domains()), []).append(name)
    lines += [f"  {', '.join(names)}: {known}" for known, names in groups.items()]
    return "\n".join(lines)


def run(args: Sequence[str]) -> None:
    """Carries out a command line."""
    if "--list" in args:
        print(listing())
        return
    preset, arguments = parse(RunArguments, args, PROGRAM)
    alone = {"--harness": arguments.harness is not None, "--jobs": arguments.jobs != 1}
    for option in (name for name, given in alone.items() if given):
        hosts.require_one(arguments, option)  # Before waiting for the other processes.
    with hosts.joined(arguments, args):
        _run(preset, arguments, args)


def _run(preset: Preset, arguments: RunArguments[Any], words: Sequence[str]) -> None:
    job = make_job(preset, arguments, forecast=arguments.dry_run)
    check(arguments, job)
    if arguments.dry_run:
        from sbr_jax.costs import dry_run

        if arguments.workdir is not None and not storage.is_bucket(job.workdir):
            check_folder(job)
        if arguments.harness is not None:
            harness.read(job, arguments.harness, arguments.harness_limit)
        print(dry_run.execute(job, arguments.device))
        return
    if arguments.distributed == "off":
        spread.gather(job)
    tasks = None
    if arguments.harness is not None:
        # Read before the run, to report a missing file now and not hours later.
        tasks = harness.read(job, arguments.harness, arguments.harness_limit)
    if arguments.only is not None:
        study = job.make_study()
        for one in spread.chosen(job, arguments.only):
            execute(one, study, start_first=False)
        return
    if arguments.jobs != 1:
        spread.execute(job, words, arguments.jobs)
    study = execute(job)
    if tasks is not None:
        harness.evaluate(job, study, tasks)
    if not job.quiet:
        print(f"results: {job.workdir / 'results.jsonl'}")
        print(f"next:    {report_command(job.workdir)}")


def report_command(workdir: Path) -> str:
    """The command for the report; results in a bucket must first be copied to disk."""
    bucket = storage.is_bucket(workdir)
    place = "FOLDER, a copy of it on a disk" if bucket else workdir
    return f"{cli.command('report')} {place}"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(run, args, __doc__)
