"""Rows that were measured again, put into a published table with their provenance.

    python -m tools.fill_tables TABLE DIR... --commit COMMIT

TABLE is a name of `docs/tables.json` (`<!-- table: TABLE -->` on a page). A line whose
row one DIR has finished gets that run's cells where the report has a column of the same
title, the run's code, and a † exactly where that is not the version of the table.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from sbr_jax import files
from sbr_jax.programs import cli
from sbr_jax.provenance.code_version import ROOT
from sbr_jax.reporting.runs import Run, read_runs
from sbr_jax.reporting.tables import COLUMNS, Cell, row_cells
from sbr_jax.typing import UserError
from tools.markdown_tables import MARK, PageTable, page_tables
from tools.provenance import MANIFEST, Listed, Manifest, pages, read_manifest

PROGRAM = "python -m tools.fill_tables"
ALIASES = {"learnt": "when learnt"}
"""Titles of pages that the report has another word for."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Put measured rows into a published table."""

    table: tyro.conf.Positional[str]
    """Name of the table."""
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Working directories of runs."""
    commit: str
    """Commit that the runs were made with, shortened to seven digits."""
    keep: tuple[str, ...] = ()
    """Titles of columns to leave as they are, e.g. 's / step' of a busy machine."""
    tree: Path = ROOT
    """Folder of the pages."""


def fill(
    text: str,
    table: PageTable,
    manifest: Manifest,
    runs: Sequence[Run],
    *,
    commit: str,
    keep: Sequence[str],
) -> tuple[str, Manifest, list[str]]:
    """A page and the manifest with a table's measured rows: also their names.

    Args:
        text: of the page.
        table: of the page, named.
        manifest: as it is.
        runs: what was measured.
        commit: that the runs were made with.
        keep: titles of columns to leave as they are.

    Raises:
        UserError: for a run of unknown or mixed code.
    """
    name = table.name or ""
    page, listed = text.split("\n"), manifest.tables[name]
    lines, names = list(listed.lines), []
    for number, measured in enumerate(listed.lines):
        whole = [one for one in measured if one.column is None]
        ran = [run for run in runs for one in whole if run.seeds(one.row)]
        if not ran:
            continue
        (one,), run = whole, ran[-1]
        code = run.code(one.row)
        if code is None or code == "mixed":
            raise UserError(
                f"{run.folder}: expected the row {one.row} by one known code, got "
                f"{code or 'none'}: run it again in a new folder"
            )
        new = dataclasses.replace(one, code=code, commit=commit)
        lines[number] = [new if m is one else m for m in measured]
        cells = _filled(table.lines[number], table.head, row_cells(run, one.row), keep)
        older = {m.column: manifest.is_older(m, listed.version) for m in lines[number]}
        # A mark by the row stands for all its numbers.
        marks = {0: older.pop(None)}
        marks |= {table.head.index(c): x and not marks[0] for c, x in older.items()}
        for place, marked in marks.items():
            plain = cells[place].replace(MARK, "").strip()
            cells[place] = f"{plain} {MARK}" if marked else plain
        page[table.line + 1 + number] = f"| {' | '.join(cells)} |"
        names.append(one.row)
    tables = {**manifest.tables, name: Listed(listed.version, lines)}
    return "\n".join(page), dataclasses.replace(manifest, tables=tables), names


def _filled(
    line: Sequence[str],
    head: Sequence[str],
    values: Mapping[str, Cell],
    keep: Sequence[str],
) -> list[str]:
    """A line with the run's cells; spread is shown where it was shown before."""
    keys = {column.title: column.key for column in COLUMNS}
    found = list(line)
    for place, title in enumerate(head):
        key = keys.get(ALIASES.get(title, title))
        if key is not None and title not in keep and head.index(title) == place:
            value = values[key]
            shown = "±" in line[place]
            found[place] = dataclasses.replace(
                value, std=value.std if shown else None
            ).text()
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        root, manifest = arguments.tree, read_manifest(arguments.tree)
        if arguments.table not in manifest.tables:
            raise UserError(
                f"table {arguments.table}: expected one of {MANIFEST}, "
                f"{', '.join(manifest.tables)}"
            )
        runs = read_runs(arguments.folders)
        names: list[str] = []
        for page, text in pages(root):
            for table in page_tables(text):
                if table.name == arguments.table:
                    more = {"commit": arguments.commit, "keep": arguments.keep}
                    text, manifest, names = fill(text, table, manifest, runs, **more)
                    if names:
                        files.write_text(root / page, text)
                        files.write_text(root / MANIFEST, manifest.to_json())
                        print(f"{page}: filled {', '.join(names)}")
        if not names:
            rows = sorted({row for run in runs for row in run.methods})
            raise UserError(
                f"table {arguments.table}: expected a finished row of it, got "
                f"{', '.join(rows)}"
            )

    return cli.guarded(program, interrupted="interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
