"""The report of finished runs: a page, its Markdown twin, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sbr_jax import files
from sbr_jax.reporting import html
from sbr_jax.reporting.figures import Drawing, drawings, warnings
from sbr_jax.reporting.runs import Run, read_runs
from sbr_jax.reporting.tables import (
    EXTRA,
    main_table,
    tables_of,
    to_html,
    to_markdown,
    to_rich,
)
from sbr_jax.typing import UserError


def build(
    folders: Sequence[Path],
    output: Path | None = None,
    figures: Path | None = None,
    *,
    title: str | None = None,
) -> tuple[list[Run], Path]:
    """Writes the page, its Markdown twin and, if asked, the figures.

    Args:
        folders: working directories.
        output: the page; default `report.html` in the first folder.
        figures: folder for PNG files.
        title: of a single run's page; default: the folder's name.

    Returns:
        The runs read, and where the page was written.

    Raises:
        UserError: if a folder holds no finished results or is named twice, or if an
            output cannot be written or is a file that we did not make.
    """
    runs = read_runs(folders)
    output = output or Path(folders[0]) / "report.html"
    _require_writable(output, figures)
    text_output = output.with_suffix(".md")
    found = [drawings(run) for run in runs]
    pictures = {} if figures is None else _pictures(runs, found, figures)
    # If the page is ours, the text beside it is ours too.
    new = [output, text_output] if not output.exists() else [output]
    files.refuse_foreign([*new, *pictures])
    body = [html.heading(title or "Safety under sequential fine-tuning", 1)]
    for index, (run, drawn) in enumerate(zip(runs, found, strict=True)):
        if len(runs) > 1:
            body += ["<hr>" if index else "", html.heading(run.name, 1)]
        body += _section(run, drawn, f"r{index}-")
    names = title or " · ".join(run.name for run in runs)
    for path, drawing in pictures.items():
        drawing.save(path)
    files.write_text(output, html.page(f"{names}: safety report", body))
    text = "\n".join(_markdown(run, title or run.folder.name) for run in runs)
    files.write_text(text_output, f"{text}\n<!-- {files.MARK} -->\n")
    return runs, output


def print_tables(runs: Sequence[Run], output: Path) -> None:
    """Prints each run's main table and warnings, and where the page is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for run in runs:
        console.print()
        for table in to_rich(main_table(run), str(run.folder), console.width):
            console.print(table)
        for message in warnings(run):
            console.print(f"[yellow]warning:[/] {message}", highlight=False)
    console.print(f"\nreport: {output}", highlight=False, soft_wrap=True)


def _require_writable(output: Path, figures: Path | None) -> None:
    """Refuses unwritable places before anything is drawn."""
    if output.suffix.lower() == ".md":
        raise UserError(
            f"--output {output}: expected the name of the page, whose text goes beside "
            f"it as {output.name}: {output.with_suffix('.html')}"
        )
    if output.is_dir():
        raise UserError(f"--output: expected a file, got the folder {output}")
    for folder in (output.parent, *([] if figures is None else [figures])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error}") from error


def _pictures(
    runs: Sequence[Run], found: Sequence[Sequence[Drawing]], folder: Path
) -> dict[Path, Drawing]:
    """Figures by the file to write each into."""
    return {
        folder / f"{run.name + '-' if len(runs) > 1 else ''}{x.name}.png": x
        for run, drawn in zip(runs, found, strict=True)
        for x in drawn
        if x.figure is not None
    }


def _markdown(run: Run, title: str) -> str:
    """The tables of a run as Markdown."""
    parts = [f"# {title}", ""]
    parts += [f"> **Warning.** {message}\n" for message in warnings(run)]
    for title, table in tables_of(run).items():
        parts += [f"## {title}", "", to_markdown(table), ""]
        parts += [f"- {note}" for note in table.notes] + [""] * bool(table.notes)
    return "\n".join(parts).rstrip() + "\n"


def _section(run: Run, drawn: Sequence[Drawing], prefix: str) -> list[str]:
    """The part of the page about one run."""
    table = main_table(run)
    seeds = sorted({seed for method in run.methods for seed in run.seeds(method)})
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    lead = f"{' → '.join(run.domains)}, {count} ({', '.join(map(str, seeds))})."
    deviation = (
        "Mean ± standard deviation over seeds, after the last domain. "
        "A dash is a value that was not measured."
    )
    body = [
        html.paragraph(lead, "lead"),
        html.warning_box(warnings(run)),
        to_html(table),
        html.paragraph(deviation, "note"),
        html.details("What the columns mean", html.bullets(table.notes)),
        *(html.drawing_block(drawing, prefix) for drawing in drawn),
        *(html.noted_table(make(run), title) for title, make in EXTRA.items()),
    ]
    if rows := _flat(run.config):
        title = f"{len(rows)} values of config.json"
        body += [
            html.heading("Settings and versions"),
            html.details(title, html.definitions(rows)),
        ]
    return body


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of nested settings."""
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            items = value if isinstance(value, list) else [value]
            rows.append((prefix + key, ", ".join(map(str, items))))
    return rows
