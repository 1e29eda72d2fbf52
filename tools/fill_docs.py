"""Measured rows for the pages of the methods.

    python -m tools.fill_docs DIR... [--docs FOLDER]

A page of `docs/methods` says where a row belongs:

    <!-- row: safe-lora -->
    <!-- end row -->

What stands between is replaced by the row's cells in the report's table: a line for
each DIR that has the row, below plain fine-tuning of the same study and settings, with
the hash of the code that decided it (:mod:`tools.provenance`). Rows that no DIR
has stay as they are: calls add up, and the same call again changes nothing.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from sbr_jax import files
from sbr_jax.programs import cli
from sbr_jax.reporting.runs import Run, read_runs
from sbr_jax.reporting.tables import Table, comparison, row_cells, to_markdown
from sbr_jax.typing import UserError
from tools.markdown_tables import MARK
from tools.provenance import CODE, MANIFEST, Manifest, read_manifest

PROGRAM = "python -m tools.fill_docs"
BEGIN = r"^<!-- row: (\S+) -->\n"
BLOCK = re.compile(rf"{BEGIN}((?:(?!<!-- row).)*?)^<!-- end row -->$", re.M | re.S)
SAME = ("study", "settings", "domains", "fingerprint", "attack")
"""What the `config.json` of two runs share where their rows can be compared."""


OLDER = (
    f"{MARK} Measured with older code than the other rows "
    "([what that means](../claims.md#which-code-gave-a-number))."
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Put the rows of finished runs into the pages of the methods."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Working directories of experiments.run."""
    docs: Path = Path(__file__).parents[1] / "docs"
    """Folder of the documentation."""


def row_table(
    row: str, runs: Sequence[Run], manifest: Manifest | None = None
) -> Table | None:
    """The lines of one row, each below plain fine-tuning; None for nothing.

    Rows of other code than the manifest's version are marked.
    """
    found: list[tuple[str, Run]] = []
    for run in runs:
        if run.seeds(row):
            plain = [r for r in (run, *runs) if r.seeds("plain") and _same(r, run)]
            pair = [*(("plain", r) for r in plain[:1]), (row, run)]
            found += [line for line in pair if line not in found]
    lines = []
    codes = [run.code(name) for name, run in found]
    for (name, run), code in zip(found, codes, strict=True):
        older = manifest and code and code not in manifest.hashes(name)
        label = f"`{name}` {MARK}" if older else f"`{name}`"
        labels = (label, _source(name, run), str(len(run.seeds(name))))
        lines.append((labels, row_cells(run, name)))
    table = comparison(("row", "run", "seeds"), lines)
    table = table.with_column(CODE, (code or "–" for code in codes))
    notes = (OLDER,) if any(MARK in label for (label, *_), _ in lines) else ()
    return dataclasses.replace(table, notes=notes) if lines else None


def _same(a: Run, b: Run) -> bool:
    return all(a.config.get(key) == b.config.get(key) for key in SAME)


def _source(row: str, run: Run) -> str:
    """The folder, with the row's hyper-parameters where they are not the defaults."""
    options = (run.config.get("overrides") or {}).get(row) or {}
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return run.folder.resolve().name + (f" ({given})" if given else "")


def fill(
    text: str, runs: Sequence[Run], manifest: Manifest | None = None
) -> tuple[str, dict[str, bool]]:
    """Fills a page's blocks: the page, and for each row whether a run has it.

    Raises:
        UserError: for a block without its end.

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


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        pages = sorted((arguments.docs / "methods").glob("*.md"))
        if not pages:
            raise UserError(
                f"--docs {arguments.docs}: expected pages in its folder methods, found "
                "none: name the folder of the documentation"
            )
        runs = read_runs(arguments.folders)
        known = (arguments.docs / Path(MANIFEST).name).is_file()
        manifest = read_manifest(arguments.docs.parent) if known else None
        filled = {page: fill(page.read_text("utf-8"), runs, manifest) for page in pages}
        found = {row: has for _, rows in filled.values() for row, has in rows.items()}
        if not any(found.values()):
            rows = ", ".join(sorted({row for run in runs for row in run.methods}))
            raise UserError(
                f"expected finished rows that a page has a block for, got {rows}: "
                "name runs of other rows, or write '<!-- row: NAME -->' into a page"
            )
        for page, (text, _) in filled.items():
            files.write_text(page, text)
        print("filled:", ", ".join(row for row, has in found.items() if has))
        print("left:", ", ".join(row for row, has in found.items() if not has) or "–")

    return cli.guarded(program, interrupted="interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
