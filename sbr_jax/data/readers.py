"""Reads rows of data files; errors name file, row and column but quote no text.

A file may be compressed under its name plus ``.gz`` or ``.xz``. Files are UTF-8; a
byte-order mark is dropped, and every text is cleaned
(:func:`sbr_jax.data._rows.cleaned`). Rows count from 1; a table's header is not
counted, and a row of JSON lines has its line's number. Every reader raises UserError
for a damaged file, and for one without rows.
"""

import codecs
import csv
import gzip
import importlib
import io
import itertools
import lzma
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data._rows import Row, cleaned, describe
from sbr_jax.errors import counted
from sbr_jax.files import parse_json
from sbr_jax.typing import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_MARKS = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\0"}
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)

MOST_GROWTH = 200
"""Most growth of a compressed text; real ones grow 3 to 20-fold."""
_ALWAYS_FINE = 2**24
_PIECE = 2**20


def find(folder: Path, *names: str) -> Path:
    """The first of several files that exists, plain or compressed.

    Names are paths below the folder, without ``.gz`` or ``.xz``.
    """
    for name in names:
        if found := find_all(folder, name):
            return found[0]
    raise UserError(
        f"expected the data file {' or '.join(names)} (plain, .gz or .xz) in {folder}, "
        "found none: put the data set there, or name another data folder"
    )


def find_all(folder: Path, pattern: str) -> list[Path]:
    """All files that match, sorted; if one exists twice, the uncompressed.

    The pattern is a path below the folder, possibly with ``*``, without ``.gz`` or
    ``.xz``.

    Raises:
      UserError: for a match that is not a file, or that cannot be inspected.
    """
    found: dict[str, Path] = {}
    try:
        for end in ("", *_OPENERS):
            for path in folder.glob(pattern + end):
                if not path.is_file():
                    raise UserError(f"expected a file at {path}, got something else")
                found.setdefault(str(path).removesuffix(end), path)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [found[name] for name in sorted(found)]


def _unreadable(path: Path, error: OSError) -> UserError:
    why = error.strerror or type(error).__name__
    return UserError(f"expected to read {path}, got '{why}': check path and rights")


