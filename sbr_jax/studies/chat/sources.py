"""Data sets of a study on a chat model by role, and their multiple-choice questions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbr_jax.data import load_evalset
from sbr_jax.data.readers import find
from sbr_jax.data.records import LETTERS, ChoiceItem
from sbr_jax.data.registry import SOURCES, load_source
from sbr_jax.studies.options import ROLES
from sbr_jax.typing import UserError

FIRST_FILES = {
    "medqa": ("medqa/phrases_no_exclude_train.jsonl",),
    "codealpaca_20k": ("codealpaca/code_alpaca_20k.json",),
    "beavertails": (
        "beavertails/round0/30k/train.jsonl",
        "beavertails/30k_train.jsonl",
    ),
}
"""Files that identify those data sets of `ROLES` that have an alternative."""

OWN_TEST = {"medqa": ("train", "test"), "gsm8k": ("train", "test")}
"""Sets with a training split and a test split of their own."""

FAMILIES = (
    ("beavertails", "hh_rlhf"),
    ("advbench", "harmbench", "jailbreakbench"),
    ("safety_tuned",),
    ("alpaca",),
    ("legalbench",),
    ("medqa",),
    ("gsm8k",),
    ("mmlu",),
)
"""Name prefixes of sets with a common origin, which are known to share prompts."""

MADE_OF = {"refusal-auc": ("harmbench", "alpaca", "xstest")}
"""Measurements that use several sets."""

LARGEST_LABEL_SET = 20
"""A task with more different answers than this is not multiple choice."""


class Example(NamedTuple):
    """A prompt, its answer and its task."""

    prompt: str
    answer: str
    group: str


HUB_TWINS = {
    "alpaca": "alpaca_full",
    "codealpaca": "codealpaca_20k",
    "beavertails_unsafe_qa": "beavertails_unsafe",
}
"""Sets without a copy on the hub, and the whole data sets that they are part of."""


def source_of(role: str, folder: Path | None) -> str:
    """The data set of a role; any other name stands for itself.

    It is the first of the role's sets that the folder holds. If none is there it is the
    last, whose reader then reports what is missing. Without a folder it is the first
    that has a copy on the hub.
    """
    names = ROLES.get(role, (role,))
    if folder is None:
        there = [name for name in names if SOURCES[name].hub is not None]
        return (there or [HUB_TWINS.get(names[-1], names[-1])])[0]
    for name in names[:-1]:
        try:
            find(folder, *FIRST_FILES[name])
        except UserError:
            continue
        return name
    return names[-1]


def families(name: str) -> frozenset[str]:
    """The origins of a data set or benchmark.

    >>> families("hh_rlhf") == families("beavertails_unsafe_qa")
    True
    >>> sorted(families("refusal-auc") & families("alpaca")), *families("bbq")
    (['alpaca'], 'bbq')
    """
    return frozenset(
        next((members[0] for members in FAMILIES if part.startswith(members)), part)
        for part in MADE_OF.get(name, (name,))
    )


def read_domain(name: str, folder: Path | None) -> tuple[list[Example], list[Example]]:
    """Training examples of a domain, and its own test split, which may be empty."""
    if name == "legalbench" and folder is not None:
        splits = ("train", "test") if (folder / name / "test").is_dir() else ("train",)
        return [example for s in splits for example in _legalbench(folder, s)], []
    train, test = OWN_TEST.get(name, (None, None))
    learnt = _examples(name, folder, train)
    return learnt, [] if test is None else _examples(name, folder, test)


def _examples(name: str, folder: Path | None, split: str | None) -> list[Example]:
    pairs = load_source(name, folder, split=split)
    return [Example(pair.prompt.rstrip(), pair.answer, name) for pair in pairs]


def _legalbench(folder: Path, split: str) -> list[Example]:
    """LegalBench with the task of each row, which plain pairs do not hold."""
    source, found = SOURCES["legalbench"], []
    for row in source.rows(folder, split):
        path = Path(row.where)
        task = path.parent.name if split == "train" else path.name.partition(".")[0]
        pair = source.item(row)
        if pair is not None:
            found.append(Example(pair.prompt.rstrip(), pair.answer, task))
    return found


def read_probe(name: str, folder: Path | None) -> list[Any]:
    """The harmful behaviours of an evaluation set."""
    items = [i for i in load_evalset(name, folder) if getattr(i, "harmful", False)]
    if not items:
        raise UserError(
            f"study.probe_source={name}: expected a set with harmful requests, got none"
        )
    return items


def questions(test: Sequence[Example], pool: Sequence[Example]) -> list[ChoiceItem]:
    """Test examples whose answer is one of few options, as multiple-choice items.

    If all answers of a task begin with a letter (`B. aorta`), the letters are the
    options. Otherwise the task's answers are, if they are few and recur. They are found
    in ``pool``, all examples of the domain.

    >>> yes, no = Example("a?", "Yes", "t"), Example("b?", "No", "t")
    >>> [q.choices for q in questions([yes], [yes, no] * 2)]
    [('No', 'Yes')]
    >>> questions([Example("write", "a poem", "t")], [Example("x", "y", "t")])
    []
    """
    answers: dict[str, list[str]] = {}
    for example in pool:
        answers.setdefault(example.group, []).append(example.answer)
    options: dict[str, tuple[str, ...]] = {}
    lettered = set()
    for group, found in answers.items():
        marks = [re.match(r"([A-Z])\. ", answer) for answer in found]
        letters = [mark[1] for mark in marks if mark]
        labels = tuple(sorted(set(found)))
        if len(letters) == len(found):
            lettered.add(group)
            options[group] = tuple(LETTERS[: LETTERS.index(max(letters)) + 1])
        elif 2 <= len(labels) <= min(LARGEST_LABEL_SET, len(found) // 2):
            options[group] = labels
    items = []
    for number, (prompt, answer, group) in enumerate(test):
        right = answer[0] if group in lettered else answer
        if right in options.get(group, ()):
            place = (options[group].index(right),)
            items.append(ChoiceItem(prompt, options[group], place, str(number), group))
    return items
