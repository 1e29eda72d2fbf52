"""Says which code gave which published row, and which rows are older than others.

    python -m tools.provenance                  # rows older than the code at hand
    python -m tools.provenance --record COMMIT  # add the code at hand by name

For every measured line of a table marked `<!-- table: ID -->` and for every figure,
`docs/tables.json` has the hash of the code that decided it
(:mod:`sbr_jax.provenance.code_version`). It also has the version that the table shows:
a line to which that version would give another hash bears a †. Tables that
:mod:`tools.fill_docs` writes have the hash in a column of their own.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sbr_jax import files
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli
from sbr_jax.provenance.code_version import ROOT, TESTBED, code_hash
from sbr_jax.typing import UserError
from tools.markdown_tables import MARK, PageTable, page_figures, page_tables

PROGRAM = "python -m tools.provenance"
MANIFEST = "docs/tables.json"
CODE = "code"
"""Title of the column of hashes in generated tables."""
PAGES = ("README.md", "experiments/README.md", "docs/*.md", "docs/methods/*.md")
SPREAD = r"\d+\.\d+ ± \d+\.\d+"


# --- docs/tables.json -----------------------------------------------------------------


class Measured(NamedTuple):
    """One measurement of one line of a published table.

    Attributes:
        row: of `METHODS` or `VARIANTS`.
        code: the hash of the code that decided it.
        study: a preset, or `attack:NAME`.
        commit: the commit it was measured with, or published with at the latest.
        column: the only column that it covers; None for all others.
    """

    row: str
    code: str
    study: str = TESTBED
    commit: str = ""
    column: str | None = None

    def brief(self) -> dict[str, str]:
        """The fields that differ from the defaults."""
        usual = self._field_defaults
        return {k: v for k, v in self._asdict().items() if v != usual.get(k)}


class Listed(NamedTuple):
    """A table of the manifest: the version it shows, and each line's measurements."""

    version: str
    lines: list[list[Measured]]

    @property
    def measured(self) -> list[Measured]:
        """The measurements of all lines."""
        return [one for line in self.lines for one in line]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `docs/tables.json`.

    Attributes:
        version: the version that generated tables show: a key of `codes`.
        codes: hashes by version, study and row.
        tables: by name.
    """

    version: str
    codes: dict[str, dict[str, dict[str, str]]]
    tables: dict[str, Listed]

    def is_older(self, measured: Measured, version: str) -> bool:
        """Whether other code than a version's decided a measurement."""
        rows = self.codes[version].get(measured.study, {})
        return measured.code != rows.get(measured.row)

    def older(self, lines: Sequence[tuple[str, str]]) -> list[bool]:
        """Which lines of a generated table are of another version than the table.

        The table's version is the one that most lines have, as `(row, code)`.
        """

        def known(version: str) -> list[bool]:
            studies = self.codes[version].values()
            return [any(x.get(row) == code for x in studies) for row, code in lines]

        newest = [self.version, *reversed(self.codes)]
        return [not found for found in max(map(known, newest), key=sum)]

    def to_json(self) -> str:
        """The file's text: a line for each line of a table."""
        tables = []
        for name, table in self.tables.items():
            lines = (json.dumps([one.brief() for one in x]) for x in table.lines)
            head = f'  {json.dumps(name)}: {{"version": {json.dumps(table.version)}, '
            tables.append(head + '"lines": [\n   ' + ",\n   ".join(lines) + "\n  ]}")
        codes = json.dumps(self.codes, indent=1).replace("\n", "\n ")
        return (
            f'{{\n "version": {json.dumps(self.version)},\n "codes": {codes},\n'
            ' "tables": {\n' + ",\n".join(tables) + "\n }\n}\n"
        )


def read_manifest(root: Path = ROOT) -> Manifest:
    """Reads `docs/tables.json`."""
    found = files.read_object(root / MANIFEST)
    tables = {
        name: Listed(
            table["version"], [[Measured(**m) for m in line] for line in table["lines"]]
        )
        for name, table in found["tables"].items()
    }
    return Manifest(found["version"], found["codes"], tables)


def stale(manifest: Manifest) -> list[str]:
    """For each table, the rows whose code differs from the current code, or is gone."""
    found = []
    for name, table in manifest.tables.items():
        old = [m.row for m in table.measured if m.code != _code_now(m.row, m.study)]
        if old:
            found.append(f"{name}: {', '.join(dict.fromkeys(old))}")
    return found


def _code_now(row: str, study: str) -> str | None:
    """The current hash of a row; None for one that has been removed since."""
    return code_hash(row, study) if row in METHODS or row in VARIANTS else None


def record(manifest: Manifest, version: str) -> Manifest:
    """The manifest with the current code's hashes, of every row ever recorded."""
    known: dict[str, dict[str, str]] = {}
    for recorded in manifest.codes.values():
        for study, rows in recorded.items():
            known.setdefault(study, {}).update(rows)
    codes = {
        study: {row: code for row in rows if (code := _code_now(row, study))}
        for study, rows in known.items()
    }
    return dataclasses.replace(manifest, codes={**manifest.codes, version: codes})


# --- pages ----------------------------------------------------------------------------


