"""Job: a preset changed by a command line, and checked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from sbr_jax import checks, errors, recipes, storage
from sbr_jax.methods import METHODS, VARIANTS, Hyperparameters, build
from sbr_jax.programs import cli
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.recipes.preset import Preset
from sbr_jax.settings import Hardware, Training
from sbr_jax.studies.dates import dated
from sbr_jax.studies.options import Sources, StudyOptions, recorded
from sbr_jax.training.config import Config
from sbr_jax.typing import UserError

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class JobArguments(Generic[Options]):
    """Arguments of every program that trains, with a preset's values as defaults.

    Each field of `study`, `training` and `hardware`, and of each method in `methods`,
    is an option: `--training.learning-rate 1e-3`, `--methods.sbr.anchors 4`.
    """

    study: Options
    """Options of the study."""
    workdir: Annotated[Path | None, REQUIRED] = None
    """Folder for the results; the same folder continues the same run."""
    methods: tuple[str, ...] = ()
    """Methods, or variants of them such as safeanchor-exact:no-anchor."""
    domains: tuple[str, ...] = ()
    """Domains, in order of training."""
    seed: tuple[int, ...] = ()
    """Seeds; every variant runs with each of them."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,fsdp=4,tp=2; the same as --hardware.mesh."""
    distributed: str = "off"
    """Several processes: auto (Cloud TPU, SLURM), or HOST:PORT,N,I: process I of N."""
    data: str | None = None
    """Data folder (presets on real text)."""
    model: str | None = None
    """Checkpoint folder instead of the preset's model, or a hub id (real models)."""
    quiet: bool = False
    """Print nothing but errors."""
    training: Training = Training()
    """Mathematics of the training."""
    hardware: Hardware = Hardware()
    """How the training is computed."""
    hyperparameters: Annotated[
        Hyperparameters,  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(name="methods"),
    ] = Hyperparameters()
    """Hyper-parameters of the methods."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked training job: variants, seeds, settings and folder.

    Attributes:
        preset: name of the preset.
        workdir: folder for the results.
        methods: names of the variants.
        domains: names, in order of training.
        seeds: in order.
        config: of the training job.
        study: options of the study.
        sources: of its model and data.
        quiet: whether to print nothing but errors.
    """

    preset: str
    workdir: Path
    methods: tuple[str, ...]
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    config: Config
    study: StudyOptions
    sources: Sources = Sources()
    quiet: bool = False

    def make_study(
        self, domains: Sequence[str] | None = None, *, weights: bool = True
    ) -> Any:
        """The study, over the job's domains or others."""
        return self.study.build(
            self.domains if domains is None else domains,
            self.sources,
            self.config.hardware,
            weights=weights,
        )

    def notes(self) -> dict[str, Any]:
        """The study's options that the job's folder records."""
        return {"study": recorded(self.study)}


Arguments = TypeVar("Arguments", bound=JobArguments[Any])


def parse(
    kind: type[Arguments],
    args: Sequence[str],
    prog: str,
    presets: Sequence[str] | None = None,
    **changes: Any,
) -> tuple[Preset, Arguments]:
    """Parses a preset's name and the changes to it.

    Args:
        kind: type of the program's arguments.
        args: words; the preset's name is the first.
        prog: how messages name the program.
        presets: names that the program accepts; None for all.
        **changes: the program's own defaults, which replace the preset's.

    Raises:
        UserError: for an unknown preset or option, or a value of a wrong type.
    """
    known = list(presets or recipes.MODULES)
    if not args or args[0].startswith("-"):
        raise UserError(
            f"expected a preset first, got {args[0] if args else 'none'} (known: "
            f"{', '.join(known)}): {prog} {known[0]} --help shows all settings"
        )
    errors.check_names("preset", args[:1], known)
    preset = recipes.load(args[0])
    return preset, parse_preset(kind, preset, args[1:], prog, **changes)


def parse_preset(
    kind: type[Arguments],
    preset: Preset,
    args: Sequence[str],
    prog: str,
    **changes: Any,
) -> Arguments:
    """Parses the changes to a preset; see :func:`parse`."""
    fields = {
        "study": preset.study,
        "methods": preset.methods,
        "domains": preset.domains,
        "seed": preset.seeds,
        "training": preset.training,
        "hardware": preset.hardware,
        "hyperparameters": preset.hyperparameters,
    }
    own: Any = kind
    return cli.parse(
        own[type(preset.study)], args, f"{prog} {preset.name}", kind(**fields | changes)
    )


