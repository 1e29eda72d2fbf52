"""Reads conversations from a user's own files, in the common layouts.

    messages, conversations   turns of system, user and assistant, as many as there are
    instruction, input, output
    prompt, completion
    question, answer

The first row decides the layout of a file. Every answer of a conversation becomes an
example, with everything said before it as its prompt. Errors name file and row and
quote no text.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbr_jax.data import leaks
from sbr_jax.data._hub import Hub, hub_rows
from sbr_jax.data._rows import Row, describe, is_blank
from sbr_jax.data.readers import READERS, any_rows, rows_of, whole_text
from sbr_jax.data.records import Messages, Record, message
from sbr_jax.data.registry import EVALSETS, SOURCES, load_evalset, load_source
from sbr_jax.typing import UserError

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
"""From the names of speakers to the three that templates know."""

ANSWERS = ("output", "completion", "response", "answer")
"""Columns that hold an answer."""

PROMPTS = ("prompt", "goal", "behavior", "instruction", "question", "text")
"""Columns that hold a prompt, in upper or lower case."""

MEND = "mend the row, or remove it"

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.]+))?")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row: its examples and its location.

    Attributes:
        records: one for each answer to learn.
        where: file and row.
    """

    records: tuple[Record, ...]
    where: str

    @property
    def prompt(self) -> str:
        """The text that identifies it: everything said before its last answer."""
        return leaks.prompt_of(self.records[-1])


class Read(NamedTuple):
    """The rows of a source, and the layout they are in.

    Attributes:
        name: the source's, as tables show it.
        layout: the layout found.
        rows: the source's conversations.
    """

    name: str
    layout: str
    rows: list[Conversation]


def read_conversations(source: str | Path | Iterable[Any], option: str) -> Read:
    """Reads conversations from a file, folder, data set or Python rows.

    Args:
        source: a csv, tsv, json, jsonl or parquet file, a folder that holds one (or one
            that begins with "train"), a public data set's folder, a hub id
            (`owner/name` or `owner/name:split`); or rows: dicts with the columns of a
            layout, pairs `(prompt, answer)`, records.
        option: the option that named it, for messages.
    """
    if not isinstance(source, str | Path):
        return _given(_rows_in(source, option), option)
    path = Path(source)
    if path.is_dir() and path.name in SOURCES:
        pairs = load_source(path.name, path.parent)
        numbered = enumerate(pairs, 1)
        rows = [Conversation((Record(*p),), f"{source}, row {i}") for i, p in numbered]
        return Read(path.name, "the data set's own", rows)
    found = _rows(source, option)
    layout, rows = in_layout(found)
    name = path.stem if path.exists() else str(source).rpartition("/")[2]
    return Read(name.partition(".")[0].replace("/", "-"), layout, rows)


def _given(values: Sequence[Any], option: str) -> Read:
    if values and all(isinstance(value, Mapping) for value in values):
        return Read("examples", *in_layout(rows_of(option, values)))
    rows = []
    for number, value in enumerate(values, 1):
        where = f"{option}, row {number}"
        if isinstance(value, list | tuple) and len(value) == 2:
            row = Row(option, number, {"prompt": value[0], "answer": value[1]})
            value = Record(row.text("prompt"), row.text("answer"))
        if not isinstance(value, Record) or is_blank(value.response):
            raise UserError(
                f"{where}: expected a dict, a pair (prompt, answer) or a Record with "
                f"an answer, got {describe(value)}"
            )
        rows.append(Conversation((value,), where))
    if not rows:
        raise UserError(f"{option}: expected at least one example, got none")
    return Read("examples", "pairs", rows)