def pages(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Name and text of every page that may have a measured table."""
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def problems(root: Path = ROOT) -> list[str]:
    """All mistakes in the published tables, a sentence for each.

    These are a measured table without hashes, a line missing in the manifest, a † too
    many or too few, and a number in a sentence that only marked rows have.
    """
    manifest, seen, found = read_manifest(root), [], []
    for page, text in pages(root):
        for table in filter(lambda table: table.is_measured, page_tables(text)):
            where = f"{page}:{table.line}"
            marks = any(MARK in cell for line in table.lines for cell in line)
            if marks and MARK not in table.below:
                found.append(f"{where}: expected a sentence with {MARK} below it")
            if CODE in table.head:
                found += _generated(where, table, manifest)
            elif table.name in manifest.tables:
                seen.append(table.name)
                found += _listed(where, table, manifest)
            else:
                found.append(
                    f"{where}: expected measured rows of known code: put <!-- table: "
                    f"ID --> above them and the rows' hashes into {MANIFEST}, or "
                    "<!-- no measurement --> where nothing was measured, or <!-- "
                    "measured once at COMMIT --> above a trial that no preset has"
                )
        for number, name, below in page_figures(text):
            where = f"{page}:{number}"
            seen.append(name)
            if name not in manifest.tables:
                found.append(f"{where}: expected the rows of {name} in {MANIFEST}")
                continue
            drawn = manifest.tables[name]
            older = any(manifest.is_older(m, drawn.version) for m in drawn.measured)
            found += _mismatch(where, name, older, MARK in below)
    found += _quoted(root)
    left = set(manifest.tables) - set(seen)
    found += [f"{MANIFEST}: table {name} is on no page" for name in sorted(left)]
    twice = {name for name in seen if seen.count(name) > 1}
    return found + [f"table {name}: expected once, found twice" for name in twice]


def _quoted(root: Path) -> Iterator[str]:
    """Numbers with a spread that sentences quote but only marked rows have."""
    marked: dict[bool, set[str]] = {True: set(), False: set()}
    texts = []
    for page, text in pages(root):
        lines = text.splitlines()
        for table in filter(lambda table: table.is_measured, page_tables(text)):
            for number, line in enumerate(table.lines, table.line + 1):
                lines[number] = ""
                for cell in line:
                    older = MARK in line[0] or MARK in cell
                    marked[older].update(re.findall(SPREAD, cell))
        texts += [(f"{page}:{n}", line) for n, line in enumerate(lines, 1)]
    old = marked[True] - marked[False]
    for where, line in texts:
        for number in re.findall(rf"{SPREAD}(?! {MARK})(?!\d)", line):
            if number in old:
                yield (
                    f"{where}: {number}: only rows marked with {MARK} have it: mark it "
                    "too"
                )


def _generated(where: str, table: PageTable, manifest: Manifest) -> Iterator[str]:
    """Problems of a table with a column of hashes."""
    place = table.head.index(CODE)
    names = [line[0].replace(MARK, "").strip(" `") for line in table.lines]
    codes = [line[place] for line in table.lines]
    older = manifest.older(list(zip(names, codes, strict=True)))
    for name, code, old, line in zip(names, codes, older, table.lines, strict=True):
        if re.fullmatch(r"[0-9a-f]{10}", code):
            yield from _mismatch(where, name, old, MARK in line[0])
        else:
            yield f"{where}: {name}: expected a hash as its code, got {code!r}"


def _listed(where: str, table: PageTable, manifest: Manifest) -> Iterator[str]:
    """Problems of a table of the manifest."""
    listed = manifest.tables[table.name or ""]
    if len(listed.lines) != len(table.lines):
        yield (
            f"{where}: expected {len(listed.lines)} lines as {MANIFEST} has, found "
            f"{len(table.lines)}"
        )
        return
    for line, measured in zip(table.lines, listed.lines, strict=True):
        first = MARK in line[0]
        for one in measured:
            older = manifest.is_older(one, listed.version)
            label = " ".join((line[0], *table.head))
            if not re.search(rf"(?<![\w:-]){re.escape(one.row)}(?![\w:-])", label):
                yield f"{where}: {line[0]}: expected the row {one.row}"
            if one.column is None:
                yield from _mismatch(where, line[0], older, first)
            elif one.column not in table.head:
                yield f"{where}: expected a column {one.column!r}"
            elif not first:
                given = MARK in line[table.head.index(one.column)]
                yield from _mismatch(where, f"{line[0]}, {one.column}", older, given)
        if not measured:
            marked = any(MARK in cell for cell in line)
            yield from _mismatch(where, line[0], False, marked)


def _mismatch(where: str, row: str, older: bool, marked: bool) -> Iterator[str]:
    if older and not marked:
        yield (
            f"{where}: {row}: measured with other code than the version that the table "
            f"shows: run it again, or mark it with {MARK}"
        )
    if marked and not older:
        yield f"{where}: {row}: marked with {MARK}, but its code is the table's version"


# --- the command ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Say which published rows are older than the code."""

    record: str | None = None
    """Add the hashes of the code at hand to the file, as this version."""
    tree: Path = ROOT
    """Folder of the pages."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""

    def program() -> None:
        arguments = cli.parse(Arguments, args, PROGRAM)
        path = arguments.tree / MANIFEST
        if not path.is_file():
            raise UserError(
                f"--tree {arguments.tree}: expected {MANIFEST} in it, found none: name "
                "the folder of the repository"
            )
        manifest = read_manifest(arguments.tree)
        if arguments.record is not None:
            manifest = record(manifest, arguments.record)
            files.write_text(path, manifest.to_json())
        for line in (*stale(manifest), *problems(arguments.tree)):
            print(line)

    return cli.guarded(program, interrupted="interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
