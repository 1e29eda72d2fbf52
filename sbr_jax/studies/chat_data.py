"""Disjoint parts of public data sets, for a study on a chat model.

Whatever is measured comes first; then every part in turn takes prompts that none before
it has. Where two published files are known to share prompts, the part gives way to the
measurement; any other overlap with a measurement refuses the run.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbr_jax.data import TokenDataset, encode_chat, leaks, load_evalset
from sbr_jax.data.readers import find
from sbr_jax.data.records import LETTERS, ChoiceItem, Record
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
"""By what a data set of `ROLES` that has a stand-in is recognised."""

OWN_TEST = {"medqa": ("train", "test"), "gsm8k": ("train", "test")}
"""Sets that are learnt from one split and examined with another."""

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
"""Beginnings of the names of sets with one origin, which are known to share prompts."""

MADE_OF = {"refusal-auc": ("harmbench", "alpaca", "xstest")}
"""Measurements that are made of several sets."""

LARGEST_LABEL_SET = 20
"""A task with more different answers is no choice between labels."""


class Example(NamedTuple):
    """A pair, and the task it belongs to."""

    prompt: str
    answer: str
    group: str


def source_of(role: str, folder: Path) -> str:
    """The data set of a role: the first that is in the folder; others are themselves.

    The last one is a role's last resort; if it is missing too, its reader says so.
    """
    names = ROLES.get(role, (role,))
    return next((n for n in names[:-1] if _there(folder, n)), names[-1])


def _there(folder: Path, name: str) -> bool:
    try:
        find(folder, *FIRST_FILES[name])
    except UserError:
        return False
    return True


def families(name: str) -> frozenset[str]:
    """The origins of a data set or measurement.

    >>> families("hh_rlhf") == families("beavertails_unsafe_qa")
    True
    >>> sorted(families("refusal-auc") & families("alpaca")), *families("bbq")
    (['alpaca'], 'bbq')
    """
    return frozenset(map(_origin, MADE_OF.get(name, (name,))))


def _origin(name: str) -> str:
    found = (members[0] for members in FAMILIES if name.startswith(members))
    return next(found, name)


# --- reading --------------------------------------------------------------------------


def read_domain(name: str, folder: Path) -> tuple[list[Example], list[Example]]:
    """What a domain is learnt from, and its own test split (empty where it has none).

    Raises:
        UserError: whatever the reader refuses.
    """
    if name == "legalbench":
        splits = ("train", "test") if (folder / name / "test").is_dir() else ("train",)
        return [example for s in splits for example in _legalbench(folder, s)], []
    train, test = OWN_TEST.get(name, (None, None))
    learnt = _examples(name, folder, train)
    return learnt, [] if test is None else _examples(name, folder, test)


def _examples(name: str, folder: Path, split: str | None) -> list[Example]:
    pairs = load_source(name, folder, split=split)
    return [Example(pair.prompt.rstrip(), pair.answer, name) for pair in pairs]


def _legalbench(folder: Path, split: str) -> list[Example]:
    """LegalBench with the task of each row, which pairs do not tell."""
    source, found = SOURCES["legalbench"], []
    for row in source.rows(folder, split):
        path = Path(row.where)
        task = path.parent.name if split == "train" else path.name.partition(".")[0]
        pair = source.item(row)
        if pair is not None:
            found.append(Example(pair.prompt.rstrip(), pair.answer, task))
    return found


def read_probe(name: str, folder: Path) -> list[Any]:
    """The harmful behaviours of an evaluation set.

    Raises:
        UserError: if it holds none, or whatever the reader refuses.
    """
    items = [i for i in load_evalset(name, folder) if getattr(i, "harmful", False)]
    if not items:
        raise UserError(
            f"study.probe_source={name}: expected a set with harmful requests, got none"
        )
    return items


# --- questions ------------------------------------------------------------------------


def questions(test: Sequence[Example], pool: Sequence[Example]) -> list[ChoiceItem]:
    """The test examples whose answer is one of few options, as multiple choice.

    Options are the letters where all answers of a task begin with one (`B. aorta`),
    else the answers that the task has, if they are few and recur.

    Args:
        test: what is asked.
        pool: all examples of the domain, from which a task's options are read.

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


