"""Date given to chat templates: one for a run, even if it continues another day."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sbr_jax import storage

Options = TypeVar("Options")

KEY = "rendering"
"""Key of the date in a record, present if a template asks for the date."""

RECORDS = ("config.json", "analysis.json")
"""Files that may hold the date."""


def dated(options: Options, folder: Path) -> Options:
    """Sets a study's date to that of its folder, or to today for a new folder.

    Options that have no date setting, or already name a date, stay unchanged.
    """
    from sbr_jax.data.template import process_date
    from sbr_jax.training.records import read_json

    if getattr(options, "date", "") is not None:
        return options
    remedy = "restore it, or choose another folder"
    records = [path for name in RECORDS if (path := folder / name).is_file()]
    if storage.has_parts(folder):
        records += sorted((folder / storage.JOBS).glob("*/config.json"))
    found = (date_of(read_json(path, remedy)) for path in records)
    date = next(filter(None, found), None) or process_date()
    return dataclasses.replace(options, date=date)  # pyright: ignore[reportArgumentType, reportCallIssue]


def date_of(record: Mapping[str, Any]) -> str | None:
    """The date that a record holds.

    >>> date_of({"rendering": {"date": "2024-07-26"}}), date_of({"study": {}})
    ('2024-07-26', None)
    """
    own = record.get("of")
    found = record.get(KEY, own.get(KEY) if isinstance(own, dict) else None)
    date = found.get("date") if isinstance(found, dict) else None
    return date if isinstance(date, str) else None
