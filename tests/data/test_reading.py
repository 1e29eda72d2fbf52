"""One text whatever the format: tables of how it is saved, and of what is no row."""

import csv
import gzip
import io
import json
import lzma

import numpy as np
import pytest
import tiny_data as files
import tiny_rows

from sbr_jax.data import Pair, Record, leaks, load_evalset, load_source, readers
from sbr_jax.data._rows import MOST_LEVELS, Row, cleaned
from sbr_jax.data.records import (
    BiasItem,
    ChoiceItem,
    DialogueItem,
    QuestionItem,
    as_record,
    format_choices,
)
from sbr_jax.typing import UserError

# --- line ends ------------------------------------------------------------------------

TEXTS = {
    "one\r\ntwo": "one\ntwo",
    "one\rtwo": "one\ntwo",
    "one\n\r\ntwo": "one\n\ntwo",
    "\r\n one \r": "\n one \n",
    " blanks stay \t": " blanks stay \t",
    "a\u2028b\x85c\x0bd\x0ce": "a\u2028b\x85c\x0bd\x0ce",
    "a \ufeff mark": "a \ufeff mark",
    '"quoted", \\r': '"quoted", \\r',
    "\u00e9 \U0001f600 e\u0301": "\u00e9 \U0001f600 e\u0301",
}


def table(values, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerows([["t"], *([value] for value in values)])
    return out.getvalue()


def as_parquet(path, values):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"t": list(values)}), path)


def as_lines(values):
    return "\r\n".join(json.dumps({"t": v}, ensure_ascii=False) for v in values)


FORMATS = {
    "csv": lambda values: table(values, "\n"),
    "csv with CRLF": lambda values: table(values, "\r\n"),
    "tsv": lambda values: table(values, "\n"),
    "json": lambda values: json.dumps([{"t": v} for v in values]),
    "jsonl": as_lines,
    "parquet": None,
}


@pytest.mark.parametrize("way", FORMATS)
def test_a_text_is_the_same_from_every_format(way, tmp_path):
    path = tmp_path / f"a.{way.split()[0]}"
    if way == "parquet":
        as_parquet(path, TEXTS)
    else:
        path.write_text(FORMATS[way](TEXTS), newline="")
    rows = readers.any_rows(path)
    assert [row.text("t") for row in rows] == list(TEXTS.values())


def test_a_text_is_the_same_from_the_hub(monkeypatch):
    rows = [{"question": question, "answer": "4\r\n"} for question in TEXTS]
    files.fake_hub(monkeypatch, rows)
    expected = [(text.strip(), "4") for text in TEXTS.values()]
    assert load_source("gsm8k") == expected


def with_crlf(content):
    return content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


@files.needs_data
@pytest.mark.parametrize(
    ("name", "below", "split"),
    [
        ("harmbench", "harmbench", "all"),
        ("mmlu", "mmlu/test", "test"),
        ("mmlu", "mmlu/val", "val"),
    ],
)
def test_copies_with_other_line_ends_give_the_prompts_of_the_originals(
    name, below, split, tmp_path
):
    for path in (files.DATA / below).rglob("*.*"):
        copy = tmp_path / path.relative_to(files.DATA)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(with_crlf(path.read_bytes()))
    copied = load_evalset(name, tmp_path, split=split)
    # Compared by pairs, so that a difference would not be printed.
    original = load_evalset(name, files.DATA, split=split)
    same = [a == b for a, b in zip(copied, original, strict=True)]
    assert sum(same) == len(same)
    assert not sum("\r" in item.prompt for item in copied)


# --- files that are not what their name says ------------------------------------------

