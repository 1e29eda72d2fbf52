"""Layouts of a user's files: all of them hold the same, and what is wrong is named."""

import csv
import io
import json

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
    "csv": ("a.csv", table(("question", "answer"), ROWS), "question, answer"),
    "csv, other case": ("a.csv", table(("Question", "Answer"), ROWS), "Question, Answ"),
    "tsv": (
        "a.tsv",
        table(("question", "answer"), ROWS, delimiter="\t"),
        "question, answer",
    ),
}


@pytest.mark.parametrize("ends", ["plain", "crlf", "bom"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(layout, ends, tmp_path):
    name, text, told = LAYOUTS[layout]
    if ends == "crlf":
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    coded = text.encode("utf-8-sig" if ends == "bom" else "utf-8")
    (tmp_path / name).write_bytes(coded)
    read = read_conversations(tmp_path / name, "--train")
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


@pytest.mark.parametrize("weight", [0.5, 2, -1, "x", "0", None, True, float("nan")])
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
    assert read_prompts(tmp_path / name, "--harmful") == PROMPTS[:2]


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
