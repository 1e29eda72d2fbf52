"""Take the weights of one row out of a run: a PEFT adapter, or a merged checkpoint.

    python -m experiments.export PRESET --workdir DIR --row ROW --seed N --output FOLDER
        [--merged] [--stage K] [--data DIR] [--model DIR] [--set study.KEY=VALUE ...]

Settings, domains and hyper-parameters are those of the run's `config.json`; the folders
of data and model, which it does not hold, are named again. What is written is what was
measured: the row's `deploy` is applied. Rows that ship other base weights than they
were given are written with `--merged` only, which joins base and adapter.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors import SafetensorError

from sbr_jax import files
from sbr_jax import recipes as configs
from sbr_jax.programs import cli
from sbr_jax.programs.recorded_options import study_options, unlisted
from sbr_jax.reporting.runs import PROGRAMS
from sbr_jax.studies.dates import dated
from sbr_jax.training.shipped import reopen
from sbr_jax.typing import PyTree, UserError

PROGRAM = "python -m experiments.export"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Take the weights of one row out of a run."""

    preset: tyro.conf.Positional[str] = ""
    """The preset of the run."""
    workdir: str | None = None
    """The run's folder."""
    row: str = ""
    """Method or ablation."""
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
    overrides: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="study.KEY=VALUE ...")
    ] = ()
    """Options of the study that did not decide a result: other folders, hardware."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line that was found to be in order.

    Attributes:
        preset: of the run.
        workdir: the run's folder.
        config: its `config.json`.
        settings: of its training job.
        row: to take out.
        row_options: hyper-parameters of the row.
        seed: of the row.
        stage: the last that counts.
        place: folder of the newest adapter up to that stage.
        output: where to write.
        merged: whether to write base and adapter in one.
        base_name: what the adapter's file calls its base.
        study_options: keyword arguments of the preset's study.
        quiet: whether to print nothing.
    """

    preset: configs.Preset
    workdir: Path
    config: Mapping[str, Any]
    settings: Any
    row: str
    row_options: Mapping[str, Any]
    seed: int
    stage: int
    place: Path
    output: Path
    merged: bool
    base_name: str | None
    study_options: Mapping[str, Any]
    quiet: bool


def make_plan(arguments: Arguments) -> Plan:
    """Check a command line, the cheap questions first.

    Raises:
        UserError: for the first mistake.
    """
    if not arguments.preset:
        known = ", ".join(configs.MODULES)
        raise UserError(f"expected the run's preset, got none (known: {known})")
    cli.check_names("preset", [arguments.preset], configs.MODULES)
    for name, example in (("workdir", "runs/NAME"), ("output", "exported")):
        if not getattr(arguments, name):
            raise UserError(f"expected a folder, got none: add --{name} {example}")
    workdir, output = Path(arguments.workdir or ""), Path(arguments.output or "")
    config = _config(workdir)
    place, stage = _place(arguments, workdir, config)
    if not files.is_free(output):
        raise UserError(
            f"--output {output}: expected a new or empty folder, found something there"
        )
    preset = configs.load(arguments.preset)
    options = dated(study_options(arguments, preset, config), workdir)
    if preset.check is not None:
        preset.check((arguments.row,), options)

    from sbr_jax.methods import build
    from sbr_jax.methods.base import as_aligned
    from sbr_jax.training.settings import Settings

    known = {field.name for field in dataclasses.fields(Settings)}
    if strange := sorted(config["settings"].keys() - known):
        raise UserError(
            f"{workdir} has the settings {', '.join(strange)}, which this version does "
            "not know: use the version that wrote it"
        )
    row_options = unlisted(config.get("overrides", {}).get(arguments.row, {}))
    method = build(arguments.row, **row_options)
    if method.prepare is not as_aligned and not arguments.merged:
        raise _needs_merging(arguments.row)
    return Plan(
        preset=preset,
        workdir=workdir,
        config=config,
        settings=Settings(**config["settings"]),
        row=arguments.row,
        row_options=row_options,
        seed=int(place.parent.name),
        stage=stage,
        place=place,
        output=output,
        merged=arguments.merged,
        base_name=arguments.base_name or arguments.model,
        study_options=options,
        quiet=arguments.quiet,
    )


