"""Tables and figures of finished runs.

    python -m experiments.report DIR... [--output FILE] [--figures FOLDER] [--quiet]

Writes `report.html` (one self-contained page) and `report.md` beside it, by default
into the first DIR, and prints the main table. A pure function of `results.jsonl`,
`timings.jsonl` and `config.json`: what a run does not hold is said, not invented.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from rich.console import Console

from sbr_jax import outputs as files
from sbr_jax.analysis.theme import to_png
from sbr_jax.programs import cli
from sbr_jax.reporting import page
from sbr_jax.reporting.figures import Drawing, drawings, warnings
from sbr_jax.reporting.results import Run, read_runs
from sbr_jax.reporting.tables import (
    Table,
    accuracy_table,
    bullet_list,
    harness_table,
    judge_table,
    main_table,
    probe_table,
    projection_table,
    to_html,
    to_markdown,
    to_rich,
    trajectory_table,
)
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tables and figures of finished runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Working directories of experiments.run."""
    output: Path | None = None
    """The page; default: report.html in the first folder."""
    figures: Path | None = None
    """Also write the figures as PNG files into this folder."""
    quiet: bool = False
    """Print nothing but errors."""


def tables(run: Run) -> dict[str, Table]:
    """Return the tables of a run by title, without empty ones."""
    found = {
        "Results": main_table(run),
        "Composite safety after each stage": trajectory_table(run),
        "Accuracy of each domain": accuracy_table(run),
        "What the projections did": projection_table(run),
        **extra_tables(run),
    }
    return {title: table for title, table in found.items() if len(table.rows) > 0}


def extra_tables(run: Run) -> dict[str, Table]:
    """Return the tables about probes, judges and lm-eval, by title."""
    return {
        "How well the risk probes tell": probe_table(run),
        "How far the judges agree with people": judge_table(run),
        "Under lm-eval": harness_table(run),
    }


def _flat(config: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(str(item) for item in value)))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def markdown(run: Run) -> str:
    """Return the tables of a run as markdown."""
    parts = [f"# {run.folder.name}", ""]
    parts += [f"> **Warning.** {message}\n" for message in warnings(run)]
    for title, table in tables(run).items():
        parts += [f"## {title}", "", to_markdown(table), ""]
        parts += [f"- {note}" for note in table.notes] + [""] * bool(table.notes)
    return "\n".join(parts).rstrip() + "\n"


def section(run: Run, found: Sequence[Drawing], prefix: str) -> list[str]:
    """Return the part of the page about one run."""
    table = main_table(run)
    seeds = sorted({seed for method in run.methods for seed in run.seeds(method)})
    chain = " → ".join(run.domains)
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    deviation = (
        "Mean ± standard deviation over seeds, after the last domain. "
        "A dash is a value that was not measured."
    )
    body = [
        page.paragraph(f"{chain}, {count} ({', '.join(map(str, seeds))}).", "lead"),
        page.warning_box(warnings(run)),
        to_html(table),
        page.paragraph(deviation, "note"),
        "<details><summary>What the columns mean</summary>"
        f"{bullet_list(table.notes)}</details>",
    ]
    body += [page.drawing_block(drawing, prefix) for drawing in found]
    projections = projection_table(run)
    if projections.rows:
        body += [page.heading("What the projections did"), to_html(projections)]
        body += [page.paragraph(" ".join(projections.notes), "note")]
    for title, extra in extra_tables(run).items():
        if extra.rows:
            body += [page.heading(title), to_html(extra)]
            body += [page.paragraph(" ".join(extra.notes), "note")]
    if run.config:
        body += [
            page.heading("Settings and versions"),
            f"<details><summary>{len(_flat(run.config))} values of config.json"
            f"</summary>{page.definitions(_flat(run.config))}</details>",
        ]
    return body


def build(
    folders: Sequence[Path], output: Path | None = None, figures: Path | None = None
) -> tuple[list[Run], Path]:
    """Write the page, its markdown twin and, if asked, the figures.

    Args:
        folders: working directories.
        output: the page; default `report.html` in the first folder.
        figures: folder for PNG files.

    Returns:
        The runs read, and where the page was written.

    Raises:
        UserError: when a folder holds no finished results, or is named twice.
    """
    runs = read_runs(folders)
    output = output or Path(folders[0]) / "report.html"
    text_output = _text_beside(output)
    _writable(output, figures)
    found = [drawings(run) for run in runs]
    pictures = {} if figures is None else _pictures(runs, found, figures)
    # Only whoever has a page of ours has a text of ours beside it.
    new = [output, text_output] if not output.exists() else [output]
    files.refuse_foreign([*new, *pictures])
    title = " · ".join(run.folder.resolve().name for run in runs)
    body = [page.heading("Safety under sequential fine-tuning", 1)]
    for index, run in enumerate(runs):
        name = run.folder.resolve().name
        if len(runs) > 1:
            body += ["<hr>" if index else "", page.heading(name, 1)]
        body += section(run, found[index], f"r{index}-")
    for path, figure in pictures.items():
        files.replace(path, functools.partial(to_png, figure))
    files.write_text(output, page.page(f"{title}: safety report", body))
    text = "\n".join(markdown(run) for run in runs)
    files.write_text(text_output, f"{text}\n<!-- {files.MARK} -->\n")
    return runs, output


def _text_beside(output: Path) -> Path:
    """Where the page's twin in markdown belongs.

    Raises:
        UserError: where the page itself would be.
    """
    if output.suffix.lower() == ".md":
        raise UserError(
            f"--output {output}: expected the name of the page, whose text goes beside "
            f"it as {output.name}: {output.with_suffix('.html')}"
        )
    return output.with_suffix(".md")


def _pictures(
    runs: Sequence[Run], found: Sequence[Sequence[Drawing]], folder: Path
) -> dict[Path, Figure]:
    """Figures by the file that each belongs into."""
    several = len(runs) > 1
    return {
        folder / f"{run.folder.resolve().name + '-' if several else ''}{x.name}.png": (
            x.figure
        )
        for run, drawn in zip(runs, found, strict=True)
        for x in drawn
        if x.figure is not None
    }


def _writable(output: Path, figures: Path | None) -> None:
    """Refuse places that nothing can be written to, before anything is drawn.

    Raises:
        UserError: naming the place.
    """
    if output.is_dir():
        raise UserError(f"--output: expected a file, got the folder {output}")
    for folder in (output.parent, *([] if figures is None else [figures])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error}") from error


def print_tables(runs: Sequence[Run], output: Path) -> None:
    """Print the main table of each run, its warnings, and where the page is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for run in runs:
        console.print()
        title = str(run.folder)
        for table in to_rich(main_table(run), title, console.width):
            console.print(table)
        for message in warnings(run):
            console.print(f"[yellow]warning:[/] {message}", highlight=False)
    console.print(f"\nreport: {output}", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, "python -m experiments.report")
        runs, output = build(arguments.folders, arguments.output, arguments.figures)
        if not arguments.quiet:
            print_tables(runs, output)

    return cli.guarded(program, interrupted="interrupted: nothing else was written")


if __name__ == "__main__":
    sys.exit(main())
