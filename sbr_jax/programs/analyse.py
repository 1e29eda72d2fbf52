"""Analyses of the safety subspace: is it what it is taken for, and does it last?

    python -m experiments.analyse PRESET --workdir DIR [--analysis NAME] [--results DIR]
        [--examples N] [--methods A B ...] [--domains ...] [--seed N ...]
        [--training.lora-rank 8 ...]
    python -m experiments.analyse --list

    harm-types    are refusal, truthfulness and bias one subspace?
    sensitivity   how many calibration examples does it take?
    exhaustion    rank, removed gradient and accuracy over up to 20 domains
    coupling      does it hold the refusal direction of the activations?
    probe         does the risk probe tell harmful prompts that it never saw?
    selectivity   does it hold more of held-out safety than of what is learnt?

Writes `analysis.json`, `analysis.html` and a PNG for each figure into DIR. Further
analyses in the same DIR are added. Its runs (`exhaustion`, `coupling`) resume where
they stopped.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax import errors, files, recipes
from sbr_jax.programs import cli, hosts
from sbr_jax.programs.job import JobArguments, Options, make_job, parse
from sbr_jax.recipes.preset import Preset
from sbr_jax.reporting import html
from sbr_jax.reporting.analyses import drawings
from sbr_jax.reporting.runs import program_of, read_run
from sbr_jax.studies import dates
from sbr_jax.studies.analyses import ANALYSES, LABELLED, Context, labelled
from sbr_jax.typing import UserError

PROGRAM = cli.command("analyse")
OUTPUT = "analysis.json"
REMEDY = "delete it to have all analyses made anew"
MOST_EXAMPLES = 500
"""Bound on --examples: all kinds are cut to the smallest, which has far fewer."""
SHOWN = ("plain", "safeanchor-exact:projection-only", "safeanchor-exact:random")
"""Variants: no projection, the projection, and a random one of the same rank."""


@dataclasses.dataclass(frozen=True)
class AnalyseArguments(JobArguments[Options]):
    """Analyse the safety subspace of a preset's model."""

    analysis: str = "all"
    """harm-types, sensitivity, exhaustion, coupling, probe, selectivity or all."""
    results: Path | None = None
    """A finished run for exhaustion to read, instead of a new one."""
    examples: int = 60
    """Most examples in each half of a kind (harm-types) or each set (selectivity)."""
    domains: tuple[str, ...] = ()
    """Domains of exhaustion and coupling; default: the preset's.
    In a testbed, exhaustion takes all of the testbed's domains by default."""


def make_context(
    preset: Preset, arguments: AnalyseArguments
) -> tuple[Context, list[str]]:
    """Checks a command line, cheap checks first.

    Returns:
        The context that the analyses share, and the names of those to run.
    """
    if arguments.workdir is None:
        raise UserError(
            "expected a folder for the analyses, got none: add --workdir "
            f"runs/{preset.name}-analysis"
        )
    errors.check_names("analysis", [arguments.analysis], [*ANALYSES, "all"])
    if not 2 <= arguments.examples <= MOST_EXAMPLES:
        raise UserError(
            f"--examples: expected from 2 to {MOST_EXAMPLES}, got {arguments.examples}"
        )
    hosts.require_one(arguments)
    check_folder(arguments.workdir)
    if arguments.results is not None:
        read_run(arguments.results)
    named = arguments.domains or preset.domains
    job = make_job(preset, dataclasses.replace(arguments, domains=named))
    names = list(ANALYSES) if arguments.analysis == "all" else [arguments.analysis]
    if not labelled(preset.study):
        if arguments.analysis in LABELLED:
            raise UserError(
                f"--analysis {arguments.analysis}: expected a preset of the testbed, "
                f"whose examples have kinds, got '{preset.name}'"
            )
        names = [name for name in names if name not in LABELLED]
    context = Context(job, arguments.examples, arguments.domains, arguments.results)
    return context, names


def check_folder(folder: Path) -> None:
    """Refuses a folder for the analyses that holds other files."""
    from sbr_jax.training.run_folder import read_config, refuse_foreign

    cli.check_folder(folder)
    if (folder / "config.json").exists():
        raise UserError(
            f"--workdir: {folder} is the folder of {program_of(read_config(folder))}; "
            f"choose another for the analyses: --workdir {folder}-analysis"
        )
    if not (folder / OUTPUT).exists():
        # An interrupted analysis leaves only the folder of its run.
        refuse_foreign(folder, OUTPUT, own=tuple(ANALYSES))


def identity(context: Context) -> dict[str, Any]:
    """Preset, settings and model that all analyses of a folder share."""
    return {
        "preset": context.job.preset,
        "training": dataclasses.asdict(context.job.config.training),
        "fingerprint": context.study.fingerprint,
        **{k: v for k, v in context.study.notes.items() if k == dates.KEY},
    }


def execute(context: Context, names: Sequence[str]) -> Path:
    """Runs the analyses and writes everything.

    Returns:
        The page.

    Raises:
        UserError: for a folder with another preset, settings or model, or whose
            analyses cannot be drawn.
    """
    cli.enable_compilation_cache()
    from sbr_jax.reporting.theme import to_png
    from sbr_jax.training.records import plain_numbers, read_json, write_record

    folder = context.job.workdir
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
        if not context.job.quiet:
            print(f"{name} ...", file=sys.stderr, flush=True)
        whole[name] = plain_numbers(ANALYSES[name](context))
        write_record(path, whole, indent=1)
    return write_page(folder, whole, to_png)


def check_drawable(path: Path, whole: Mapping[str, Any]) -> None:
    """Refuses stored analyses that cannot be drawn, before running others."""
    for name in ANALYSES:
        if name not in whole:
            continue
        try:
            drawings(name, whole[name])
        # A drawing that misses a value ends with one of these.
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise UserError(
                f"expected a {name} analysis that can be drawn in {path}, got one that "
                f"is damaged or of an older version: {REMEDY}"
            ) from e


def write_page(
    folder: Path, whole: Mapping[str, Any], to_png: Callable[..., None]
) -> Path:
    """Writes the page and the figures of all analyses in `analysis.json`."""
    body = [html.heading("What the safety subspace is", 1)]
    for name in ANALYSES:
        for drawing in drawings(name, whole[name]) if name in whole else ():
            body.append(html.drawing_block(drawing, ""))
            if drawing.figure is not None:
                picture = folder / f"{drawing.name}.png"
                files.replace(picture, functools.partial(to_png, drawing.figure))
    output = folder / "analysis.html"
    title = f"{whole['of']['preset']}: analyses"
    files.write_text(output, html.page(title, body))
    return output


def listing() -> str:
    """The analyses and the presets that offer them, as `--list` prints them."""
    lines = ["analyses"]
    for name, analysis in ANALYSES.items():
        lines.append(f"  {name:<14} {(analysis.__doc__ or '').partition('.')[0]}")
    lines += ["", "presets"]
    for name in recipes.MODULES:
        known = labelled(recipes.load(name).study)
        possible = (name for name in ANALYSES if known or name not in LABELLED)
        lines.append(f"  {name:<14} {', '.join(possible)}")
    return "\n".join(lines)


def analyse(args: Sequence[str]) -> None:
    """Carries out a command line."""
    if "--list" in args:
        print(listing())
        return
    fresh: dict[str, Any] = {"methods": SHOWN, "seed": (0,), "domains": ()}
    preset, arguments = parse(AnalyseArguments, args, PROGRAM, **fresh)
    output = execute(*make_context(preset, arguments))
    if not arguments.quiet:
        print(f"analyses: {output}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(analyse, args, __doc__)
