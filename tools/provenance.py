"""Which code gave which published row, and which rows are older than the others.

    python -m tools.provenance                  # rows older than the code at hand
    python -m tools.provenance --record COMMIT  # add the code at hand by name

`docs/tables.json` has, for every measured line of a table marked `<!-- table: ID -->`
and for every figure, the hash of the code that decided it
(:mod:`sbr_jax.provenance.code_version`), and the version that the table shows: where
that would give a line another hash, the line bears a †. Tables that
:mod:`tools.fill_docs` writes have the hash in a column of their own.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sbr_jax import files
from sbr_jax.files import read_object
from sbr_jax.programs import cli
from sbr_jax.provenance.code_version import ROOT, code_hash
from sbr_jax.typing import UserError
from tools.markdown_tables import MARK, PageTable, page_figures, page_tables

PROGRAM = "python -m tools.provenance"
MANIFEST = "docs/tables.json"
CODE = "code"
"""Title of the column of hashes in generated tables."""
PAGES = ("README.md", "experiments/README.md", "docs/*.md", "docs/methods/*.md")
TESTBED = "testbed"
SPREAD = r"\d+\.\d+ ± \d+\.\d+"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One measurement of one line of a published table.

    Attributes:
        row: of `METHODS` or `ABLATIONS`.
        code: the hash of the code that decided it.
        study: a preset, or `attack:NAME`.
        commit: the commit it was measured with, or published with at the latest.
        column: the only column that it is about; None for all that have no own.
    """

    row: str
    code: str
    study: str = TESTBED
    commit: str = ""
    column: str | None = None


@dataclasses.dataclass(frozen=True)
class Listed:
    """A table of the manifest: the version it shows, and each line's measurements."""

    version: str
    lines: list[list[Measured]]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `docs/tables.json` says.

    Attributes:
        version: that generated tables show: a key of `codes`.
        codes: hashes by version, study and row.
        tables: by name.
    """

    version: str
    codes: dict[str, dict[str, dict[str, str]]]
    tables: dict[str, Listed]

    def is_older(self, measured: Measured, version: str) -> bool:
        """Whether a measurement was decided by other code than a version's."""
        rows = self.codes[version].get(measured.study, {})
        return measured.code != rows.get(measured.row)

    def hashes(self, row: str) -> set[str]:
        """What generated tables may have as the code of a row that is not older."""
        studies = self.codes[self.version].values()
        return {rows[row] for rows in studies if row in rows}

    def to_json(self) -> str:
        """The file's text: a line for each line of a table."""
        tables = ",\n".join(
            f'  {json.dumps(name)}: {{"version": {json.dumps(table.version)}, '
            '"lines": [\n'
            + ",\n".join(
                f"   {json.dumps([_brief(m) for m in line])}" for line in table.lines
            )
            + "\n  ]}"
            for name, table in self.tables.items()
        )
        codes = json.dumps(self.codes, indent=1).replace("\n", "\n ")
        return (
            f'{{\n "version": {json.dumps(self.version)},\n "codes": {codes},\n'
            f' "tables": {{\n{tables}\n }}\n}}\n'
        )


def _brief(measured: Measured) -> dict[str, Any]:
    """A measurement's fields that are not the defaults."""
    found = dataclasses.asdict(measured)
    fields = {field.name: field.default for field in dataclasses.fields(Measured)}
    return {name: v for name, v in found.items() if v != fields[name]}


def read_manifest(root: Path = ROOT) -> Manifest:
    """Read `docs/tables.json`."""
    found = read_object(root / MANIFEST)
    tables = {
        name: Listed(
            table["version"], [[Measured(**m) for m in line] for line in table["lines"]]
        )
        for name, table in found["tables"].items()
    }
    return Manifest(found["version"], found["codes"], tables)


