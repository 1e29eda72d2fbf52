"""Training and calibration sets by name: pairs of a prompt and an answer.

Every set is read from a folder of files as their owners publish them, or, without a
folder, from the hub (:mod:`sbr_jax.data.hub`). Pairs come in the order of the file, so
that a split by position is reproducible. A file may be compressed.

| name | splits (first: default) | files below the data folder |
|---|---|---|
| `alpaca` | all | `alpaca/alpaca_5000.json` |
| `alpaca_full` | train | `alpaca/alpaca_data.json` |
| `codealpaca` | all | `codealpaca/new_codealpaca.json`, `code_alpaca_2k.json` |
| `codealpaca_20k` | train | `codealpaca/code_alpaca_20k.json` |
| `gsm8k` | train, test | `gsm8k/SPLIT.jsonl` |
| `legalbench` | train, test | `legalbench/tasks/TASK/{train.tsv, base_prompt.txt}`, \
`legalbench/test/TASK.tsv` |
| `medmcqa` | dev, train | `medmcqa/SPLIT.json` (JSON lines) |
| `medqa` | test, train, dev | `medqa/phrases_no_exclude_SPLIT.jsonl` |
| `beavertails` | 30k_train, 30k_test, 330k_train, 330k_test | \
`beavertails/round0/30k/train.jsonl` or `beavertails/30k_train.jsonl` |
| `hh_rlhf` | test, train | `hh_rlhf/harmless-base-SPLIT.jsonl` or \
`hh_rlhf/harmless-base/SPLIT.jsonl` |
| `safety_tuned_llamas` | all | `safety_only_data_Instructions.json` |
| `beavertails_unsafe` | as `beavertails` | as `beavertails` |
| `beavertails_unsafe_qa` | all | `beavertails/beavertails_unsafe_qa_525.json` |
| `beavertails_unsafe_test` | all | `beavertails/beavertails_unsafe_test_100.json` |

:data:`DOMAINS` holds the benign ones. `beavertails`, `hh_rlhf` and
`safety_tuned_llamas` pair unsafe requests with *safe* answers, for calibration; the
last three hold harmful answers, for attacks and for defences that unlearn. Whoever
reads a set outside :data:`DOMAINS` must not print it.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from sbr_jax.data.hub import hub_rows
from sbr_jax.data.legalbench import legalbench, legalbench_rows
from sbr_jax.data.readers import (
    find,
    json_rows,
    jsonl_rows,
)
from sbr_jax.data.records import LETTERS, Pair, format_choices
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """How a set is read: rows of a split, and the pair that a row holds."""

    rows: Callable[[Path, str], list[Row]]
    pair: Callable[[Row], Pair | None]
    """None leaves the row out."""
    splits: tuple[str, ...] = ("all",)
    """The first is the default."""
    role: str = "domain"
    """``"domain"``, ``"safety"`` (safe answers) or ``"harmful"`` (harmful answers)."""


# --- rows of the files ----------------------------------------------------------------


def _array(*names: str) -> Callable[[Path, str], list[Row]]:
    """The objects of JSON arrays, one file after the other."""

    def rows(folder: Path, split: str) -> list[Row]:
        del split
        return [row for name in names for row in json_rows(find(folder, name))]

    return rows


def _lines(*patterns: str) -> Callable[[Path, str], list[Row]]:
    """The objects of JSON lines; SPLIT stands for the split."""

    def rows(folder: Path, split: str) -> list[Row]:
        names = (pattern.replace("SPLIT", split) for pattern in patterns)
        return jsonl_rows(find(folder, *names))

    return rows


def _beavertails_rows(folder: Path, split: str) -> list[Row]:
    official = f"beavertails/round0/{split.replace('_', '/')}.jsonl"
    return jsonl_rows(find(folder, official, f"beavertails/{split}.jsonl"))


# --- the pair of a row ----------------------------------------------------------------


def _filled_pair(prompt: str, answer: str) -> Pair | None:
    pair = Pair(prompt.strip(), answer.strip())
    return pair if pair.prompt and pair.answer else None


def _instruction(row: Row) -> Pair | None:
    """The Alpaca layout: instruction, input, output; unanswered ones are left out."""
    parts = [row.text("instruction", empty=True).strip()]
    if "input" in row.values:
        parts.append(row.text("input", empty=True).strip())
    prompt = "\n\n".join(part for part in parts if part)
    return _filled_pair(prompt, row.text("output", empty=True))


def _gsm8k(row: Row) -> Pair:
    """Calculator marks are dropped."""
    answer = re.sub(r"<<.*?>>", "", row.text("answer")).strip()
    return Pair(row.text("question").strip(), answer)


def _medmcqa(row: Row) -> Pair:
    """The answer is `LETTER. text`; `cop` counts from 1 in this release."""
    choices = [row.text(f"op{letter}") for letter in "abcd"]
    index = row.integer("cop", 1, 4, "; a file that counts from 0 is another release")
    index -= 1
    answer = f"{LETTERS[index]}. {choices[index].strip()}"
    return Pair(format_choices(row.text("question"), choices), answer)


def _medqa(row: Row) -> Pair:
    """The answer is `LETTER. text`."""
    options = row.get("options")
    if not isinstance(options, dict) or sorted(options) != list("ABCD"):
        raise row.fault("options", "an object of the options A to D")
    letter = row.option("answer_idx", tuple("ABCD"))
    choices = row.with_cells(options=[options[name] for name in "ABCD"])
    prompt = format_choices(row.text("question"), choices.texts("options"))
    return Pair(prompt, f"{letter}. {options[letter].strip()}")


def _beavertails(row: Row, *, safe: bool) -> Pair | None:
    """Only answers with the wanted verdict."""
    if row.flag("is_safe") is not safe:
        return None
    return _filled_pair(row.text("prompt"), row.text("response", empty=True))


def _first_turn(row: Row) -> Pair | None:
    """The first request of the chosen dialogue and its answer."""
    turns = re.split(r"\n\n(Human|Assistant): ?", row.text("chosen"))
    if turns[1:4:2] != ["Human", "Assistant"]:
        raise row.fault("chosen", "a dialogue of Human and Assistant")
    return _filled_pair(turns[2], turns[4])


def _conversation(row: Row) -> Pair:
    """One request and one answer."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    cells = [turn if isinstance(turn, dict) else {} for turn in turns]
    texts = [cell.get("content") for cell in cells]
    asked = [cell.get("role") for cell in cells] == ["user", "assistant"]
    if not asked or not all(isinstance(text, str) for text in texts):
        raise row.fault("conversations", "one message of a user and one answer")
    return Pair(*(text.strip() for text in texts))


