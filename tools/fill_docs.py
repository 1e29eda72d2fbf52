"""Puts measured rows into the documents, with the hash of the code that decided them.

    python -m tools.fill_docs DIR... [--docs FOLDER]
    python -m tools.fill_docs DIR... --table NAME --commit COMMIT [--keep TITLE ...]

The first form fills the pages of the methods, which mark the place of a row:

    <!-- row: safe-lora -->
    <!-- end row -->

The text between is replaced by the row's cells in the report's table: a line for each
DIR that has the row, below plain fine-tuning of the same study and settings. Rows that
no DIR has stay as they are, so several calls add up, and repeating a call changes
nothing.

The second form fills a table of `docs/tables.json` (`<!-- table: NAME -->` on a page).
A line whose row one DIR has finished gets that run's cells where the report has a
column of the same title, the run's code, and a † if and only if that differs from the
table's version (:mod:`tools.provenance`).
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from sbr_jax import files
from sbr_jax.methods import VARIANTS, Hyperparameters
from sbr_jax.programs import cli
from sbr_jax.provenance.code_version import ROOT
from sbr_jax.reporting.runs import Run, read_runs
from sbr_jax.reporting.tables import (
    COLUMNS,
    Cell,
    Table,
    comparison,
    row_cells,
    to_markdown,
)
from sbr_jax.typing import UserError
from tools import provenance
from tools.markdown_tables import MARK, PageTable, page_tables
from tools.provenance import CODE, MANIFEST, Listed, Manifest

PROGRAM = "python -m tools.fill_docs"
BEGIN = r"^<!-- row: (\S+) -->\n"
BLOCK = re.compile(rf"{BEGIN}((?:(?!<!-- row).)*?)^<!-- end row -->$", re.M | re.S)
SAME = ("study", "training", "settings", "domains", "fingerprint", "attack")
"""Keys of `config.json` that two runs must share for their rows to be comparable."""
ALIASES = {"learnt": "when learnt"}
"""Column titles of pages for which the report uses another word."""
OLDER = (
    f"{MARK} Measured with older code than the other rows "
    "([what that means](../claims.md#which-code-gave-a-number))."
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Put the rows of finished runs into the documents."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Working directories of experiments.run."""
    docs: Path = ROOT / "docs"
    """Folder of the documentation."""
    table: str | None = None
    """Fill this named table instead of the pages of the methods."""
    commit: str = ""
    """Commit that its runs were made with, shortened to seven digits."""
    keep: tuple[str, ...] = ()
    """Titles of its columns to leave as they are, e.g. 's / step' of a busy machine."""


# --- the pages of the methods ---------------------------------------------------------


def row_table(
    row: str, runs: Sequence[Run], manifest: Manifest | None = None
) -> Table | None:
    """The lines of one row, each below plain fine-tuning; None if there are none.

    Rows decided by other code than the table's version are marked.
    """
    found: list[tuple[str, Run]] = []
    for run in runs:
        if run.seeds(row):
            plain = [r for r in (run, *runs) if r.seeds("plain") and _same(r, run)]
            pair = [*(("plain", r) for r in plain[:1]), (row, run)]
            found += [line for line in pair if line not in found]
    lines = []
    codes = [run.code(name) for name, run in found]
    known = [(name, code or "") for (name, _), code in zip(found, codes, strict=True)]
    older = manifest.older(known) if manifest else [False] * len(known)
    for (name, run), code, old in zip(found, codes, older, strict=True):
        label = f"`{name}` {MARK}" if old and code else f"`{name}`"
        labels = (label, _source(name, run), str(len(run.seeds(name))))
        lines.append((labels, row_cells(run, name)))
    table = comparison(("row", "run", "seeds"), lines)
    table = table.with_column(CODE, (code or "–" for code in codes))
    notes = (OLDER,) if any(MARK in label for (label, *_), _ in lines) else ()
    return dataclasses.replace(table, notes=notes) if lines else None


def _same(a: Run, b: Run) -> bool:
    same = all(a.config.get(key) == b.config.get(key) for key in SAME)
    return same and _tuned("plain", a) == _tuned("plain", b)


def _tuned(row: str, run: Run) -> dict[str, Any]:
    """Hyper-parameters of a row's method that differ from the published ones."""
    if "methods" not in run.config:  # Until 0.1 they were stored separately.
        return (run.config.get("overrides") or {}).get(row) or {}
    name = VARIANTS.get(row, (row, {}))[0].replace("-", "_")
    published = json.loads(json.dumps(dataclasses.asdict(Hyperparameters())))
    own = run.config["methods"].get(name) or {}
    known = published.get(name, {})
    return {key: x for key, x in own.items() if key in known and x != known[key]}