def pages(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Name and text of every page that may have a measured table."""
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def problems(root: Path = ROOT) -> list[str]:
    """What is wrong with the published tables, a sentence for each place.

    A measured table without hashes, a line that the manifest has not, and a † too many
    or too few.
    """
    manifest = read_manifest(root)
    found, seen = [], []
    for page, text in pages(root):
        for table in page_tables(text):
            if not table.is_measured:
                continue
            where = f"{page}:{table.line}"
            marks = any(MARK in cell for line in table.lines for cell in line)
            if marks and MARK not in table.below:
                found.append(
                    f"{where}: expected a sentence with {MARK} below the table"
                )
            if CODE in table.head:
                found += _generated(where, table, manifest)
            elif table.name in manifest.tables:
                seen.append(table.name)
                found += _listed(where, table, manifest)
            else:
                found.append(
                    f"{where}: expected measured rows of known code: put <!-- table: "
                    f"ID --> above them and the rows' hashes into {MANIFEST}, or "
                    "<!-- no measurement --> where nothing was measured"
                )
        for number, name, below in page_figures(text):
            where = f"{page}:{number}"
            if name not in manifest.tables:
                found.append(f"{where}: expected the rows of {name} in {MANIFEST}")
                continue
            seen.append(name)
            drawn = manifest.tables[name]
            rows = [m for line in drawn.lines for m in line]
            older = any(manifest.is_older(m, drawn.version) for m in rows)
            if older != (MARK in below):
                found.append(_mismatch(where, name, older))
    found += quoted(root)
    left = set(manifest.tables) - set(seen)
    found += [f"{MANIFEST}: table {name} is on no page" for name in sorted(left)]
    twice = {name for name in seen if seen.count(name) > 1}
    return found + [f"table {name}: expected once, found twice" for name in twice]


def quoted(root: Path = ROOT) -> list[str]:
    """Numbers with a spread, quoted in sentences, that only marked rows have."""
    marked: dict[bool, set[str]] = {True: set(), False: set()}
    texts = []
    for page, text in pages(root):
        lines = text.splitlines()
        for table in page_tables(text):
            if table.is_measured:
                for number, line in enumerate(table.lines, table.line + 1):
                    lines[number] = ""
                    for cell in line:
                        older = MARK in line[0] or MARK in cell
                        marked[older].update(re.findall(SPREAD, cell))
        texts.append((page, lines))
    old = marked[True] - marked[False]
    return [
        f"{page}:{number}: {found}: only rows marked with {MARK} have it: mark it too"
        for page, lines in texts
        for number, line in enumerate(lines, 1)
        for found in re.findall(rf"{SPREAD}(?! {MARK})(?!\d)", line)
        if found in old
    ]


def _generated(where: str, table: PageTable, manifest: Manifest) -> list[str]:
    """Problems of a table with a column of hashes."""
    found, place = [], table.head.index(CODE)
    for line in table.lines:
        row, code = line[0].replace(MARK, "").strip(" `"), line[place]
        older = code not in manifest.hashes(row)
        if not re.fullmatch(r"[0-9a-f]{10}", code):
            found.append(f"{where}: {row}: expected a hash as its code, got {code!r}")
        elif older != (MARK in line[0]):
            found.append(_mismatch(where, row, older))
    return found


def _listed(where: str, table: PageTable, manifest: Manifest) -> list[str]:
    """Problems of a table of the manifest."""
    listed = manifest.tables[table.name or ""]
    if len(listed.lines) != len(table.lines):
        return [
            f"{where}: expected {len(listed.lines)} lines as {MANIFEST} has, found "
            f"{len(table.lines)}"
        ]
    found = []
    for line, measured in zip(table.lines, listed.lines, strict=True):
        for one in measured:
            if one.column is not None and one.column not in table.head:
                found.append(f"{where}: expected a column {one.column!r}")
                continue
            label = " ".join((line[0], *table.head))
            if not re.search(rf"(?<![\w:-]){re.escape(one.row)}(?![\w:-])", label):
                found.append(f"{where}: {line[0]}: expected the row {one.row}")
            older = manifest.is_older(one, listed.version)
            first = MARK in line[0]
            if one.column is None and older != first:
                found.append(_mismatch(where, line[0], older))
            if one.column is not None and not first:
                cell = line[table.head.index(one.column)]
                if older != (MARK in cell):
                    found.append(_mismatch(where, f"{line[0]}, {one.column}", older))
        if not measured and any(MARK in cell for cell in line):
            found.append(_mismatch(where, line[0], older=False))
    return found


def _mismatch(where: str, row: str, older: bool) -> str:
    if older:
        return (
            f"{where}: {row}: measured with other code than the version that the table "
            f"shows: run it again, or mark it with {MARK}"
        )
    return f"{where}: {row}: marked with {MARK}, but its code is the table's version"


def stale(root: Path = ROOT) -> list[str]:
    """For each table, the rows whose code is not the one at hand."""
    found = []
    for name, table in read_manifest(root).tables.items():
        rows = [m for line in table.lines for m in line]
        old = [m.row for m in rows if m.code != code_hash(m.row, m.study, root)]
        if old:
            found.append(f"{name}: {', '.join(dict.fromkeys(old))}")
    return found


def record(manifest: Manifest, version: str, root: Path = ROOT) -> Manifest:
    """The manifest with the hashes of the code at hand, under a name."""
    latest = manifest.codes[manifest.version]
    codes = {
        study: {row: code_hash(row, study, root) for row in rows}
        for study, rows in latest.items()
    }
    return dataclasses.replace(manifest, codes={**manifest.codes, version: codes})


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Say which published rows are older than the code."""

    record: str | None = None
    """Add the hashes of the code at hand to the file, as this version."""
    tree: Path = ROOT
    """Folder of the pages and the code."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        root = arguments.tree
        if not (root / MANIFEST).is_file():
            raise UserError(
                f"--tree {root}: expected {MANIFEST} in it, found none: name the "
                "folder of the repository"
            )
        if arguments.record is not None:
            manifest = record(read_manifest(root), arguments.record, root)
            files.write_text(root / MANIFEST, manifest.to_json())
        for line in (*stale(root), *problems(root)):
            print(line)

    return cli.guarded(program, interrupted="interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
