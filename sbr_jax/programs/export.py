"""Take the weights of one variant out of a run: a PEFT adapter, or a merged checkpoint.

    python -m experiments.export PRESET --workdir DIR --variant NAME --seed N
        --output FOLDER [--merged] [--stage K] [--data DIR] [--model DIR] [--judge DIR]
        [--unaligned DIR]

Settings, domains and hyper-parameters are those of the run's `config.json`; the folders
of data and model, which it does not hold, are named again. What is written is what was
measured: the method's `deploy` is applied. Methods that deploy other base weights than
they were given are written with `--merged` only, which joins base and adapter.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax import errors, files, recipes
from sbr_jax.methods import Hyperparameters, build
from sbr_jax.methods.base import as_aligned
from sbr_jax.programs import cli
from sbr_jax.programs.job import Job
from sbr_jax.recipes.preset import Preset
from sbr_jax.reporting.runs import PROGRAMS
from sbr_jax.settings import Training, restore
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import Sources
from sbr_jax.training import deployed
from sbr_jax.training.config import Config
from sbr_jax.typing import PyTree, UserError

PROGRAM = cli.command("export")
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Take the weights of one variant out of a run."""

    workdir: str | None = None
    """The run's folder."""
    variant: str = ""
    """Method, or variant of one."""
    seed: int | None = None
    """Its seed."""
    output: str | None = None
    """A new or empty folder."""
    merged: bool = False
    """Write a whole checkpoint, base and adapter in one, in place of the adapter."""
    stage: int | None = None
    """Number of the last stage that counts; default: the last of the last domain."""
    data: str | None = None
    """Data folder, where the run had one."""
    model: str | None = None
    """Checkpoint folder, where the run had one."""
    base_name: str | None = None
    """What the adapter's file calls its base, a hub id or folder; default: --model."""
    judge: str | None = None
    """Folder of the judge's checkpoint, where the run had one."""
    unaligned: str | None = None
    """Folder of the checkpoint before alignment, where the run had one."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A command line that was found to be in order.

    Attributes:
        job: of the run, with one variant and seed.
        record: the run's `config.json`.
        stage: the last that counts.
        place: folder of the newest adapter up to that stage.
        output: where to write.
        merged: whether to write base and adapter in one.
        base_name: what the adapter's file calls its base.
    """

    job: Job
    record: Mapping[str, Any]
    stage: int
    place: Path
    output: Path
    merged: bool
    base_name: str | None

    @property
    def variant(self) -> str:
        """The variant to take out."""
        return self.job.methods[0]

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.job.seeds[0]


def make_export(preset: Preset, arguments: Arguments) -> Export:
    """Checks a command line, the cheap questions first.

    Raises:
        UserError: for the first mistake.
    """
    for name, example in (("workdir", "runs/NAME"), ("output", "exported")):
        if not getattr(arguments, name):
            raise UserError(f"expected a folder, got none: add --{name} {example}")
    workdir, output = Path(arguments.workdir or ""), Path(arguments.output or "")
    record = _record(workdir)
    place, stage = _place(arguments, workdir, record)
    if not files.is_free(output):
        raise UserError(
            f"--output {output}: expected a new or empty folder, found something there"
        )
    job = _job(preset, arguments, record, int(place.parent.name))
    method = build(arguments.variant, job.config.methods)
    if method.prepare is not as_aligned and not arguments.merged:
        raise _needs_merging(arguments.variant)
    return Export(
        job=job,
        record=record,
        stage=stage,
        place=place,
        output=output,
        merged=arguments.merged,
        base_name=arguments.base_name or arguments.model,
    )


def _job(
    preset: Preset, arguments: Arguments, record: Mapping[str, Any], seed: int
) -> Job:
    """The run's job, from its record and the folders that it does not hold."""
    workdir = Path(arguments.workdir or "")
    study: Any = restore(preset.study, record["study"], f"{workdir}: study")
    folders = {
        f"{name}_folder": getattr(arguments, name)
        for name in ("judge", "unaligned")
        if getattr(arguments, name) is not None
    }
    known = {field.name for field in dataclasses.fields(study)}
    if strange := sorted(folders.keys() - known):
        raise UserError(
            f"--{strange[0].removesuffix('_folder')}: the preset '{preset.name}' has "
            "no such folder; drop it"
        )
    study = dated(dataclasses.replace(study, **folders), workdir)
    config = Config(
        restore(Training(), record["training"], f"{workdir}: training"),
        dataclasses.replace(preset.hardware, mesh=None),
        restore(Hyperparameters(), record["methods"], f"{workdir}: methods"),
    )
    sources = Sources(arguments.model, arguments.data)
    study.check((arguments.variant,), config.methods, sources)
    return Job(
        preset=preset.name,
        workdir=workdir,
        methods=(arguments.variant,),
        domains=tuple(record["domains"]),
        seeds=(seed,),
        config=config,
        study=study,
        sources=sources,
        quiet=arguments.quiet,
    )


def _record(workdir: Path) -> dict[str, Any]:
    """The configuration of a run of `experiments.run`."""
    from sbr_jax.training.records import read_json

    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir: expected the folder of a run, found no {path}")
    config = read_json(path)
    for key, program in PROGRAMS.items():
        if key in config:
            raise UserError(
                f"--workdir {workdir}: expected a run of experiments.run, got one of "
                f"{program}, whose weights are for study only"
            )
    if "settings" in config:
        raise UserError(
            f"--workdir {workdir}: expected a run of this version, got one of an older "
            "one, which can be reported and not exported: use the version that made it"
        )
    wanted = {"training", "methods", "study", "domains", "fingerprint"}
    if missing := sorted(wanted - config.keys()):
        raise UserError(f"expected {', '.join(missing)} in {path}, found none")
    return config