def _source(row: str, run: Run) -> str:
    """The folder, with the row's hyper-parameters if they are not the defaults."""
    given = ", ".join(f"{key}={value}" for key, value in _tuned(row, run).items())
    return run.name + (f" ({given})" if given else "")


def fill(
    text: str, runs: Sequence[Run], manifest: Manifest | None = None
) -> tuple[str, dict[str, bool]]:
    """Fills a page's blocks: the page, and for each row whether a run has it.

    Raises:
        UserError: for a block without an end.

    >>> fill("<!-- row: plain --> inside a sentence is no block", [])[1]
    {}
    """
    found = {}

    def filled(match: re.Match[str]) -> str:
        row, before = match.groups()
        table = row_table(row, runs, manifest)
        found[row] = table is not None
        parts = () if table is None else (to_markdown(table), *table.notes)
        body = "".join(f"\n{part}\n" for part in parts) + "\n" if parts else before
        return f"<!-- row: {row} -->\n{body}<!-- end row -->"

    text = BLOCK.sub(filled, text)
    for row in re.findall(BEGIN, text, re.M):
        if row not in found:
            raise UserError(f"row {row}: expected <!-- end row --> after it, got none")
    return text, found


def fill_pages(docs: Path, runs: Sequence[Run]) -> str:
    """Fills the pages of the methods; says which rows were filled, and which left."""
    pages = sorted((docs / "methods").glob("*.md"))
    known = (docs.parent / MANIFEST).is_file()
    manifest = provenance.read_manifest(docs.parent) if known else None
    filled = {page: fill(page.read_text("utf-8"), runs, manifest) for page in pages}
    found = {row: has for _, rows in filled.values() for row, has in rows.items()}
    if not any(found.values()):
        raise UserError(
            f"expected finished rows that a page has a block for, got {_rows(runs)}: "
            "name runs of other rows, or write '<!-- row: NAME -->' into a page"
        )
    for page, (text, _) in filled.items():
        files.write_text(page, text)
    done, left = (
        ", ".join(row for row, has in found.items() if has == wanted)
        for wanted in (True, False)
    )
    return f"filled: {done}\nleft: {left or '–'}"


def _rows(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({row for run in runs for row in run.methods}))


# --- a named table --------------------------------------------------------------------


def fill_table(
    text: str, table: PageTable, manifest: Manifest, runs: Sequence[Run], to: Arguments
) -> tuple[str, Manifest, list[str]]:
    """Fills a table's measured rows: the page, the manifest, and the names of the rows.

    Args:
        text: of the page.
        table: the named table of the page.
        manifest: the present manifest.
        runs: the measured runs.
        to: the command's arguments.

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
        new = one._replace(code=code, commit=to.commit)
        lines[number] = [new if m is one else m for m in measured]
        values = row_cells(run, one.row)
        cells = _filled(table.lines[number], table.head, values, to.keep)
        older = {m.column: manifest.is_older(m, listed.version) for m in lines[number]}
        # A mark at the row covers all its numbers.
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
    """A line with the run's cells; spread is shown where it was before."""
    keys = {column.title: column.key for column in COLUMNS}
    found = list(line)
    for place, title in enumerate(head):
        key = keys.get(ALIASES.get(title, title))
        if key is not None and title not in keep and head.index(title) == place:
            text = values[key].text()
            found[place] = text if "±" in line[place] else text.split(" ± ")[0]
    return found


def fill_named(arguments: Arguments, runs: Sequence[Run]) -> str:
    """Fills the named table on its page; says which rows were filled."""
    root = arguments.docs.parent
    manifest = provenance.read_manifest(root)
    if arguments.table not in manifest.tables:
        known = ", ".join(manifest.tables)
        raise UserError(f"table {arguments.table}: expected one of {MANIFEST}, {known}")
    if not arguments.commit:
        raise UserError("--table: expected the commit of the runs: add --commit COMMIT")
    for page, text in provenance.pages(root):
        for table in page_tables(text):
            if table.name == arguments.table:
                text, new, names = fill_table(text, table, manifest, runs, arguments)
                if names:
                    files.write_text(root / page, text)
                    files.write_text(root / MANIFEST, new.to_json())
                    return f"{page}: filled {', '.join(names)}"
    raise UserError(
        f"table {arguments.table}: expected a finished row of it, got {_rows(runs)}"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        docs = arguments.docs
        if not any((docs / "methods").glob("*.md")):
            raise UserError(
                f"--docs {docs}: expected pages in its folder methods, found none: "
                "name the folder of the documentation"
            )
        runs = read_runs(arguments.folders)
        named = arguments.table is not None
        print(fill_named(arguments, runs) if named else fill_pages(docs, runs))

    return cli.guarded(program, interrupted="interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