def read_prompts(
    source: str | Path | Iterable[str], option: str
) -> tuple[list[str], int]:
    """Reads distinct prompts without answers, and counts repetitions.

    Args:
        source: a text file with one prompt a line; a table with a column of `PROMPTS`;
            the folder or hub id of a data set; or the texts.
        option: the option that named it, for messages.

    Raises:
        UserError: naming the file; it never quotes a prompt.
    """
    if not isinstance(source, str | Path):
        found = []
        for number, text in enumerate(_rows_in(source, option), 1):
            if not isinstance(text, str):
                raise UserError(
                    f"{option}, row {number}: expected a prompt as text, got "
                    f"{describe(text)}"
                )
            found.append(text)
    elif (path := Path(source)).suffix == ".txt" and path.is_file():
        found = whole_text(path).split("\n")
    elif path.is_dir() and path.name in EVALSETS:
        items = load_evalset(path.name, path.parent)
        found = [i.prompt for i in items if getattr(i, "harmful", True)]
    elif path.is_dir() and path.name in SOURCES:
        found = [pair.prompt for pair in load_source(path.name, path.parent)]
    else:
        rows = _rows(source, option, also=(".txt",))
        column = _column(rows[0], PROMPTS)
        if column is None:
            raise UserError(
                f"{rows[0].where}: expected a column {', '.join(PROMPTS)}, got "
                f"{rows[0].columns()}: rename one, or write one prompt a line into a "
                ".txt file"
            )
        found = [row.text(column) for row in rows]
    texts = [text.strip() for text in found if not is_blank(text)]
    if not texts:
        raise UserError(f"{option}: expected at least one prompt, got none")
    return leaks.distinct(texts)


def _rows_in(source: Any, option: str) -> list[Any]:
    """Rows that the caller passed as objects.

    Raises:
        UserError: for a value that is neither a location nor rows.
    """
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise UserError(
            f"{option}: expected a file, a folder, a hub id, or a list of rows, got "
            f"{describe(source)}"
        )
    return list(source)


# --- where rows are -------------------------------------------------------------------


def _rows(source: str | Path, option: str, also: Sequence[str] = ()) -> list[Row]:
    """Rows of a file, folder or hub set; `also` lists further file endings."""
    path = Path(source)
    endings = ", ".join([*also, *READERS])
    if path.is_file():
        if also and not set(path.suffixes) & READERS.keys():
            raise UserError(f"{option}: expected a file ({endings}), got {path.name}")
        return any_rows(path)
    if path.is_dir():
        return any_rows(_file_of(path, option))
    hub = _HUB_ID.fullmatch(str(source))
    if hub is None or path.suffix in READERS:
        raise UserError(
            f"{option}: expected a file ({endings}), a folder with one, or a hub id "
            f"like owner/name, found no '{source}'"
        )
    remedy = f"name a file with {option}"
    return hub_rows(Hub(hub[1]), hub[1], hub[2] or "train", remedy=remedy)


def _file_of(folder: Path, option: str) -> Path:
    """The data file of a folder: its only one, or the training split's."""
    found = sorted(p for p in folder.iterdir() if set(p.suffixes) & READERS.keys())
    chosen = found if len(found) == 1 else [p for p in found if "train" in p.name]
    if len(chosen) != 1:
        shown = ", ".join(p.name for p in found[:4]) or "none"
        raise UserError(
            f"{option}: expected one data file in {folder}, or one of a training "
            f"split, found {shown}: name the file"
        )
    return chosen[0]


# --- layouts --------------------------------------------------------------------------


def in_layout(rows: Sequence[Row]) -> tuple[str, list[Conversation]]:
    """The layout that the first row shows, and all rows read in it.

    Raises:
        UserError: for the first row that is in no layout, or in a different one.

    >>> rows = rows_of("toy", [{"question": "Two and two?", "answer": "Four."}])
    >>> layout, (one,) = in_layout(rows)
    >>> layout, one.where, one.records[0].response
    ('question, answer', 'toy, row 1', 'Four.')
    """
    name, needed, read = _layout_of(rows[0])
    found = []
    for row in rows:
        where = f"{row.where}, row {row.number}"
        if missing := [column for column in needed if column not in row.values]:
            raise UserError(
                f"{where}: expected '{missing[0]}', as row {rows[0].number} has it, "
                f"got {row.columns()}: {MEND}"
            )
        found.append(Conversation(read(row, where), where))
    return name, found


Reader = Callable[[Row, str], tuple[Record, ...]]