def make_job(
    preset: Preset, arguments: JobArguments[Any], *, forecast: bool = False
) -> Job:
    """Checks a command line, cheap checks first.

    A forecast trains nothing, so it needs no folder, and its mesh may use devices that
    this machine does not have.
    """
    if arguments.workdir is None and not forecast:
        raise UserError(
            "expected a folder for the results, got none: add --workdir "
            f"runs/{preset.name}"
        )
    workdir = storage.folder(arguments.workdir or Path("runs") / preset.name)
    checks.seeds(arguments.seed)
    errors.check_some("domain", arguments.domains)
    errors.check_names("domain", arguments.domains, preset.study.known_domains())
    errors.check_some("method", arguments.methods)
    errors.check_names("method", arguments.methods, [*METHODS, *VARIANTS])
    config = Config(
        arguments.training, _with_mesh(arguments, forecast), arguments.hyperparameters
    )
    for variant in arguments.methods:
        build(variant, config.methods)
    sources = Sources(arguments.model, arguments.data)
    arguments.study.check(arguments.methods, config.methods, sources)
    return Job(
        preset=preset.name,
        workdir=workdir,
        methods=arguments.methods,
        domains=arguments.domains,
        seeds=arguments.seed,
        config=config,
        study=dated(arguments.study, workdir),
        sources=sources,
        quiet=arguments.quiet,
    )


def _with_mesh(arguments: JobArguments[Any], forecast: bool) -> Hardware:
    """The hardware with its mesh, which two options can set."""
    hardware, mesh = arguments.hardware, arguments.mesh
    if mesh is not None:
        if hardware.mesh not in (None, mesh):
            raise UserError(
                f"--mesh {mesh}: expected one mesh, got --hardware.mesh "
                f"{hardware.mesh} too: drop one"
            )
        hardware = dataclasses.replace(hardware, mesh=mesh)
    if hardware.mesh is not None:
        from sbr_jax.training.sharding import check_mesh, make_mesh, parse_mesh

        (parse_mesh if forecast else make_mesh)(hardware.mesh)
        check_mesh(hardware, arguments.training)
    return hardware


def check_folder(job: Job) -> None:
    """Refuses a folder with other settings or foreign files, before building a study.

    Values that only the study knows are compared when the job runs.
    """
    from sbr_jax.training.run_folder import refuse_foreign

    if not (job.workdir / "config.json").exists():
        cli.check_folder(job.workdir)
        refuse_foreign(job.workdir, "config.json", own=(storage.JOBS,))
        return
    check_settings(job, job.workdir)


def check_settings(job: Job, folder: Path) -> None:
    """Refuses the folder of a run, or of its part, with other settings."""
    from sbr_jax.training.records import plain_numbers
    from sbr_jax.training.run_folder import read_config

    there, here = read_config(folder), plain_numbers(job.config.mathematics())
    here["domains"] = list(job.domains)
    if any(plain_numbers(there.get(name)) != here[name] for name in here):
        raise UserError(
            f"{folder} belongs to a run with other settings or domains than these; "
            "choose another --workdir"
        )


def execute(job: Job, study: Any = None, *, start_first: bool = True) -> Any:
    """Builds the study and runs what is not finished.

    Args:
        job: to run.
        study: the job's study, if it is already built.
        start_first: see `sbr_jax.training.pipeline.run`.

    Returns:
        The study.
    """
    compiled = cli.enable_compilation_cache()
    from sbr_jax.provenance.code_version import recorder
    from sbr_jax.training import pipeline

    with cli.telling(job.quiet):
        study = job.make_study() if study is None else study
        cli.serve_profiler()
        pipeline.run(
            study,
            job.methods,
            job.seeds,
            job.workdir,
            job.config,
            job.domains,
            notes={**job.notes(), **study.notes},
            code=recorder(job.preset),
            start_first=start_first,
            quiet=job.quiet,
        )
    if not job.quiet:
        print(compiled())
    return study