def _content(path: Path) -> bytes:
    """A file's bytes, decompressed; an error says how far it could be read."""
    opener, pieces, size = _OPENERS.get(path.suffix, open), [], 0
    try:
        most = max(_ALWAYS_FINE, MOST_GROWTH * path.stat().st_size)
        with opener(path, "rb") as file:
            while piece := file.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if opener is not open and size > most:
                    raise UserError(
                        f"expected a compressed text in {path}, got one that grows "
                        f"more than {MOST_GROWTH}-fold: fetch it again"
                    )
    except _DAMAGE as error:
        if not pieces and not _packed(path):
            raise UserError(
                f"expected a compressed text in {path}, got none of a {path.suffix} "
                f"file: rename it to {path.stem}, or fetch it again"
            ) from error
        lines = sum(piece.count(b"\n") for piece in pieces)
        raise UserError(
            f"expected a whole text file in {path}, got one damaged after line {lines} "
            f"({type(error).__name__}): fetch it again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return b"".join(pieces)


def _packed(path: Path) -> str | None:
    """The ending that a compressed file should have, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((end for end, mark in _MARKS.items() if start.startswith(mark)), None)


def whole_text(path: Path) -> str:
    r"""A whole text file in UTF-8, with lines separated by ``\n``."""
    content = _content(path)
    if path.suffix not in _OPENERS and (end := _packed(path)):
        raise UserError(
            f"expected text in {path}, got a {end} file: rename it to {path.name}{end}"
        )
    place, got = content.find(b"\0"), "a NUL byte"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        place, got = 0, "UTF-16"
    if place < 0:
        try:
            text = content.decode("utf-8-sig")
            return text.replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            place, got = error.start, "another encoding"
    line = content.count(b"\n", 0, place) + 1
    raise UserError(
        f"expected text in UTF-8 in {path}, got {got} at line {line}: save it as "
        "UTF-8, or fetch it again"
    )


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, split at line feeds only."""
    return iter(io.StringIO(text, newline="\n"))


def filled(where: str, rows: Iterable[Row]) -> list[Row]:
    """The rows as a list, which must not be empty."""
    rows = list(rows)
    if not rows:
        raise UserError(f"{where}: expected at least one row, got none")
    return rows


def rows_of(where: Path | str, values: Iterable[Any]) -> list[Row]:
    """Rows of a set's values, numbered from 1; there must be at least one."""
    numbered = enumerate(values, 1)
    return filled(str(where), (Row.read(str(where), i, value) for i, value in numbered))


def json_value(path: Path) -> Any:
    """A whole JSON file."""
    return cleaned(parse_json(whole_text(path), str(path), unique=True), str(path))


def json_rows(path: Path) -> list[Row]:
    """The objects of a JSON array."""
    values = parse_json(whole_text(path), str(path), unique=True)
    if not isinstance(values, list):
        raise UserError(
            f"expected a JSON array of objects in {path}, got {describe(values)}"
        )
    return rows_of(path, values)


def jsonl_rows(path: Path) -> list[Row]:
    """The objects of JSON lines; blank lines are skipped."""
    text = whole_text(path)
    if text.lstrip().startswith("["):
        raise UserError(
            f"expected one JSON object a line in {path}, got a JSON array: write one "
            "object a line"
        )
    lines = ((i, line) for i, line in enumerate(_lines(text), 1) if line.strip())
    parsed = ((i, parse_json(t, f"{path}, row {i}", unique=True)) for i, t in lines)
    return filled(str(path), (Row.read(str(path), i, value) for i, value in parsed))


def table_rows(
    path: Path,
    *,
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
    needed: Sequence[str] | None = None,
    lone_quotes: bool = False,
) -> list[Row]:
    """The rows of a CSV or TSV file.

    Args:
      path: the file.
      delimiter: between cells.
      columns: names of the cells, for a file without a header.
      needed: columns that the header must have; then the file may have no rows.
      lone_quotes: whether a cell that does not begin with a quotation mark may hold a
        single unpaired one, as in some published files.

    Raises:
      UserError: for a row with too many or too few cells or an unclosed quotation mark,
        a header with a duplicate name, and a file without rows or without a needed
        column.
    """
    records = _records(path, delimiter, lone_quotes, first=int(columns is not None))
    names = next(records, None) if columns is None else columns
    if names is None:
        raise UserError(f"{path}: expected a header and rows, got an empty file")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected columns of different names, got one twice")
    for name in needed or ():
        Row(str(path), 0, dict.fromkeys(names)).get(name)
    rows = []
    for number, cells in enumerate(records, 1):
        if len(cells) != len(names):
            raise UserError(
                f"{path}, row {number}: expected {counted(len(names), 'cell')}, got "
                f"{len(cells)}: fetch the file again, or put cells that hold "
                f"{delimiter!r} in quotation marks"
            )
        values = dict(zip(names, cells, strict=True))
        rows.append(Row.read(str(path), number, values))
    return rows if needed is not None else filled(str(path), rows)


def _records(
    path: Path, delimiter: str, lone_quotes: bool, first: int
) -> Iterator[list[str]]:
    """The cells of every row that is not blank; rows count from ``first``."""
    quotes, number = 0, first

    def counted() -> Iterator[str]:
        nonlocal quotes
        for line in _lines(whole_text(path)):
            quotes += line.count('"')
            yield line

    try:
        for cells in csv.reader(counted(), delimiter=delimiter, strict=True):
            if quotes % 2 and not lone_quotes:
                raise csv.Error("a quotation mark without a second one")
            quotes = 0
            if cells:
                yield cells
                number += 1
    except csv.Error as error:
        raise UserError(
            f"{path}, row {number}: expected a row of a table, got something else "
            f"({error}): fetch the file again"
        ) from error


def parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet file; needs pyarrow."""
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"expected pyarrow to read {path}, found none: install sbr_jax[eval], or "
            "convert the file to JSON lines"
        ) from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"expected a Parquet file in {path}, got a damaged one: fetch it again"
        ) from error
    return rows_of(path, values)


DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""Delimiters that .csv files may use instead of commas."""


def csv_rows(path: Path) -> list[Row]:
    """The rows of a user's CSV file, whose first line shows the delimiter."""
    header = next((line for line in _lines(whole_text(path)) if line.strip()), "")
    found = max(DELIMITERS, key=header.count)
    if "," in header or found not in header:
        return table_rows(path)
    warnings.warn(
        f"{path}: its first line has no comma, so its cells are taken to be parted by "
        f"{DELIMITERS[found]}",
        stacklevel=2,
    )
    return table_rows(path, delimiter=found)


READERS = {
    ".csv": csv_rows,
    ".tsv": lambda path: table_rows(path, delimiter="\t"),
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
}


def _refuse_other_json(path: Path, ending: str) -> None:
    """Refuses JSON in the other form than the file's ending names."""
    wanted = {".json": "a JSON array of objects", ".jsonl": "one JSON object a line"}
    if ending not in wanted:
        return
    written = (line.strip() for line in _lines(whole_text(path)) if line.strip())
    first, second = [*itertools.islice(written, 2), "", ""][:2]
    at = path.name.lower().rindex(ending)
    before, after = path.name[:at], path.name[at + len(ending) :]
    lines, array = (f"rename it to {before}{x}{after}" for x in (".jsonl", ".json"))
    listed, apart = "write the rows as [{...}, {...}]", "write each row on its own line"
    for name, is_so, got, remedy in (
        (".json", first[:1] == second[:1] == "{", "JSON lines", lines),
        (".json", first.startswith("{"), "an object outside of one", listed),
        (".jsonl", first.startswith("["), "a JSON array", array),
        (".jsonl", first == "{", "one over several lines", apart),
    ):
        if ending == name and is_so:
            raise UserError(f"expected {wanted[name]} in {path}, got {got}: {remedy}")


def any_rows(path: Path) -> list[Row]:
    """The rows of a file, read by its ending: csv, tsv, json, jsonl or parquet."""
    inner = path.stem if path.suffix in _OPENERS else path.name
    ending = Path(inner).suffix.lower()
    if ending not in READERS:
        raise UserError(
            f"expected a csv, tsv, json, jsonl or parquet file, got {path.name}"
        )
    _refuse_other_json(path, ending)
    return READERS[ending](path)
