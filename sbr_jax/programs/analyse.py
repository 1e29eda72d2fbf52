"""Analyses of the safety subspace: is it what it is taken for, and does it last?

    python -m experiments.analyse PRESET --workdir DIR [--analysis NAME] [--results DIR]
        [--methods A B ...] [--domains ...] [--seed N ...] [--set KEY=VALUE ...]
    python -m experiments.analyse --list

    harm-types    are refusal, truthfulness and bias one subspace?
    sensitivity   how many calibration examples does it take?
    exhaustion    rank, removed gradient and accuracy over up to 20 domains
    coupling      does it hold the refusal direction of the activations?
    probe         does the risk probe tell harmful prompts that it never saw?

Writes `analysis.json`, `analysis.html` and a PNG for each figure into DIR. Analyses of
one DIR add up; runs below it (`exhaustion`, `coupling`) are resumed where they stopped.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sbr_jax import outputs as files
from sbr_jax import recipes as configs
from sbr_jax.programs import cli, run
from sbr_jax.reporting import page
from sbr_jax.reporting.analysis_drawings import drawings
from sbr_jax.reporting.results import program_of, read_run
from sbr_jax.studies import dates
from sbr_jax.studies.analyses import ANALYSES, LABELLED, Context, labelled
from sbr_jax.typing import UserError

PROGRAM = "python -m experiments.analyse"
OUTPUT = "analysis.json"
REMEDY = "delete it to have all analyses made anew"
MOST_EXAMPLES = 500
"""All kinds are cut to the smallest, which has far fewer different examples."""
ROWS = ("plain", "safeanchor-exact:projection-only", "safeanchor-exact:random")
"""With the projection, without it, and with one of the same rank about nothing."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Analyse the safety subspace of a preset's model."""

    preset: tyro.conf.Positional[str] = ""
    """Name of a preset of experiments.run."""
    workdir: str | None = None
    """Folder for the results."""
    analysis: str = "all"
    """harm-types, sensitivity, exhaustion, coupling, probe or all."""
    results: Path | None = None
    """A finished run for exhaustion, in place of a new one."""
    methods: tuple[str, ...] = ROWS
    """Rows of the runs of exhaustion and coupling."""
    domains: tuple[str, ...] = ()
    """Their domains; default: all for exhaustion, the preset's for coupling."""
    seed: tuple[int, ...] = (0,)
    """Their seeds."""
    examples: int = 60
    """At most so many examples in each half of a kind (harm-types)."""
    data: str | None = None
    """Data folder (preset stories)."""
    model: str | None = None
    """Checkpoint folder, in place of the preset's model."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")
    ] = ()
    """As for experiments.run."""
    list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List analyses and the presets that they can be of."""
    quiet: bool = False
    """Print nothing but errors."""


def make_context(arguments: Arguments) -> tuple[Context, list[str]]:
    """Check a command line, the cheap questions first.

    Returns:
        What the analyses share, and the names of those to do.

    Raises:
        UserError: for the first mistake.
    """
    if not arguments.preset:
        known = ", ".join(configs.MODULES)
        raise UserError(
            f"expected a preset, got none (known: {known}): {PROGRAM} testbed"
        )
    cli.check_names("preset", [arguments.preset], configs.MODULES)
    if not arguments.workdir:
        raise UserError(
            "expected a folder for the analyses, got none: add --workdir "
            f"runs/{arguments.preset}-analysis"
        )
    cli.check_names("analysis", [arguments.analysis], [*ANALYSES, "all"])
    if not 2 <= arguments.examples <= MOST_EXAMPLES:
        raise UserError(
            f"--examples: expected from 2 to {MOST_EXAMPLES}, got {arguments.examples}"
        )
    if not arguments.seed:
        raise UserError("--seed: expected at least one seed, got none")
    check_folder(Path(arguments.workdir))
    if arguments.results is not None:
        read_run(arguments.results)
    own = {field.name for field in dataclasses.fields(Arguments)}
    shared = own & {field.name for field in dataclasses.fields(run.Arguments)}
    plan = run.make_plan(
        run.Arguments(**{name: getattr(arguments, name) for name in shared})
    )
    names = list(ANALYSES) if arguments.analysis == "all" else [arguments.analysis]
    if not labelled(plan.preset):
        if arguments.analysis in LABELLED:
            raise UserError(
                f"--analysis {arguments.analysis}: expected a preset of the testbed, "
                f"whose examples have kinds, got '{plan.preset.name}'"
            )
        names = [name for name in names if name not in LABELLED]
    context = Context(plan, arguments.examples, arguments.domains, arguments.results)
    return context, names


