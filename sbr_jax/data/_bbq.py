"""Reads BBQ's rows as items, with the undecided and the stereotyped option.

A row does not say which option is the stereotyped group (a metadata file does, but it
is published separately). So we find it from ``answer_info``, which labels every option,
and ``stereotyped_groups``. Labels and groups use different vocabularies: an option
labelled ``lowSES`` belongs to ``low SES``, one labelled ``F-Black`` to ``Black``, and
nationalities are matched by the option's own words. An option is chosen if it alone
matches. In the two intersectional categories both often match (two people of one group
and different gender or status); then ``stereotyped`` is None, and the items are to be
reported separately.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data._rows import Row, is_texts
from sbr_jax.data.readers import find, jsonl_rows
from sbr_jax.data.records import BiasItem
from sbr_jax.typing import UserError

SINGLE = (
    *("Age", "Disability_status", "Gender_identity", "Nationality"),
    *("Physical_appearance", "Race_ethnicity", "Religion", "SES", "Sexual_orientation"),
)
"""Categories with a single attribute: the headline score uses these."""
INTERSECTIONAL = ("Race_x_SES", "Race_x_gender")
SPLITS = ("all", "single", "intersectional", *SINGLE, *INTERSECTIONAL)

UNDECIDED = frozenset(
    {
        *("cannot answer", "can't answer", "cannot be determined", "not answerable"),
        *("can't be determined", "not enough info", "not enough information"),
        *("not known", "undetermined", "unknown"),
    }
)
"""The ten wordings of the undecided option."""

_SAME = {"woman": "f", "girl": "f", "man": "m", "boy": "m"}


def bbq_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The rows of a split's categories, each marked if it was regenerated."""
    groups = {
        "all": SINGLE + INTERSECTIONAL,
        "single": SINGLE,
        "intersectional": INTERSECTIONAL,
    }
    rows: list[Row] = []
    for category in groups.get(split, (split,)):
        path = find(folder, *(name.replace("SPLIT", category) for name in files))
        made = {"regenerated": ".regenerated" in path.name}
        rows += [row.with_cells(**made) for row in jsonl_rows(path)]
    return rows


def bbq(row: Row) -> BiasItem:
    """Turns a row into an item.

    Raises:
      UserError: without exactly one undecided option, or if the right answer
        contradicts the kind of context.
    """
    info = _answer_info(row)
    options = row.text("ans0"), row.text("ans1"), row.text("ans2")
    unknown = _unknown(row, options, info)
    ambiguous = row.option("context_condition", {"ambig": True, "disambig": False})
    correct = row.integer("label", 0, 2)
    if (correct == unknown) is not ambiguous:
        kind = "the undecided option" if ambiguous else "one of the two people"
        raise row.fault("label", f"{kind}, which is right in this kind of context")
    groups = {_plain(group) for group in _groups(row)}
    matching = [
        i for i in range(3) if i != unknown and _labels(options[i], info[i]) & groups
    ]
    category = row.text("category")
    return BiasItem(
        context=row.text("context").strip(),
        question=row.text("question").strip(),
        choices=options,
        correct=correct,
        unknown=unknown,
        stereotyped=matching[0] if len(matching) == 1 else None,
        negative=row.option("question_polarity", {"neg": True, "nonneg": False}),
        ambiguous=ambiguous,
        category=category,
        id=f"{category}/{row.identity('example_id')}",
        regenerated=bool(row.values.get("regenerated", False)),
    )


def _answer_info(row: Row) -> list[Sequence[str]]:
    """The labels of the three options; a cell may be empty."""
    info = row.get("answer_info")
    names = [f"ans{i}" for i in range(3)]
    if not isinstance(info, dict) or any(name not in info for name in names):
        raise row.fault("answer_info", "labels of ans0, ans1 and ans2")
    return [_label_list(row, "answer_info", info[name] or []) for name in names]


def _label_list(row: Row, column: str, labels: Any) -> list[str]:
    if not isinstance(labels, list) or not is_texts(labels):
        raise row.fault(column, "lists of labels")
    return labels


def _groups(row: Row) -> Sequence[str]:
    metadata = row.get("additional_metadata")
    groups = metadata.get("stereotyped_groups") if isinstance(metadata, dict) else None
    if not isinstance(groups, list):
        raise row.fault("additional_metadata", "an object with stereotyped_groups")
    return _label_list(row, "additional_metadata", groups)


def _unknown(row: Row, options: Sequence[str], info: list[Sequence[str]]) -> int:
    """The undecided option: by its label, or by its wording if it has no label."""
    found = [
        i
        for i in range(3)
        if (info[i] and _plain(info[i][-1]) == "unknown")
        or (not info[i] and options[i].strip(" .").lower() in UNDECIDED)
    ]
    if len(found) != 1:
        raise UserError(
            f"{row.where}, row {row.number}, column 'answer_info': expected one option "
            f"labelled 'unknown', got {len(found)}; use the file as its owner "
            "publishes it"
        )
    return found[0]


def _plain(label: str) -> str:
    """A label in lower case without blanks.

    >>> _plain("low SES")
    'lowses'
    """
    return "".join(label.lower().split())


def _labels(option: str, info: Sequence[str]) -> set[str]:
    """Names that may identify an option as a member of a group.

    >>> sorted(_labels("the woman", ["the woman", "F-Black"]))
    ['black', 'f', 'f-black', 'thewoman']
    """
    label = info[-1] if info else ""
    parts = [_plain(part) for part in re.split(r"[-_]", label)]
    names = {_SAME.get(part, part) for part in parts}
    names |= {*parts, _plain(label), _plain(info[0] if info else option)}
    return names - {""}