ROW = json.dumps({"t": "a secret sentence"}) + "\n"
DEEP, NAMED = 100_000, '{"a secret sentence": "\\u0000"}'
LEVELS = '{"t":' + "[" * MOST_LEVELS + "]" * MOST_LEVELS + "}"
SWALLOWED = '"a secret sentence,b\n'
WRONG = {
    "a.csv": [
        ("t\na secret sentence\n".encode("utf-16"), "got UTF-16 at line 1: save"),
        (
            "t\na secret sentence\n\xe9\n".encode("latin-1"),
            "got another encoding at line 3: save it as UTF-8",
        ),
        ("t\nx\na\0\n", "got a NUL byte at line 3"),
        ("t,u\n" + SWALLOWED * 50, r"row 1: .*expected after '\"'"),
        ("t,u\nx,y\n" + SWALLOWED, "row 2: .*end of data"),
        ('t,u\nx,y\nz ""a"" b",c\n', "row 2: .*without a second"),
        ("t\na,b\n", "row 1: expected 1 cell, got 2"),
    ],
    "a.jsonl": [
        (f'{ROW}{{"t": "\xe9"}}'.encode("latin-1"), "got another encoding at line 2"),
        (
            ROW + '{"t": "x\\ud800"}',
            "row 2, column 't': expected a text, got one with half of a pair",
        ),
        ('{"\\ud800": 1}', "row 1, name of a column"),
        (NAMED, "row 1, a column with a longer name: "),
        ('{"t":' * DEEP, "JSON of at most 100 levels in .*row 1, got"),
        (LEVELS, f"row 1, .*expected at most {MOST_LEVELS} levels"),
        ('{"t": ' + "9" * 5000 + "}", "row 1, got .*4300 digits"),
        ('[{"t": 1},\n{"t": 2}]', r"got a JSON array: rename it to a\.json$"),
        ('{\n "t": 1\n}', "got one over several lines: write each row on its own"),
        (gzip.compress(b"{}"), r"got a \.gz file: rename it to a\.jsonl\.gz$"),
        (lzma.compress(b"{}"), r"got a \.xz file: rename it to a\.jsonl\.xz$"),
        ('{"t": 1, "t": 1}', "row 1, got a name that stands twice in one object"),
        ('{"t\\r\\n": 1, "t\\n": 2}', "row 1: expected different names"),
    ],
    "a.json": [
        (
            '[{"t": {"u": ["x", "\\udfff"]}}]',
            "row 1, column 't', column 'u', item 2: expected a text",
        ),
        ('\n{"t": 1}\n{"t": 2}', r"got JSON lines: rename it to a\.jsonl$"),
        ('{"t": [1]}', r"got an object outside of one: write the rows as \[\{"),
        ('[{"t": 1}, ["x"]]', "row 2: expected an object, got a"),
    ],
    "A.JSONL": [('[{"t": 1}]', r"got a JSON array: rename it to A\.json$")],
    "a.jsonl.gz": [
        (gzip.compress(b" " * 2**25, 1), "more than 200-fold"),
        (gzip.compress(b"[]"), r"got a JSON array: rename it to a\.json\.gz$"),
    ],
}
CASES = [(name, *case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(
    ("name", "content", "said"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES]
)
def test_what_is_no_row_is_one_line_with_file_and_place(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said) as error:
        readers.any_rows(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_what_grows_as_text_does_is_no_bomb(tmp_path):
    rows = [{"question": "x" * 500, "answer": str(i)} for i in range(100)]
    path = files.put(tmp_path / "a.jsonl.gz", files.as_lines(rows))
    assert len(readers.jsonl_rows(path)) == 100


def test_a_damaged_gzip_says_how_far_it_was_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [{"question": f"{i}?", "answer": f"{i * 7919 % 1009}"} for i in range(9999)]
    whole = gzip.compress(files.as_lines(lines).encode())
    middle = len(whole) // 2
    for content, said in (
        (whole[:middle], r"damaged after line [1-9]\d* \(EOFError\)"),
        (b"no gzip at all", r"none of a \.gz file: rename it to a\.jsonl, or fetch"),
        (
            whole[:middle] + bytes(64) + whole[middle + 64 :],
            r"damaged after line|expected JSON",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            readers.jsonl_rows(path)


def test_plain_and_compressed_files_read_alike(tmp_path):
    text = files.as_lines(tiny_rows.GSM8K)
    plain = files.put(tmp_path / "a.jsonl", "\ufeff" + text)
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(text.encode()))
    for path in (plain, packed):
        assert [row.values for row in readers.jsonl_rows(path)] == tiny_rows.GSM8K
    assert readers.find(tmp_path, "b.jsonl", "a.jsonl") == plain


def test_a_published_table_may_hold_a_lone_quotation_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('Is it?",yes\nx,no\n')
    rows = readers.table_rows(path, columns=("q", "a"), lone_quotes=True)
    assert [row.values["q"] for row in rows] == ['Is it?"', "x"]
    with pytest.raises(UserError, match=r"row 1: .*without a second"):
        readers.table_rows(path, columns=("q", "a"))


def test_a_file_beside_its_packed_copy_is_read_once(tmp_path):
    rows = files.as_table(tiny_rows.MMLU, header=False)
    files.put(tmp_path / "mmlu/test/sums_test.csv", rows)
    files.put(tmp_path / "mmlu/test/sums_test.csv.gz", rows)
    files.put(tmp_path / "mmlu/test/sums_test.csv.bak", rows)
    assert len(load_evalset("mmlu", tmp_path)) == 1


def test_a_place_that_cannot_be_looked_at_is_one_line(tmp_path):
    with pytest.raises(UserError, match="expected a folder with data sets at"):
        load_source("gsm8k", tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=r"expected to read .*File name too long"):
        readers.any_rows(tmp_path / f"{'x' * 300}.csv")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").mkdir()
    with pytest.raises(UserError, match=r"gsm8k/train.jsonl, got something else"):
        load_source("gsm8k", tmp_path)


# --- cells and items of another type --------------------------------------------------

ABC = ("a", "b", "c")
ITEMS = {
    "letters as options": lambda: ChoiceItem("q", "abcd", (0,), "1"),
    "no options": lambda: ChoiceItem("q", (), (0,), "1"),
    "numbers as options": lambda: ChoiceItem("q", (1, 2), (0,), "1"),
    "no right one": lambda: ChoiceItem("q", ABC, (), "1"),
    "position beyond": lambda: ChoiceItem("q", ABC, (3,), "1"),
    "negative position": lambda: ChoiceItem("q", ABC, (-1,), "1"),
    "fraction": lambda: ChoiceItem("q", ABC, (1.0,), "1"),
    "truth value": lambda: ChoiceItem("q", ABC, (True,), "1"),
    "bare position": lambda: ChoiceItem("q", ABC, 1, "1"),
    "no question": lambda: ChoiceItem(None, ABC, (1,), "1"),
    "bias": lambda: BiasItem("c", "q", "abc", 0, 2, None, True, True, "k", "1"),
    "bias beyond": lambda: BiasItem("c", "q", ABC, 0, 3, None, True, True, "k", "1"),
    "answers": lambda: QuestionItem("q", "b", "yes", (), "1"),
    "turns": lambda: DialogueItem("Go.", "1"),
    "no turns": lambda: DialogueItem((), "1"),
    "response": lambda: Record("p", 7),
    "system": lambda: Record("p", "r", system=["x"]),
    "messages": lambda: Record(({"role": "user"},)),
    "no messages": lambda: Record(()),
    "two letters": lambda: as_record("ab"),
    "object": lambda: as_record({"prompt": "p", "response": "r"}),
    "letters": lambda: format_choices("q", "abcd"),
    "27 options": lambda: format_choices("q", ["x"] * 27),
    "leaks of a text": lambda: leaks.shared({"a": "Who?", "b": []}),
    "leaks without text": lambda: leaks.shared({"a": [({"role": "user"},)], "b": []}),
}


@pytest.mark.parametrize("case", ITEMS)
def test_an_item_of_other_types_is_refused(case):
    with pytest.raises(UserError, match="expected") as error:
        ITEMS[case]()
    assert "Who?" not in str(error.value)


def test_items_of_the_right_types_are_made():
    assert ChoiceItem("q", list(ABC), (np.int64(2),), "1").answer == 2
    assert as_record(["p", "r"]) == as_record(Pair("p", "r")) == Record("p", "r")


def test_a_cell_is_checked_by_type():
    row = Row("toy", 3, {"n": 2, "t": "x", "b": "False", "l": ["x", 1], "e": " "})
    assert (row.integer("n", 1, 2), row.text("t"), row.flag("b")) == (2, "x", False)
    assert (row.identity("t"), row.identity("n")) == ("x", "2")
    for check in (
        lambda: row.integer("t", 1, 2),
        lambda: row.text("n"),
        lambda: row.text("e"),
        lambda: row.flag("n"),
        lambda: row.texts("l"),
        lambda: row.option("l", ("x",)),
        *(
            lambda value=value: row.with_cells(i=value).identity("i")
            for value in (True, 8.5, [1])
        ),
    ):
        with pytest.raises(UserError, match=r"toy, row 3, column '\w': expected"):
            check()


def test_no_message_quotes_a_number_of_thousands_of_digits():
    error = Row("toy", 1, {"n": 10**4000}).fault("n", "at most 4")
    assert str(error).endswith("got a number of many digits")


def test_cleaning_is_done_once():
    for text, clean in TEXTS.items():
        assert cleaned({"a": [text, (text,)]}, "here") == {"a": [clean, [clean]]}
        assert cleaned(clean, "here") == clean
    assert cleaned([1, None, 2.5, b"x"], "here") == [1, None, 2.5, b"x"]
