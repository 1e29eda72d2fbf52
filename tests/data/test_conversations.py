"""Layouts of a user's files: all of them hold the same, and what is wrong is named."""

import csv
import io
import json
import sys
import types
import warnings

import pytest
from own_case import as_lines, messages

from sbr_jax.data.conversations import read_conversations, read_prompts
from sbr_jax.typing import UserError

ROWS = [("What is up?", "The sky."), ("What is down,\nhere?", 'The "ground", é.')]


def table(columns, rows, **options):
    out = io.StringIO()
    writer = csv.writer(out, **options)
    writer.writerows([columns, *rows])
    return out.getvalue()


def qa(**options):
    return table(("question", "answer"), ROWS, **options)


def renamed(one, two):
    return [{one: prompt, two: answer} for prompt, answer in ROWS]


def sharegpt(row):
    who = ("human", "gpt")
    said = [{"from": w, "value": t} for w, t in zip(who, row, strict=True)]
    return {"conversations": said}


def asked(row):
    return {"role": "user", "content": row[0]}


LAYOUTS = {
    "messages": ("a.jsonl", as_lines(messages(*row) for row in ROWS), "messages"),
    "sharegpt": ("a.json", json.dumps([*map(sharegpt, ROWS)]), "conversations"),
    "alpaca": (
        "a.json",
        json.dumps([{**row, "input": ""} for row in renamed("instruction", "output")]),
        "instruction, input, output",
    ),
    "instruction, response": (
        "a.jsonl",
        as_lines(renamed("instruction", "response")),
        "instruction, response",
    ),
    "prompt, completion": (
        "a.jsonl",
        as_lines(renamed("prompt", "completion")),
        "prompt, completion",
    ),
    "prompt as messages": (
        "a.jsonl",
        as_lines({"prompt": [asked(row)], "completion": row[1]} for row in ROWS),
        "prompt, completion",
    ),
    "csv": ("a.csv", qa(), "question, answer"),
    "csv, other case": ("a.csv", table(("Question", "Answer"), ROWS), "Question, Answ"),
    **{
        f"csv of {name}": ("a.csv", qa(delimiter=mark), "question, answer")
        for name, mark in {"tabs": "\t", "bars": "|", "semicolons": ";"}.items()
    },
    "tsv": ("a.tsv", qa(delimiter="\t"), "question, answer"),
}


