"""The main job: fine-tune over a sequence of domains, one row per method and seed.

    python -m experiments.run PRESET --workdir DIR [--methods A B ...] [--domains ...]
        [--seed N N ...] [--mesh fsdp=4,tp=2] [--set KEY=VALUE ...] [--quiet]
        [--harness [TASK ...]] [--dry-run]
    python -m experiments.run --list

Finished stages are kept: the same command continues after an interruption. A mistake
is one line on stderr and exit code 2, before any work is spent.
"""

import ast
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sbr_jax import recipes as configs
from sbr_jax.programs import cli
from sbr_jax.studies.dates import dated
from sbr_jax.typing import UserError

PROGRAM = "python -m experiments.run"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Fine-tune over a sequence of domains and measure safety after each."""

    preset: tyro.conf.Positional[str] = ""
    """Name of a preset; --list shows them."""
    workdir: str | None = None
    """Folder for the results; the same folder continues the same run."""
    methods: tuple[str, ...] = ()
    """Rows to run: methods or ablations such as safeanchor-exact:no-anchor."""
    domains: tuple[str, ...] = ()
    """Sequence of domains, in order of training."""
    seed: tuple[int, ...] = ()
    """Seeds."""
    mesh: str | None = None
    """Devices by axis, e.g. fsdp=4,tp=2."""
    data: str | None = None
    """Data folder (presets on real text)."""
    model: str | None = None
    """Checkpoint folder, in place of the preset's model; a hub id for real models."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")
    ] = ()
    """Settings (steps_per_domain=50), options of the study (study.KEY=VALUE) and
    hyper-parameters of a row (safeanchor.max_rank=16)."""
    harness: tuple[str, ...] | None = None
    """Then put the start model and every row's final weights through lm-eval: tasks by
    name, or none for all (truthfulqa_mc1, truthfulqa_mc2, bbq, mmlu, medqa_4options).
    """
    harness_limit: int | None = None
    """At most so many items of each task; default: study.limit, or all."""
    dry_run: bool = False
    """Check every file and print memory and hours; train nothing."""
    list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List presets, methods and domains."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line that was found to be in order.

    Attributes:
        preset: what was asked for by name.
        workdir: where results go.
        methods: rows, as names.
        domains: sequence.
        seeds: in order.
        settings: of the training job.
        study_options: keyword arguments of the preset's study.
        row_options: keyword arguments per row.
        quiet: whether to print nothing.
        harness: tasks of lm-eval, none for all; None for no lm-eval.
        harness_limit: items of each.
    """

    preset: configs.Preset
    workdir: Path
    methods: tuple[str, ...]
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Any
    study_options: Mapping[str, Any]
    row_options: Mapping[str, Mapping[str, Any]]
    quiet: bool
    harness: tuple[str, ...] | None = None
    harness_limit: int | None = None


def parse_value(text: str) -> Any:
    """Read a Python literal; anything else is text.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("fsdp=2")
    (0.001, (1, 2), 'fsdp=2')
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    # Settings are compared and cached, so they must not change.
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, example: Any) -> bool:
    """Whether a value can stand where this default stands."""
    if example is None or value is None:
        return True
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(example)