def check_folder(folder: Path) -> None:
    """Refuse a folder for the analyses that holds something else.

    Raises:
        UserError: naming what it holds.
    """
    from sbr_jax.training.run_folder import read_config, refuse_foreign

    cli.check_folder(folder)
    if (folder / "config.json").exists():
        raise UserError(
            f"--workdir: {folder} is the folder of {program_of(read_config(folder))}; "
            f"choose another for the analyses: --workdir {folder}-analysis"
        )
    if not (folder / OUTPUT).exists():
        # An interrupted analysis leaves the folder of its run, and nothing more.
        refuse_foreign(folder, OUTPUT, own=tuple(ANALYSES))


def identity(context: Context) -> dict[str, Any]:
    """What a folder's analyses have in common; others are refused."""
    return {
        "preset": context.plan.preset.name,
        "settings": context.plan.settings.mathematics(),
        "fingerprint": context.study.fingerprint,
        **{k: v for k, v in context.study.notes.items() if k == dates.KEY},
    }


def execute(context: Context, names: Sequence[str]) -> Path:
    """Run the analyses and write everything.

    Returns:
        The page.

    Raises:
        UserError: for a folder of another preset, settings or model, or one whose
            analyses cannot be drawn.
    """
    cli.enable_compilation_cache()
    from sbr_jax.analysis.theme import to_png
    from sbr_jax.training.records import plain_numbers, read_json, write_record

    folder = context.plan.workdir
    path = folder / OUTPUT
    whole = {"of": plain_numbers(identity(context))}
    if path.exists():
        before = read_json(path, REMEDY, sealed=True)
        if before.get("of") != whole["of"]:
            raise UserError(
                f"{folder} belongs to analyses of another preset, model or settings; "
                "choose another folder"
            )
        check_drawable(path, {k: v for k, v in before.items() if k not in names})
        whole = before
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error}") from error
    for name in names:
        if not context.plan.quiet:
            print(f"{name} ...", file=sys.stderr, flush=True)
        whole[name] = plain_numbers(ANALYSES[name](context))
        write_record(path, whole, indent=1)
    return write_page(folder, whole, to_png)


def check_drawable(path: Path, whole: Mapping[str, Any]) -> None:
    """Refuse stored analyses that the page could not show, before others are made.

    Args:
        path: where they were read.
        whole: those that are to be kept.

    Raises:
        UserError: naming the first.
    """
    for name in ANALYSES:
        if name not in whole:
            continue
        try:
            drawings(name, whole[name])
        # What a drawing looks up is its own affair; whatever is missing ends so.
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise UserError(
                f"expected a {name} analysis that can be drawn in {path}, got one that "
                f"is damaged or of an older version: {REMEDY}"
            ) from e


def write_page(
    folder: Path, whole: Mapping[str, Any], to_png: Callable[..., None]
) -> Path:
    """Write the page and the figures of all analyses in `analysis.json`."""
    body = [page.heading("What the safety subspace is", 1)]
    for name in ANALYSES:
        for drawing in drawings(name, whole[name]) if name in whole else ():
            body.append(page.drawing_block(drawing, ""))
            if drawing.figure is not None:
                picture = folder / f"{drawing.name}.png"
                files.replace(picture, functools.partial(to_png, drawing.figure))
    output = folder / "analysis.html"
    title = f"{whole['of']['preset']}: analyses"
    files.write_text(output, page.page(title, body))
    return output


def listing() -> str:
    """Return what `--list` prints."""
    lines = ["analyses"]
    for name, analysis in ANALYSES.items():
        lines.append(f"  {name:<14} {(analysis.__doc__ or '').partition('.')[0]}")
    lines += ["", "presets"]
    for name in configs.MODULES:
        known = labelled(configs.load(name))
        possible = (name for name in ANALYSES if known or name not in LABELLED)
        lines.append(f"  {name:<14} {', '.join(possible)}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    cli.quiet_libraries()

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        if arguments.list:
            print(listing())
            return
        output = execute(*make_context(arguments))
        if not arguments.quiet:
            print(f"analyses: {output}")

    return cli.guarded(
        program,
        interrupted="interrupted: finished stages are kept; the same command continues",
    )


if __name__ == "__main__":
    sys.exit(main())
