"""Export one variant's weights from a run: a PEFT adapter or a merged checkpoint.

    python -m experiments.export PRESET --workdir DIR --variant NAME --seed N
        --output FOLDER [--merged] [--stage K] [--base-name NAME] [--data DIR]
        [--model DIR] [--judge DIR] [--unaligned DIR]

Settings, domains and hyper-parameters come from the run's `config.json`. It does not
hold the folders of data and model, so name them again. The exported weights are the
measured ones: the method's `deploy` is applied. A method that deploys changed base
weights needs `--merged`, which joins base and adapter.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError

from sbr_jax import errors, files, recipes
from sbr_jax.methods import Hyperparameters
from sbr_jax.methods.needs import fits_adapter
from sbr_jax.programs import cli
from sbr_jax.programs.job import Job
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.recipes.preset import Preset
from sbr_jax.reporting.runs import PROGRAMS
from sbr_jax.settings import Training, restore
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import Sources
from sbr_jax.training import deployed
from sbr_jax.training.config import Config
from sbr_jax.training.records import read_json
from sbr_jax.training.run_folder import run_of
from sbr_jax.training.stage_records import BASE, read_result
from sbr_jax.training.stages import last_of
from sbr_jax.typing import UserError

PROGRAM = cli.command("export")
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Export the weights of one variant from a run."""

    workdir: Annotated[str | None, REQUIRED] = None
    """The run's folder."""
    variant: Annotated[str, REQUIRED] = ""
    """A method, or a variant of one."""
    seed: Annotated[int | None, REQUIRED] = None
    """Its seed."""
    output: Annotated[str | None, REQUIRED] = None
    """A new or empty folder."""
    merged: bool = False
    """Write a whole checkpoint with base and adapter joined, instead of the adapter."""
    stage: int | None = None
    """Export the weights after the stage of this number; default: the last stage."""
    data: str | None = None
    """Data folder, if the run had one."""
    model: str | None = None
    """Checkpoint folder, if the run had one."""
    base_name: str | None = None
    """Name of the base in the adapter's file, a hub id or folder; default: --model."""
    judge: str | None = None
    """Folder of the judge's checkpoint, if the run had one."""
    unaligned: str | None = None
    """Folder of the checkpoint before alignment, if the run had one."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A checked export: run, stage and output.

    Attributes:
        job: of the run, with one variant and seed.
        record: the run's `config.json`.
        stage: folder of the last stage to apply.
        output: folder to write.
        merged: whether to join base and adapter.
        base_name: name of the base in the adapter's file.
    """

    job: Job
    record: Mapping[str, Any]
    stage: Path
    output: Path
    merged: bool
    base_name: str | None


def make_export(preset: Preset, arguments: Arguments) -> Export:
    """Checks a command line, cheap checks first."""
    for name, example in (("workdir", "runs/NAME"), ("output", "exported")):
        if getattr(arguments, name) is None:
            raise UserError(f"expected a folder, got none: add --{name} {example}")
    workdir, output = Path(arguments.workdir or ""), Path(arguments.output or "")
    record = _record(workdir)
    stage = _stage(arguments, workdir, record)
    if not files.is_free(output):
        raise UserError(
            f"--output {output}: expected a new or empty folder, found something there"
        )
    job = _job(preset, arguments, record, workdir)
    fits = fits_adapter(arguments.variant, job.config.methods)
    if not fits and not arguments.merged:
        raise _needs_merging(arguments.variant)
    base_name = arguments.base_name or arguments.model
    return Export(job, record, stage, output, arguments.merged, base_name)


def _record(workdir: Path) -> dict[str, Any]:
    """The configuration of a run of `experiments.run`."""
    files.require_disk(workdir)
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


