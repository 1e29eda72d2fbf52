"""Rows of data files; errors name file, row and column, and never quote the text.

A file may lie beside its name as ``.gz`` or ``.xz``. Rows count from 1; a table's
header is not counted, and a row of JSON lines has the number of its line.
"""

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from sbr_jax.data.rows import Row, describe
from sbr_jax.typing import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


def find(folder: Path, *names: str) -> Path:
    """The first of several files that is there, plain or compressed.

    Args:
      folder: where to look.
      names: paths below it, without ``.gz`` or ``.xz``.

    Raises:
      UserError: listing what was looked for.
    """
    for name in names:
        path = folder / name
        for found in (path, *(path.with_name(path.name + end) for end in _OPENERS)):
            if found.is_file():
                return found
    wanted = " or ".join(names)
    raise UserError(
        f"expected the data file {wanted} (plain, .gz or .xz) in {folder}, found none: "
        "put the data set there, or name another data folder with --data"
    )


def _open(path: Path) -> TextIO:
    # Some of the files begin with a byte-order mark, which utf-8-sig drops.
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; damage is one clear error that says how far it was read."""
    read = 0
    try:
        with _open(path) as file:
            for line in file:
                read += 1
                yield line
    except _DAMAGE as error:
        raise UserError(
            f"expected a whole text file in {path}, got one damaged after line {read} "
            f"({type(error).__name__}): fetch it again"
        ) from error


def _not_json(path: Path, place: str, error: json.JSONDecodeError) -> UserError:
    return UserError(
        f"expected JSON in {path}, got something else at {place} ({error.msg}): fetch "
        "the file again"
    )


def filled(where: str, rows: Iterable[Row]) -> list[Row]:
    """The rows as a list, of which there must be one.

    Raises:
      UserError: for an empty split.
    """
    rows = list(rows)
    if not rows:
        raise UserError(f"{where}: expected at least one row, got none")
    return rows


def whole_text(path: Path) -> str:
    r"""A whole text file, with ``\n`` between lines.

    Raises:
      UserError: for a damaged file.
    """
    return "".join(_lines(path)).replace("\r\n", "\n")


def json_value(path: Path) -> Any:
    """A whole JSON file.

    Raises:
      UserError: for a damaged file.
    """
    try:
        return json.loads(whole_text(path))
    except json.JSONDecodeError as error:
        raise _not_json(path, f"line {error.lineno}", error) from error


def json_rows(path: Path) -> list[Row]:
    """The objects of a JSON array.

    Raises:
      UserError: for a damaged file, another shape, and an empty array.
    """
    values = json_value(path)
    if not isinstance(values, list):
        raise UserError(
            f"expected a JSON array of objects in {path}, got {describe(values)}"
        )
    return filled(
        str(path), (_object(path, i, value) for i, value in enumerate(values, 1))
    )


def jsonl_rows(path: Path) -> list[Row]:
    """The objects of JSON lines; blank lines are passed over.

    Raises:
      UserError: for a damaged file or line, and a file without rows.
    """

    def rows() -> Iterator[Row]:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(path, f"row {number}", error) from error
            yield _object(path, number, value)

    return filled(str(path), rows())


def _object(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}, row {number}: expected an object, got {describe(value)}"
        )
    return Row(str(path), number, value)


def table_rows(
    path: Path,
    *,
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
    empty: bool = False,
) -> list[Row]:
    """The rows of a CSV or TSV file.

    Args:
      path: the file.
      delimiter: between cells.
      columns: names of the cells of a file that has no header.
      empty: whether a header without rows is fine.

    Raises:
      UserError: for a damaged file, a row with too many or too few cells, and a file
        without rows that may not be empty.
    """

    def rows() -> Iterator[Row]:
        reader = csv.reader(_lines(path), delimiter=delimiter)
        header, number = columns, 0
        try:
            for cells in reader:
                if not cells:
                    continue
                if header is None:
                    header = cells
                    continue
                number += 1
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, row {number}: expected {len(header)} cells, got "
                        f"{len(cells)}: fetch the file again"
                    )
                yield Row(str(path), number, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise UserError(
                f"{path}, row {number + 1}: expected a row of a table, got something "
                f"else ({error}): fetch the file again"
            ) from error

    return list(rows()) if empty else filled(str(path), rows())


def parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet file.

    Raises:
      UserError: if pyarrow is missing, and for a damaged or empty file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"expected pyarrow to read {path}, found none: install sbr_jax[eval], or "
            "convert the file to JSON lines"
        ) from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"expected a Parquet file in {path}, got a damaged one: fetch it again"
        ) from error
    return filled(
        str(path), (Row(str(path), i, value) for i, value in enumerate(values, 1))
    )


def any_rows(path: Path) -> list[Row]:
    """The rows of a file by its ending: csv, tsv, json, jsonl or parquet.

    Raises:
      UserError: for another ending, and whatever the reader of that ending refuses.
    """
    ending = Path(path.stem if path.suffix in _OPENERS else path.name).suffix
    if ending in (".csv", ".tsv"):
        return table_rows(path, delimiter="," if ending == ".csv" else "\t")
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".parquet": parquet_rows}
    if ending not in readers:
        raise UserError(
            f"expected a csv, tsv, json, jsonl or parquet file, got {path.name}"
        )
    return readers[ending](path)