def _layout_of(row: Row) -> tuple[str, tuple[str, ...], Reader]:
    """Name, columns and reader of the layout of a row."""
    turns = _column(row, ("messages", "conversations"))
    if turns is not None:
        return turns, (turns,), functools.partial(_turns, column=turns)
    asked = _column(row, ("instruction", "prompt", "question"))
    if asked is not None and (answer := _column(row, ANSWERS)) is not None:
        more = [name for name in ("input", "system") if name in row.values]
        read = functools.partial(_exchange, column=asked, answer=answer)
        return ", ".join([asked, *more, answer]), (asked, answer), read
    raise UserError(
        f"{row.where}, row {row.number}: expected the columns messages, conversations, "
        "or instruction, prompt or question with one of "
        f"{', '.join(ANSWERS)}; got {row.columns()}: rename them"
    )


def _column(row: Row, names: Sequence[str]) -> str | None:
    """The row's column with the first of these names, ignoring case."""
    own = {str(name).lower(): name for name in row.values}
    return next((own[name] for name in names if name in own), None)


def _exchange(row: Row, where: str, column: str, answer: str) -> tuple[Record, ...]:
    """One prompt, perhaps with an input below it, and one answer."""
    if isinstance(row.values[column], list):  # Messages up to the answer.
        said = _parsed(row.values[column], f"{where}, '{column}'")
        given = row.values[answer]
        last = given if isinstance(given, list) else [message("assistant", given)]
        return _records([*said, *_parsed(last, f"{where}, '{answer}'")], where)
    prompt, extra = row.text(column), ""
    if isinstance(row.values.get("input"), str):
        extra = row.text("input", empty=True).strip()
    system = row.text("system", empty=True) if "system" in row.values else ""
    asked = prompt if is_blank(extra) else f"{prompt}\n\n{extra}"
    said = None if is_blank(system) else system.strip()
    return (Record(asked.strip(), row.text(answer), said),)


def _turns(row: Row, where: str, column: str) -> tuple[Record, ...]:
    return _records(_parsed(row.values[column], f"{where}, '{column}'"), where)


class Turn(NamedTuple):
    """Who says what, and whether to learn it."""

    role: str
    content: str
    learnt: bool


def _parsed(value: Any, where: str) -> list[Turn]:
    """Turns as `role` and `content`, or as `from` and `value`."""
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: expected a list of messages, got {describe(value)}: {MEND}"
        )
    found = []
    for number, turn in enumerate(value, 1):
        place = f"{where}, message {number}"
        turn = turn if isinstance(turn, Mapping) else {}
        said = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(said, str) or said.lower() not in ROLES:
            known = ", ".join(dict.fromkeys(ROLES.values()))
            got = f"'{said}'" if isinstance(said, str) and len(said) < 20 else "none"
            raise UserError(f"{place}: expected a role of {known}, got {got}: {MEND}")
        if not isinstance(content, str) or is_blank(content):
            raise UserError(
                f"{place}: expected a text, got {describe(content)}: {MEND}"
            )
        weight = turn.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UserError(
                f"{place}: expected weight 0 (not learnt) or 1, got "
                f"{describe(weight)}: {MEND}"
            )
        found.append(Turn(ROLES[said.lower()], content, weight != 0))
    return found


def _records(turns: Sequence[Turn], where: str) -> tuple[Record, ...]:
    """An example for each answer, with everything said before as its prompt."""
    spoken = [turn for turn in turns if turn.role != "system"]
    late = any(t.role == "system" for t in turns[1:])
    if not spoken or spoken[0].role != "user" or late:
        raise UserError(
            f"{where}: expected at most one system message, first, and then a user's, "
            f"got {', '.join(t.role for t in turns[:4])}: {MEND}"
        )
    if spoken[-1].role != "assistant":
        raise UserError(
            f"{where}: expected a conversation that ends with an answer of the "
            f"assistant, got one that ends with the {spoken[-1].role}: {MEND}"
        )
    system = turns[0].content if turns[0].role == "system" else None
    found = []
    for place, turn in enumerate(spoken):
        if turn.role == "assistant" and turn.learnt:
            before = spoken[:place]
            said: Messages = tuple(message(t.role, t.content) for t in before)
            asked = before[0].content if len(before) == 1 else said
            found.append(Record(asked, turn.content, system))
    if not found:
        raise UserError(
            f"{where}: expected an answer to learn, got weight 0 at all of them: {MEND}"
        )
    return tuple(found)