@pytest.mark.parametrize("ends", ["plain", "crlf", "bom"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(layout, ends, tmp_path):
    name, text, told = LAYOUTS[layout]
    if ends == "crlf":
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    coded = text.encode("utf-8-sig" if ends == "bom" else "utf-8")
    (tmp_path / name).write_bytes(coded)
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        read = read_conversations(tmp_path / name, "--train")
    parted = [layout.removeprefix("csv of ")] if "csv of" in layout else []
    assert [str(w.message).rpartition(" ")[2] for w in told_of] == parted
    found = [(c.records[0].prompt, c.records[0].response) for c in read.rows]
    assert found == ROWS
    assert read.layout.startswith(told)
    assert read.rows[0].where.endswith(f"{name}, row 1")


def test_a_folder_or_rows_in_memory_read_alike(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    rows = [messages(*row) for row in ROWS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet")
    expected = [c.records for c in read_conversations(tmp_path, "--train").rows]
    for given in (rows, ROWS):
        assert [c.records for c in read_conversations(given, "x").rows] == expected


class Rows(list):
    """Stands for a table of pyarrow, or a data set of the hub."""

    def to_pylist(self):
        return list(self)


class Damaged(Exception):
    """Stands for pyarrow's errors, and those of datasets."""


def pretend(monkeypatch, name, inner, **functions):
    """Puts a module in the place of an extra that is not installed."""
    module = types.ModuleType(name)
    below = types.ModuleType(f"{name}.{inner}")
    module.ArrowException = below.DatasetsError = Damaged
    for function, does in functions.items():
        setattr(module, function, does)
        setattr(below, function, does)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, f"{name}.{inner}", below)


def test_a_parquet_file_is_read_as_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "part.parquet"
    path.write_bytes(b"PAR1")
    given = {path: Rows(messages(*row) for row in ROWS)}
    pretend(monkeypatch, "pyarrow", "parquet", read_table=lambda p: given[p])
    found = read_conversations(path, "--train")
    assert [(c.records[0].prompt, c.records[0].response) for c in found.rows] == ROWS
    assert found.rows[0].where.endswith("part.parquet, row 1")

    def damaged(path):
        raise Damaged

    pretend(monkeypatch, "pyarrow", "parquet", read_table=damaged)
    with pytest.raises(
        UserError, match=r"a Parquet file in .*part\.parquet, got a dam"
    ):
        read_conversations(path, "--train")


@pytest.mark.parametrize(
    ("name", "split"), [("me/my-rows", "train"), ("me/my-rows:test", "test")]
)
def test_a_hub_id_is_fetched_through_datasets(name, split, monkeypatch):
    asked = []

    def load(path, config, *, data_dir, split):
        asked.append((path, config, data_dir, split))
        return Rows({"question": q, "answer": a} for q, a in ROWS)

    pretend(monkeypatch, "datasets", "exceptions", load_dataset=load)
    found = read_conversations(name, "--train")
    assert asked == [("me/my-rows", None, None, split)]
    assert (found.name, found.layout) == (name.partition("/")[2], "question, answer")
    assert [(c.records[0].prompt, c.records[0].response) for c in found.rows] == ROWS
    assert found.rows[0].where == f"me/my-rows ({split}), row 1"
    assert read_prompts(name, "--harmful")[0] == [q for q, _ in ROWS]


@pytest.mark.parametrize("error", [OSError, ValueError, Damaged])
@pytest.mark.parametrize("option", ["--train", "--harmful"])
def test_what_the_hub_refuses_names_the_option_that_asked(error, option, monkeypatch):
    def load(*args, **options):
        raise error("no such thing")

    pretend(monkeypatch, "datasets", "exceptions", load_dataset=load)
    read = read_prompts if option == "--harmful" else read_conversations
    expected = f"me/rows from the hub, got {error.__name__}.*name a file with {option}$"
    with pytest.raises(UserError, match=expected):
        read("me/rows", option)


def test_without_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"sbr_jax\[eval\], or name a file with"):
        read_conversations("me/rows", "--train")


def test_every_answer_is_learnt_behind_what_was_said_before():
    row = messages("one", "two", "three", "four")
    row["messages"].insert(0, {"role": "system", "content": "Count."})
    (found,) = read_conversations([row], "x").rows
    contexts = [[m["content"] for m in r.context] for r in found.records]
    assert contexts == [["Count.", "one"], ["Count.", "one", "two", "three"]]
    assert [record.response for record in found.records] == ["two", "four"]
    row["messages"][2]["weight"] = 0
    (found,) = read_conversations([row], "x").rows
    assert [record.response for record in found.records] == ["four"]


TURNS = {
    "no list": "text",
    "empty": [],
    "no role": [{"content": "a"}],
    "another role": [{"role": "tool", "content": "a"}],
    "null answer": [asked(ROWS[0]), {"role": "assistant", "content": None}],
    "blank answer": [asked(ROWS[0]), {"role": "assistant", "content": " \n"}],
    "invisible answer": [asked(ROWS[0]), {"role": "assistant", "content": "\u200b"}],
    "ends with the user": [*messages(*ROWS[0])["messages"], asked(ROWS[1])],
    "begins with an answer": messages(*ROWS[0])["messages"][::-1],
    "late system": [
        *messages(*ROWS[0])["messages"],
        {"role": "system", "content": "a"},
    ],
    "nothing to learn": [
        asked(ROWS[0]),
        {"role": "assistant", "content": "a", "weight": 0},
    ],
    "a list as content": [{"role": "user", "content": [{"text": "a"}]}],
}


@pytest.mark.parametrize("weight", [0.5, 2, "0", None, True, float("nan")])
def test_a_weight_is_none_or_whole(weight):
    row = messages(*ROWS[0])
    row["messages"][-1]["weight"] = weight
    with pytest.raises(UserError, match=r"row 1.*weight 0 \(not learnt\) or 1"):
        read_conversations([row], "toy")


@pytest.mark.parametrize("kind", TURNS)
def test_a_wrong_conversation_is_named_by_its_row_and_not_quoted(kind):
    rows = [messages(*ROWS[0]), {"messages": TURNS[kind]}]
    with pytest.raises(UserError, match=r"toy, row 2.*expected .*, got ") as found:
        read_conversations(rows, "toy")
    assert not {"sky", "ground", "What"} & set(str(found.value).split())


@pytest.mark.parametrize("read", [read_conversations, read_prompts])
def test_a_text_without_blanks_is_not_shown_as_a_column(read, tmp_path):
    (tmp_path / "a.csv").write_text("天为什么是蓝的,id\nb,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="got id, 1 longer name: rename"):
        read(tmp_path / "a.csv", "toy")


PROMPTS = ["do this", "do that, please", "DO this!"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\n".join(["", *PROMPTS, ""])),
        ("a.csv", table(("id", "Goal"), enumerate(PROMPTS))),
        ("a.jsonl", as_lines({"prompt": p} for p in PROMPTS)),
        ("a.json", json.dumps([{"Behavior": p} for p in PROMPTS])),
    ],
)
def test_prompts_are_read_once_each(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, "--harmful")[0] == PROMPTS[:2]


UNSEEN = ["\u200b", "\u200f", "\ufeff", "\u3164", "\u034f\ufe0f", "\u2800 "]
JOINED = ["\u0645\u06cc\u200c\u0631\u0648\u0645", "\u0915\u094d\u200d", "\u2764\ufe0f"]
"""Persian, Hindi and an emoji, which need such characters."""


@pytest.mark.parametrize("unseen", UNSEEN)
def test_what_shows_nothing_counts_as_nothing(unseen, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join([*JOINED, unseen]), encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt", "--harmful") == (JOINED, 0)
    row = {"instruction": "a", "input": unseen, "output": "b", "system": unseen}
    (found,) = read_conversations([row], "x").rows[0].records
    assert (found.prompt, found.system) == ("a", None)
    with pytest.raises(UserError, match=r"row 1, column 'output'.*a blank text"):
        read_conversations([{**row, "output": unseen}], "x")


@pytest.mark.parametrize("text", JOINED)
def test_characters_that_join_letters_stay(text):
    row = {"instruction": text, "input": text, "output": text, "system": text}
    (found,) = read_conversations([row], "x").rows[0].records
    assert (found.prompt, found.system) == (f"{text}\n\n{text}", text)
    assert found.response == text


def test_prompts_without_a_column_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,words\n1,do this\n")
    with pytest.raises(UserError, match=r"a\.csv: expected a column .*, got id, words"):
        read_prompts(tmp_path / "a.csv", "--harmful")
    with pytest.raises(UserError, match=r"--harmful: expected .*got none"):
        read_prompts([" "], "--harmful")


def test_a_place_without_a_file_is_refused(tmp_path):
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"found a\.jsonl, b\.csv: name the file"):
        read_conversations(tmp_path, "--train")
    with pytest.raises(UserError, match=r"found no 'none\.jsonl'"):
        read_conversations("none.jsonl", "--train")
    (tmp_path / "a.doc").write_text("do this")
    for place in ("none.txt", tmp_path / "a.doc"):
        with pytest.raises(UserError, match=r"--harmful: expected a file \(\.txt, \.c"):
            read_prompts(place, "--harmful")


@pytest.mark.parametrize("source", [5, None, 2.5, b"text", {"prompt": "a"}, object()])
@pytest.mark.parametrize("read", [read_conversations, read_prompts])
def test_what_holds_no_rows_is_refused(read, source):
    with pytest.raises(UserError, match="x: expected a file, a folder, a hub id, or a"):
        read(source, "x")


@pytest.mark.parametrize("row", [5, None, ["a"], {"prompt": "a"}])
def test_a_prompt_that_is_no_text_is_refused(row):
    with pytest.raises(UserError, match="x, row 2: expected a prompt as text, got"):
        read_prompts(["do this", row], "x")
