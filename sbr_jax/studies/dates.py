"""The date that chat templates are told: one for a run, on whatever day it goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "rendering"
"""Where a record has it, if the model's or the judge's template asks for the date."""


RECORDS = ("config.json", "analysis.json")
"""Files of a folder that may hold it."""


def dated(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options of a study with the date of its folder, or today's for a new one.

    Args:
        options: of the study; those without a date are left as they are.
        folder: of the run, or of its analyses.

    Raises:
        UserError: for a damaged record.
    """
    from sbr_jax.data.template import process_date
    from sbr_jax.training.records import read_json

    if options.get("date", "") is not None:
        return dict(options)
    remedy = "restore it, or choose another folder"
    records = (path for name in RECORDS if (path := folder / name).is_file())
    found = (date_of(read_json(path, remedy)) for path in records)
    return {**options, "date": next(filter(None, found), None) or process_date()}


def date_of(record: Mapping[str, Any]) -> str | None:
    """Return the date that a record holds.

    >>> date_of({"rendering": {"date": "2024-07-26"}}), date_of({"settings": {}})
    ('2024-07-26', None)
    """
    own = record.get("of")
    found = record.get(KEY, own.get(KEY) if isinstance(own, dict) else None)
    date = found.get("date") if isinstance(found, dict) else None
    return date if isinstance(date, str) else None