def _config(workdir: Path) -> dict[str, Any]:
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
    wanted = {"settings", "study", "domains", "fingerprint"}
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
    from sbr_jax.training.results import run_of
    from sbr_jax.training.stage_records import BASE, read_result

    rows = {p.name.replace("+", ":"): p for p in sorted(workdir.glob("stages/*"))}
    rows.pop(BASE, None)
    if arguments.row not in rows:
        raise cli.unknown(f"row of {workdir}", arguments.row, rows)
    seeds = sorted(path.name for path in rows[arguments.row].iterdir())
    if str(arguments.seed) not in seeds:
        raise UserError(
            f"--seed: expected one of {', '.join(seeds)}, with which "
            f"{arguments.row} was run, got {arguments.seed}"
        )
    folder = rows[arguments.row] / str(arguments.seed)
    found = (path.parent for path in folder.glob("*/result.json"))
    stages = {int(path.name.split("-")[0]): path for path in sorted(found)}
    stage = 4 * len(config["domains"]) if arguments.stage is None else arguments.stage
    if stage not in stages:
        shown = ", ".join(path.name for path in stages.values()) or "none"
        raise UserError(
            f"{arguments.row}, seed {arguments.seed}: expected stage {stage} to be "
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


def _needs_merging(row: str) -> UserError:
    return UserError(
        f"the row '{row}' ships other base weights than it was given, which an adapter "
        "does not hold: add --merged"
    )


def weights(plan: Plan, study: Any) -> tuple[PyTree, PyTree]:
    """What a row ships: base weights and adapter, after its `deploy`.

    Raises:
        UserError: if `deploy` needs a state that a newer one has replaced.
    """
    from sbr_jax.methods.base import as_trained
    from sbr_jax.training.program import init_adapter

    track = reopen(
        plan.workdir,
        plan.row,
        plan.seed,
        options=plan.row_options,
        study=study,
        base=study.model.params,
        settings=plan.settings,
        domains=plan.config["domains"],
    )
    if track.method.deploy is as_trained:
        # Not `load`, which computes the method's state anew to know its structure.
        like = init_adapter(study, plan.settings, plan.seed)
        return track.base, track.restore(plan.place / "adapter", like)
    states = (track.folder(n) / "state" for n in range(plan.stage + 1))
    if not any(path.is_dir() for path in states):
        raise UserError(
            f"--stage {plan.stage}: the row '{plan.row}' ships what depends on its "
            "state, and a later stage has replaced that; name a later one"
        )
    track.load(plan.stage + 1)
    return track.deployed(track.adapter)


def execute(plan: Plan) -> None:
    """Build the study, load the weights, write them.

    Raises:
        UserError: for data or a model other than the run's, and base weights that an
            adapter cannot hold.
    """
    cli.enable_compilation_cache()
    from sbr_jax.models import merge_adapter, save
    from sbr_jax.models.peft import save_peft
    from sbr_jax.models.quantize import dequantize

    domains = tuple(plan.config["domains"])
    study = plan.preset.study(domains, **plan.study_options)
    if study.fingerprint != plan.config["fingerprint"]:
        raise UserError(
            f"the preset '{plan.preset.name}' has other data or another model here "
            f"than in the run {plan.workdir}: name the run's preset, --data, --model "
            "and every other folder (--set study.KEY=FOLDER)"
        )
    base, adapter = weights(plan, study)
    if plan.merged:
        merged = dequantize(merge_adapter(base, adapter))
        model = dataclasses.replace(study.model, params=merged)
        write = functools.partial(save, model=model, max_shard_bytes=SHARD_BYTES)
    elif adapter is None or base is not study.model.params:
        raise _needs_merging(plan.row)
    else:
        names = {"model": study.model, "adapter": adapter}
        write = functools.partial(save_peft, **names, base_name=plan.base_name)
    files.fill_folder(plan.output, write, (SafetensorError,))
    if not plan.quiet:
        kind = "checkpoint" if plan.merged else "adapter"
        print(f"{kind} of {plan.row}, seed {plan.seed}, after {_reached(plan)}")
        print(f"  in {plan.output}")


def _reached(plan: Plan) -> str:
    from sbr_jax.training.results import run_of
    from sbr_jax.training.stage_records import read_result

    (folder,) = plan.place.parent.glob(f"{plan.stage:02d}-*")
    record = read_result(folder, run_of(plan.config))
    if record is None:
        raise UserError(f"expected a finished stage in {folder}, found no result.json")
    line = record["line"]
    return f"{line['domain']} (stage {folder.name})"


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    cli.quiet_libraries()

    def program() -> None:
        execute(make_plan(cli.parse(Arguments, args, PROGRAM)))

    return cli.guarded(program, interrupted="interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