_BEAVERTAILS_SPLITS = ("30k_train", "30k_test", "330k_train", "330k_test")

SOURCES: dict[str, Source] = {
    "alpaca": Source(_array("alpaca/alpaca_5000.json"), _instruction),
    "alpaca_full": Source(
        _array("alpaca/alpaca_data.json"), _instruction, splits=("train",)
    ),
    "codealpaca": Source(
        _array("codealpaca/new_codealpaca.json", "codealpaca/code_alpaca_2k.json"),
        _instruction,
    ),
    "codealpaca_20k": Source(
        _array("codealpaca/code_alpaca_20k.json"), _instruction, splits=("train",)
    ),
    "gsm8k": Source(_lines("gsm8k/SPLIT.jsonl"), _gsm8k, splits=("train", "test")),
    "legalbench": Source(legalbench_rows, legalbench, splits=("train", "test")),
    "medmcqa": Source(_lines("medmcqa/SPLIT.json"), _medmcqa, splits=("dev", "train")),
    "medqa": Source(
        _lines("medqa/phrases_no_exclude_SPLIT.jsonl"),
        _medqa,
        splits=("test", "train", "dev"),
    ),
    "beavertails": Source(
        _beavertails_rows,
        functools.partial(_beavertails, safe=True),
        splits=_BEAVERTAILS_SPLITS,
        role="safety",
    ),
    "hh_rlhf": Source(
        _lines(
            "hh_rlhf/harmless-base-SPLIT.jsonl", "hh_rlhf/harmless-base/SPLIT.jsonl"
        ),
        _first_turn,
        splits=("test", "train"),
        role="safety",
    ),
    "safety_tuned_llamas": Source(
        _array("safety_tuned_llamas/safety_only_data_Instructions.json"),
        _instruction,
        role="safety",
    ),
    "beavertails_unsafe": Source(
        _beavertails_rows,
        functools.partial(_beavertails, safe=False),
        splits=_BEAVERTAILS_SPLITS,
        role="harmful",
    ),
    "beavertails_unsafe_qa": Source(
        _array("beavertails/beavertails_unsafe_qa_525.json"),
        _conversation,
        role="harmful",
    ),
    "beavertails_unsafe_test": Source(
        _array("beavertails/beavertails_unsafe_test_100.json"),
        _conversation,
        role="harmful",
    ),
}

DOMAINS: tuple[str, ...] = tuple(
    name for name, source in SOURCES.items() if source.role == "domain"
)
"""Benign sets: what a domain to fine-tune on may be."""


def known(kind: str, name: str, names: Iterable[str]) -> None:
    """Refuses an unknown name, with the nearest known ones.

    Raises:
      UserError: naming what is known.
    """
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


def data_folder(folder: str | Path) -> Path:
    """The data folder, which must be there.

    Raises:
      UserError: if it is not.
    """
    folder = Path(folder)
    try:
        there = folder.exists()
    except OSError:  # A name that is too long, or a folder that may not be entered.
        there = False
    if not there:
        raise UserError(
            f"expected a folder with data sets at {folder}, found none: name it with "
            "--data"
        )
    return folder


def load_source(
    name: str, folder: str | Path | None = None, *, split: str | None = None
) -> list[Pair]:
    """Reads a training or calibration set by name.

    Args:
      name: a key of :data:`SOURCES`.
      folder: the data folder that holds one folder per data set; None for the hub.
      split: one of the set's; None for its first.

    Returns:
      The pairs, at least one, in the order of the file.

    Raises:
      UserError: for an unknown name or split, a missing or damaged file, a row that is
        not as published, and a hub that cannot be reached.
    """
    known("data set", name, SOURCES)
    source = SOURCES[name]
    split = source.splits[0] if split is None else split
    known(f"split of {name}", split, source.splits)
    if folder is None:
        rows = hub_rows(name, split)
    else:
        rows = source.rows(data_folder(folder), split)
    pairs = [pair for pair in map(source.pair, rows) if pair is not None]
    if not pairs:
        raise UserError(
            f"{rows[0].where}: expected at least one pair for '{name}', got none in "
            f"{len(rows)} rows: fetch the file again"
        )
    return pairs


__all__ = [
    "DOMAINS",
    "LETTERS",
    "SOURCES",
    "Pair",
    "Source",
    "format_choices",
    "load_source",
]