def _stage(arguments: Arguments, workdir: Path, config: Mapping[str, Any]) -> Path:
    """Folder of the last stage to apply; refuses one whose adapter is gone."""
    variant, seed = arguments.variant, arguments.seed
    variants = {p.name.replace("+", ":"): p for p in sorted(workdir.glob("stages/*"))}
    variants.pop(BASE, None)
    if variant not in variants:
        raise errors.unknown(f"variant of {workdir}", variant, variants)
    seeds = sorted(path.name for path in variants[variant].iterdir())
    if str(seed) not in seeds:
        raise UserError(
            f"--seed: expected one of {', '.join(seeds)}, with which {variant} was "
            f"run, got {seed}"
        )
    found = (variants[variant] / str(seed)).glob("*/result.json")
    stages = {int(p.parent.name.split("-")[0]): p.parent for p in sorted(found)}
    last = arguments.stage
    if last is None:
        last = last_of(len(config["domains"]))
    if last not in stages:
        shown = ", ".join(path.name for path in stages.values()) or "none"
        raise UserError(
            f"{variant}, seed {seed}: expected stage {last} to be finished, found "
            f"{shown}; continue the run, or name one with --stage"
        )
    run = run_of(config)
    records = {n: read_result(path, run) or {} for n, path in stages.items()}
    holding = [n for n, record in records.items() if "adapter" in record["files"]]
    before = [n for n in holding if n <= last]
    replaced = before and before != holding
    # A newer checkpoint replaces older ones.
    if not before or (replaced and not (stages[before[-1]] / "adapter").is_dir()):
        kept = f"that of {stages[holding[-1]].name}" if holding else "none"
        raise UserError(
            f"--stage {last}: expected a stage whose adapter is still there, found "
            f"{kept}; name it, or a later one"
        )
    return stages[last]


def _job(
    preset: Preset, arguments: Arguments, record: Mapping[str, Any], workdir: Path
) -> Job:
    """The run's job, from its record and the folders on the command line."""
    study: Any = restore(preset.study, record["study"], f"{workdir}: study")
    for name in ("judge", "unaligned"):
        folder, field = getattr(arguments, name), f"{name}_folder"
        if folder is None:
            continue
        if not hasattr(study, field):
            raise UserError(
                f"--{name}: the preset '{preset.name}' has no such folder; drop it"
            )
        study = dataclasses.replace(study, **{field: folder})
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
        seeds=(arguments.seed or 0,),
        config=config,
        study=dated(study, workdir),
        sources=sources,
        quiet=arguments.quiet,
    )


def _needs_merging(variant: str) -> UserError:
    return UserError(
        f"'{variant}' deploys other base weights than it was given, which an adapter "
        "does not hold: add --merged"
    )


def execute(wanted: Export) -> None:
    """Builds the study, loads the deployed weights and writes them.

    Raises:
        UserError: for data or a model other than the run's, base weights that an
            adapter cannot hold, or a state that a newer one has replaced.
    """
    cli.enable_compilation_cache()
    from sbr_jax.models import merge_adapter, save
    from sbr_jax.models.peft import save_peft
    from sbr_jax.models.quantize import dequantize

    job, (variant,), (seed,) = wanted.job, wanted.job.methods, wanted.job.seeds
    study = job.make_study()
    if study.fingerprint != wanted.record["fingerprint"]:
        raise UserError(
            f"the preset '{job.preset}' has other data or another model here than in "
            f"the run {job.workdir}: name the run's preset, --data, --model and its "
            "other folders"
        )
    opened = deployed.reopen(job.workdir, study, job.config, job.domains)
    number = int(wanted.stage.name.split("-")[0])
    base, adapter = deployed.weights(opened, variant, seed, number)
    if wanted.merged:
        merged = dequantize(merge_adapter(base, adapter))
        model = dataclasses.replace(study.model, params=merged)
        write = functools.partial(save, model=model, max_shard_bytes=SHARD_BYTES)
    elif adapter is None or base is not study.model.params:
        raise _needs_merging(variant)
    else:
        names = {"model": study.model, "adapter": adapter}
        write = functools.partial(save_peft, **names, base_name=wanted.base_name)
    files.fill_folder(wanted.output, write, (SafetensorError,))
    if not job.quiet:
        record = read_result(wanted.stage, run_of(wanted.record)) or {"line": {}}
        kind = "checkpoint" if wanted.merged else "adapter"
        where = f"{record['line'].get('domain')} (stage {wanted.stage.name})"
        print(f"{kind} of {variant}, seed {seed}, after {where}")
        print(f"  in {wanted.output}")


def export(args: Sequence[str]) -> None:
    """Carries out a command line."""
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