def _place(
    arguments: Arguments, workdir: Path, config: Mapping[str, Any]
) -> tuple[Path, int]:
    """The stage that holds the adapter, and the number of the last that counts.

    Raises:
        UserError: for an unknown row or seed, and a stage that is not finished or whose
            adapter is gone.
    """
    from sbr_jax.training.run_folder import run_of
    from sbr_jax.training.stage_records import BASE, read_result

    rows = {p.name.replace("+", ":"): p for p in sorted(workdir.glob("stages/*"))}
    rows.pop(BASE, None)
    if arguments.variant not in rows:
        raise errors.unknown(f"variant of {workdir}", arguments.variant, rows)
    seeds = sorted(path.name for path in rows[arguments.variant].iterdir())
    if str(arguments.seed) not in seeds:
        raise UserError(
            f"--seed: expected one of {', '.join(seeds)}, with which "
            f"{arguments.variant} was run, got {arguments.seed}"
        )
    folder = rows[arguments.variant] / str(arguments.seed)
    found = (path.parent for path in folder.glob("*/result.json"))
    stages = {int(path.name.split("-")[0]): path for path in sorted(found)}
    stage = 4 * len(config["domains"]) if arguments.stage is None else arguments.stage
    if stage not in stages:
        shown = ", ".join(path.name for path in stages.values()) or "none"
        raise UserError(
            f"{arguments.variant}, seed {arguments.seed}: expected stage {stage} to be "
            f"finished, found {shown}; continue the run, or name one with --stage"
        )
    run = run_of(config)
    records = {n: read_result(path, run) or {} for n, path in stages.items()}
    holding = [n for n, record in records.items() if "adapter" in record["files"]]
    before = [n for n in holding if n <= stage]
    replaced = before and before != holding
    # A newer checkpoint replaces the older ones.
    if not before or (replaced and not (stages[before[-1]] / "adapter").is_dir()):
        kept = f"that of {stages[holding[-1]].name}" if holding else "none"
        raise UserError(
            f"--stage {stage}: expected a stage whose adapter is still there, found "
            f"{kept}; name it, or a later one"
        )
    return stages[before[-1]], stage


def _needs_merging(variant: str) -> UserError:
    return UserError(
        f"'{variant}' deploys other base weights than it was given, which an adapter "
        "does not hold: add --merged"
    )


def weights(plan: Export, study: Any) -> tuple[PyTree, PyTree]:
    """The variant's deployed weights, base and adapter.

    Raises:
        UserError: if `deploy` needs a state that a newer one has replaced.
    """
    job = deployed.reopen(plan.job.workdir, study, plan.job.config, plan.job.domains)
    return deployed.weights(job, plan.variant, plan.seed, plan.stage)


def execute(plan: Export) -> None:
    """Build the study, load the weights, write them.

    Raises:
        UserError: for data or a model other than the run's, and base weights that an
            adapter cannot hold.
    """
    cli.enable_compilation_cache()
    from sbr_jax.models import merge_adapter, save
    from sbr_jax.models.peft import save_peft
    from sbr_jax.models.quantize import dequantize

    study = plan.job.make_study()
    if study.fingerprint != plan.record["fingerprint"]:
        raise UserError(
            f"the preset '{plan.job.preset}' has other data or another model here "
            f"than in the run {plan.job.workdir}: name the run's preset, --data, "
            "--model and its other folders"
        )
    base, adapter = weights(plan, study)
    if plan.merged:
        merged = dequantize(merge_adapter(base, adapter))
        model = dataclasses.replace(study.model, params=merged)
        write = functools.partial(save, model=model, max_shard_bytes=SHARD_BYTES)
    elif adapter is None or base is not study.model.params:
        raise _needs_merging(plan.variant)
    else:
        names = {"model": study.model, "adapter": adapter}
        write = functools.partial(save_peft, **names, base_name=plan.base_name)
    files.fill_folder(plan.output, write)
    if not plan.job.quiet:
        kind = "checkpoint" if plan.merged else "adapter"
        print(f"{kind} of {plan.variant}, seed {plan.seed}, after {_reached(plan)}")
        print(f"  in {plan.output}")


def _reached(plan: Export) -> str:
    from sbr_jax.training.run_folder import run_of
    from sbr_jax.training.stage_records import read_result

    (folder,) = plan.place.parent.glob(f"{plan.stage:02d}-*")
    record = read_result(folder, run_of(plan.record))
    if record is None:
        raise UserError(f"expected a finished stage in {folder}, found no result.json")
    line = record["line"]
    return f"{line['domain']} (stage {folder.name})"


def export(args: Sequence[str]) -> None:
    """Does what a command line asks for.

    Raises:
        UserError: for the first mistake.
    """
    errors.check_names("preset", args[:1], recipes.MODULES)
    if not args:
        raise UserError(
            f"expected the run's preset, got none (known: {', '.join(recipes.MODULES)})"
        )
    arguments = cli.parse(Arguments, args[1:], f"{PROGRAM} {args[0]}")
    execute(make_export(recipes.load(args[0]), arguments))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(export, args, __doc__, interrupted="interrupted: nothing written")


if __name__ == "__main__":
    sys.exit(main())