def parse_overrides(
    texts: Sequence[str], preset: configs.Preset, rows: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Sort `KEY=VALUE` into settings, options of the study, and options of rows.

    Raises:
        UserError: for a key that nothing has, or a value of another type.
    """
    from sbr_jax.training.settings import Settings

    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    settings = dict(preset.settings)
    study = dict(preset.options)
    row_options: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set: expected KEY=VALUE, got '{text}'")
        value = parse_value(raw)
        scope, dot, name = key.rpartition(".")
        if not dot:
            known, target = defaults, settings
        elif scope == "study":
            known, target = dict(preset.options), study
        elif scope in rows:
            row_options.setdefault(scope, {})[name] = value
            continue
        else:
            raise cli.unknown("scope of --set", scope, ["study", *rows])
        if name not in known:
            raise cli.unknown("option of --set", name, known)
        if not _fits(value, known[name]):
            kind = type(known[name]).__name__
            raise UserError(f"--set {key}: expected a value of {kind}, got '{raw}'")
        target[name] = value
    return settings, study, row_options


def folder_options(preset: configs.Preset, **folders: str | None) -> dict[str, str]:
    """Options of the study that the flags of folders stand for, where they are given.

    Args:
        preset: whose options they are.
        folders: flag to folder, or None without that flag.

    Raises:
        UserError: for a flag that the preset has no use for.
    """
    given = {flag: folder for flag, folder in folders.items() if folder is not None}
    for flag in given:
        if f"{flag}_folder" not in preset.options:
            raise UserError(f"--{flag}: the preset '{preset.name}' has no such option")
    return {f"{flag}_folder": folder for flag, folder in given.items()}


def make_plan(arguments: Arguments) -> Plan:
    """Check a command line, the cheap questions first.

    Raises:
        UserError: for the first mistake.
    """
    if not arguments.preset:
        known = ", ".join(configs.MODULES)
        raise UserError(f"expected a preset, got none (known: {known}): {PROGRAM} demo")
    if arguments.preset not in configs.MODULES:
        raise cli.unknown("preset", arguments.preset, configs.MODULES)
    if not arguments.workdir and not arguments.dry_run:
        raise UserError(
            "expected a folder for the results, got none: add --workdir "
            f"runs/{arguments.preset}"
        )
    preset = configs.load(arguments.preset)
    seeds = arguments.seed or preset.seeds
    cli.check_seeds(seeds)
    domains = arguments.domains or preset.domains
    cli.check_names("domain", domains, preset.known_domains())
    given = folder_options(preset, data=arguments.data, model=arguments.model)

    from sbr_jax.methods import ABLATIONS, METHODS, build
    from sbr_jax.training.settings import Settings

    rows = arguments.methods or preset.methods
    cli.check_names("method", rows, [*METHODS, *ABLATIONS])
    described = [text for text in arguments.overrides if text.startswith("device.")]
    if described and not arguments.dry_run:
        raise UserError(f"--set {described[0]}: only --dry-run has use for a device")
    texts = [text for text in arguments.overrides if text not in described]
    settings, study, options = parse_overrides(texts, preset, rows)
    if arguments.mesh is not None:
        from sbr_jax.training.sharding import make_mesh, parse_mesh

        for key, other in (("mesh", settings), ("study.mesh", study)):
            value = other.get("mesh")
            if value not in (None, arguments.mesh):
                raise UserError(
                    f"--mesh {arguments.mesh}: expected one mesh, got {key}={value} "
                    "after --set too; --mesh sets all there is"
                )
        # A forecast may be for other devices than this machine's.
        (parse_mesh if arguments.dry_run else make_mesh)(arguments.mesh)
        settings["mesh"] = arguments.mesh
        if "mesh" in preset.options:
            given["mesh"] = arguments.mesh
    for row in rows:
        build(row, **options.get(row, {}))
    if preset.check is not None:
        preset.check(rows, {**study, **given}, overrides=options, settings=settings)
    if arguments.harness is not None:
        from sbr_jax.programs import harness

        harness.check(arguments.harness, {**study, **given})
    limit = arguments.harness_limit
    if limit is not None and (arguments.harness is None or limit < 1):
        raise UserError(
            f"--harness-limit {limit}: expected a number of at least 1 beside --harness"
        )
    workdir = Path(arguments.workdir or f"runs/{preset.name}")
    return Plan(
        preset=preset,
        workdir=workdir,
        methods=rows,
        domains=domains,
        seeds=seeds,
        settings=Settings(**settings),
        study_options=dated({**study, **given}, workdir),
        row_options=options,
        quiet=arguments.quiet,
        harness=arguments.harness,
        harness_limit=limit,
    )


def execute(plan: Plan) -> None:
    """Build the study, run it and, if asked, put its weights through lm-eval."""
    cli.enable_compilation_cache()
    from sbr_jax.programs import harness
    from sbr_jax.provenance.code_version import recorder
    from sbr_jax.training import pipeline

    # Read before the hours that the run takes: a missing file is told at once.
    tasks = None if plan.harness is None else harness.read(plan)
    study = plan.preset.study(plan.domains, **plan.study_options)
    options = configs.recorded(plan.study_options)
    pipeline.run(
        study,
        plan.methods,
        plan.seeds,
        plan.workdir,
        plan.settings,
        plan.domains,
        config={"study": options, **study.notes},
        overrides=plan.row_options,
        code=recorder(plan.preset.name),
        quiet=plan.quiet,
    )
    if tasks is not None:
        harness.evaluate(plan, study, tasks)
    if not plan.quiet:
        print(f"results: {plan.workdir / 'results.jsonl'}")
        print(f"next:    python -m experiments.report {plan.workdir}")


def listing() -> str:
    """Return what `--list` prints."""
    from sbr_jax.methods import ABLATIONS, METHODS

    lines = ["presets"]
    lines += [f"  {name:<14} {configs.load(name).summary}" for name in configs.MODULES]
    lines += ["", "methods", *(f"  {name}" for name in METHODS)]
    lines += ["", "ablations", *(f"  {name}" for name in ABLATIONS), "", "domains"]
    groups: dict[str, list[str]] = {}
    for name in configs.MODULES:
        known = ", ".join(configs.load(name).known_domains())
        groups.setdefault(known, []).append(name)
    lines += [f"  {', '.join(names)}: {known}" for known, names in groups.items()]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    cli.quiet_libraries()

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        if arguments.list:
            print(listing())
            return
        plan = make_plan(arguments)
        if not arguments.dry_run:
            execute(plan)
            return
        from sbr_jax.costs import dry_run

        print(dry_run.execute(plan, arguments.overrides))

    return cli.guarded(
        program,
        interrupted="interrupted: finished stages are kept; the same command continues",
    )


if __name__ == "__main__":
    sys.exit(main())