# --- parts ----------------------------------------------------------------------------


@dataclasses.dataclass
class Ledger:
    """Who has which prompts, and what had to be left out for it.

    Attributes:
        measured: prompts of each measurement.
        drop_overlaps: give way to every measurement, not to related ones only.
        sets: normalised prompts of each part so far.
        pools: the file or files that each part was drawn from.
        dropped: `{"part/other": prompts of the part's files that the other has}`,
            unless both are draws from the same files.
        repeated: prompts that a part's files hold more than once.
    """

    measured: Mapping[str, Sequence[str]]
    drop_overlaps: bool = False
    sets: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    pools: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    repeated: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._measured = {
            name: {
                leaks.normalised(text) for prompt in prompts for text in _asked(prompt)
            }
            for name, prompts in self.measured.items()
        }

    def take(
        self,
        part: str,
        source: str,
        items: Sequence[Any],
        size: int,
        *,
        examined: bool = False,
    ) -> list[Any]:
        """At most so many items whose prompts are still free, the same every time.

        Args:
            part: its name.
            source: the data set; of a split of its own, `SOURCE test`.
            items: with a ``prompt``.
            size: an upper bound.
            examined: whether this is a test set, which may share with measurements.

        Returns:
            At least one item.

        Raises:
            UserError: if none is left.
        """
        free, repeats = leaks.distinct(items)
        keys = [leaks.normalised(item.prompt) for item in free]
        banned = dict(self.sets)
        if not examined:
            banned |= {
                name: prompts
                for name, prompts in self._measured.items()
                if self.drop_overlaps
                or part in ("probe", "harmful")
                or families(name) & families(source)
            }
        if repeats:
            self.repeated[part] = repeats
        for other, prompts in banned.items():
            count = sum(key in prompts for key in keys)
            if count and self.pools.get(other) != source:
                self.dropped[f"{part}/{other}"] = count
        taken = set().union(*banned.values()) if banned else set()
        left = [i for i, key in enumerate(keys) if key not in taken]
        order = np.random.default_rng(0).permutation(len(left))[:size]
        if not len(order):
            raise UserError(
                f"expected at least one example of '{source}' for {part}, got none: "
                f"{len(items)} read, {repeats} repeated, {len(keys)} different, all of "
                "them in other sets: make those smaller, or take another data set"
            )
        chosen = [left[i] for i in order]
        self.sets[part], self.pools[part] = {keys[i] for i in chosen}, source
        return [free[i] for i in chosen]

    def check(self, examined: Sequence[str]) -> dict[str, int]:
        """Refuse parts that share prompts with a measurement or with each other.

        Args:
            examined: parts that may share with measurements.

        Returns:
            `{"part/other": 0}` for every pair that was compared.

        Raises:
            UserError: naming the pairs and their counts.
        """
        counts, names = {}, list(self.sets)
        for place, part in enumerate(names):
            others = {name: self.sets[name] for name in names[place + 1 :]}
            if part not in examined:
                others |= self._measured
            for name, prompts in others.items():
                counts[f"{part}/{name}"] = len(self.sets[part] & prompts)
        return leaks.refuse_leaks(
            counts,
            "--study.drop-overlaps leaves them out of the first of each pair, "
            "or take another data set",
        )


def _asked(prompt: str) -> tuple[str, str]:
    """A measured prompt, and the same without the options that a question ends with."""
    return prompt, prompt.partition("\nA. ")[0]


def encode(
    tokenizer: Any, examples: Sequence[Any], max_length: int, system: str | None = None
) -> TokenDataset:
    """Exchanges in the chat template, cut to a length and padded to the longest."""
    records = [Record(e.prompt, e.answer, system=system) for e in examples]
    data = encode_chat(tokenizer, records, max_length, too_long="truncate")
    # Padding that no example needs would cost as much as what it pads.
    ends = np.where(data.mask > 0, np.arange(data.length) + 1, 1)
    longest = int(ends.max(initial=1))
    return dataclasses.replace(
        data, tokens=data.tokens[:, :longest], mask=data.mask[:, :longest]
    )
