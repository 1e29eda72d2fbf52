"""Training and calibration sets: every layout, every mistake, and the real counts.

Of real rows only shapes and counts are looked at, never text.
"""

import gzip
import sys

import pytest
import tiny_data as files

from sbr_jax.data import hub, load_source, readers, sources
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError

DATA = files.DATA
# Instructions without an answer and dialogues with an empty first one are left out.
COUNTS = {
    ("alpaca", "all"): 4998,
    ("beavertails_unsafe_qa", "all"): 524,
    ("beavertails_unsafe_test", "all"): 100,
    ("codealpaca", "all"): 6550,
    ("gsm8k", "test"): 1319,
    ("gsm8k", "train"): 7473,
    ("hh_rlhf", "test"): 2309,
    ("legalbench", "test"): 27096,
    ("legalbench", "train"): 835,
    ("medmcqa", "dev"): 4183,
    ("medqa", "test"): 1273,
    ("safety_tuned_llamas", "all"): 2483,
}
TWO = [("Say\n\nhello", "hello"), ("Count.", "1, 2")]
CHOICES = "A. w\nB. x\nC. y\nD. z\nAnswer:"
PAIRS = {
    "alpaca": TWO,
    "alpaca_full": TWO,
    "beavertails": [("May I?", "Better not.")],
    "beavertails_unsafe": [("May I?", "Go on.")],
    "beavertails_unsafe_qa": [("May I?", "Go on.")],
    "beavertails_unsafe_test": [("May I?", "Go on.")],
    "codealpaca": TWO,
    "codealpaca_20k": TWO,
    "gsm8k": [("2 + 2?", "2 + 2 = 4\n#### 4"), ("3 + 3?", "#### 6")],
    "hh_rlhf": [("May I?", "No.")],
    "legalbench": [("Is it?\n\nQ: b\\1\nA:", "yes")],
    "medmcqa": [(f"Which?\n{CHOICES}", "A. w"), (f"And?\n{CHOICES}", "D. z")],
    "medqa": [(f"Which?\n{CHOICES}", "B. x")],
    "safety_tuned_llamas": TWO,
}
HUB_ROWS = {
    "alpaca_full": files.INSTRUCTIONS,
    "beavertails": files.BEAVERTAILS,
    "beavertails_unsafe": files.BEAVERTAILS,
    "codealpaca_20k": files.INSTRUCTIONS,
    "gsm8k": files.GSM8K,
    "hh_rlhf": files.DIALOGUES,
    # The hub's copy counts the right option from 0.
    "medmcqa": [row | {"cop": row["cop"] - 1} for row in files.MEDMCQA],
    "medqa": files.MEDQA,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.sources(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", sorted(sources.SOURCES))
def test_every_set_is_read_from_its_published_files(name, folder):
    assert load_source(name, folder) == PAIRS[name]
    for split in sources.SOURCES[name].splits:
        assert load_source(name, folder, split=split)


def test_splits_differ_where_the_files_do(folder):
    assert load_source("gsm8k", folder, split="test") == PAIRS["gsm8k"][1:]
    found = load_source("legalbench", folder, split="test")
    assert found == [("d", "maybe"), ("Is it?\n\nQ: c\nA:", "no")]


def test_what_may_be_a_domain_has_no_harmful_answers():
    roles = {name: source.role for name, source in sources.SOURCES.items()}
    assert set(roles.values()) == {"domain", "safety", "harmful"}
    assert not [name for name in sources.DOMAINS if "unsafe" in name]
    assert {name for name in roles if "unsafe" in name} == {
        name for name, role in roles.items() if role == "harmful"
    }


@pytest.mark.parametrize("key", sorted(COUNTS), ids="-".join)
def test_counts_of_the_real_files(key):
    name, split = key
    if not (DATA / name.split("_unsafe")[0]).is_dir():
        pytest.skip("no real data beside us")
    pairs = load_source(name, DATA, split=split)
    assert len(pairs) == COUNTS[key]
    assert (
        sum(not pair.prompt.strip() or not pair.answer.strip() for pair in pairs) == 0
    )
    assert sum("{{" in pair.prompt for pair in pairs if name == "legalbench") == 0


# --- the hub --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(hub.HUB) & set(sources.SOURCES)))
def test_the_hub_gives_the_same_pairs_as_the_files(name, folder, monkeypatch):
    asked = files.fake_hub(monkeypatch, HUB_ROWS[name])
    assert load_source(name) == load_source(name, folder)
    split = sources.SOURCES[name].splits[0]
    entry = hub.HUB[name]
    assert asked == [(entry.path, entry.config, entry.data_dir, entry.splits[split])]


def test_the_hub_never_asks_for_an_unknown_split():
    for name, entry in hub.HUB.items():
        if name in sources.SOURCES:
            assert set(entry.splits) <= set(sources.SOURCES[name].splits)


def test_a_hub_out_of_reach_is_one_clear_line(monkeypatch):
    files.fake_hub(monkeypatch, ConnectionError("no route"))
    with pytest.raises(UserError, match=r"openai/gsm8k.*ConnectionError.*--data"):
        load_source("gsm8k")
    with pytest.raises(UserError, match="no copy of it"):
        load_source("legalbench")
    with pytest.raises(UserError, match="no copy of it"):
        load_source("medqa", split="dev")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"sbr_jax\[eval\]"):
        load_source("gsm8k")


def test_the_hidden_answers_of_the_hubs_test_split_are_refused(monkeypatch):
    files.fake_hub(monkeypatch, [files.MEDMCQA[0] | {"cop": -1}])
    with pytest.raises(UserError, match=r"row 1, column 'cop': .* 1 to 4, got 0"):
        load_source("medmcqa")


# --- mistakes -------------------------------------------------------------------------


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'gsm8'; nearest: gsm8k"):
        load_source("gsm8", tmp_path)
    with pytest.raises(UserError, match=r"unknown split of gsm8k 'dev'.*train, test"):
        load_source("gsm8k", tmp_path, split="dev")
    with pytest.raises(UserError, match="expected a folder with data sets"):
        load_source("gsm8k", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gsm8k/train.jsonl.*found none.*--data"):
        load_source("gsm8k", tmp_path)
    with pytest.raises(UserError, match=r"legalbench \(train\).*at least one row"):
        load_source("legalbench", tmp_path)


@pytest.mark.parametrize("cop", [0, 5, "1", True, None])
def test_medmcqa_counts_from_one_only(cop, tmp_path):
    rows = [files.MEDMCQA[0], files.MEDMCQA[0] | {"cop": cop}]
    path = files.put(tmp_path / "medmcqa/dev.json", files.as_lines(rows))
    with pytest.raises(UserError, match=r"row 2, column 'cop'.*counts from 0") as error:
        load_source("medmcqa", tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_column_is_named_and_no_text_is_quoted(tmp_path):
    secret = "a secret sentence"
    rows = [{"question": "2 + 2?", "reply": "4", secret: "4"}]
    files.put(tmp_path / "gsm8k/train.jsonl", files.as_lines(rows))
    with pytest.raises(
        UserError, match=r"row 1: .* 'answer', got question, reply, 1 l"
    ):
        load_source("gsm8k", tmp_path)
    files.put(tmp_path / "gsm8k/train.jsonl", files.as_lines([{"question": secret}]))
    with pytest.raises(UserError) as error:
        load_source("gsm8k", tmp_path)
    assert secret not in str(error.value)


def test_an_empty_split_is_refused(tmp_path):
    for text in ("", "\n\n"):
        files.put(tmp_path / "gsm8k/train.jsonl", text)
        with pytest.raises(UserError, match="at least one row, got none"):
            load_source("gsm8k", tmp_path)
    files.put(tmp_path / "alpaca/alpaca_5000.json", "[]")
    with pytest.raises(UserError, match="at least one row, got none"):
        load_source("alpaca", tmp_path)
    files.put(
        tmp_path / "beavertails/30k_train.jsonl", files.as_lines(files.BEAVERTAILS[:1])
    )
    with pytest.raises(UserError, match=r"at least one pair .* none in 1 rows"):
        load_source("beavertails_unsafe", tmp_path)


def test_a_damaged_gzip_says_how_far_it_was_read(tmp_path):
    path = tmp_path / "gsm8k" / "train.jsonl.gz"
    path.parent.mkdir()
    lines = [{"question": f"{i}?", "answer": f"{i * 7919 % 1009}"} for i in range(9999)]
    whole = gzip.compress(files.as_lines(lines).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged after line [1-9]\d* \(EOFError\)"):
        load_source("gsm8k", tmp_path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match=r"damaged after line 0 \(BadGzipFile\)"):
        load_source("gsm8k", tmp_path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(UserError, match=r"damaged after line|expected JSON"):
        load_source("gsm8k", tmp_path)


def test_a_damaged_line_of_json_is_named_by_its_number(tmp_path):
    text = files.as_lines(files.GSM8K)
    files.put(tmp_path / "gsm8k/train.jsonl", text + "\n" + '{"question": "half')
    with pytest.raises(UserError, match=r"expected JSON in .*, row 4, got .*\(Unterm"):
        load_source("gsm8k", tmp_path)
    files.put(tmp_path / "gsm8k/train.jsonl", text + "[1]\n")
    with pytest.raises(UserError, match="row 3: expected an object, got a list of 1"):
        load_source("gsm8k", tmp_path)
    files.put(tmp_path / "alpaca/alpaca_5000.json", '[{"instruction": 1},\n{')
    with pytest.raises(UserError, match=r"expected JSON in .* at line 2"):
        load_source("alpaca", tmp_path)
    files.put(tmp_path / "alpaca/alpaca_5000.json", "{}")
    with pytest.raises(UserError, match="JSON array of objects"):
        load_source("alpaca", tmp_path)


def test_ragged_tables_and_other_layouts_are_refused(tmp_path):
    files.legalbench(tmp_path)
    train = tmp_path / "legalbench/tasks/toy/train.tsv"
    train.write_text("index\tanswer\ttext\n0\tyes\tb\n1\tno\n")
    with pytest.raises(UserError, match="row 2: expected 3 cells, got 2"):
        load_source("legalbench", tmp_path)
    train.write_text("index\tanswer\tquestion\n0\tyes\tb\n")
    with pytest.raises(UserError, match="header: expected a column 'text'"):
        load_source("legalbench", tmp_path)
    train.write_text("index\treply\ttext\n0\tyes\tb\n")
    with pytest.raises(UserError, match="'answer' or 'label'"):
        load_source("legalbench", tmp_path)
    (tmp_path / "legalbench/tasks/toy/base_prompt.txt").unlink()
    with pytest.raises(UserError, match=r"base_prompt\.txt"):
        load_source("legalbench", tmp_path)


@pytest.mark.parametrize(
    ("path", "row", "message"),
    [
        ("medqa/phrases_no_exclude_test.jsonl", {"answer_idx": "E"}, "'answer_idx'"),
        ("medqa/phrases_no_exclude_test.jsonl", {"options": {"A": "w"}}, "'options'"),
        ("beavertails/30k_train.jsonl", {"is_safe": "perhaps"}, "'is_safe'"),
        ("hh_rlhf/harmless-base-test.jsonl", {"chosen": "Hello."}, "'chosen'"),
    ],
)
def test_rows_that_are_not_as_published_are_named(path, row, message, tmp_path):
    name = path.split("/")[0]
    good = {"medqa": files.MEDQA, "beavertails": files.BEAVERTAILS}
    rows = [good.get(name, files.DIALOGUES)[0] | row]
    files.put(tmp_path / path, files.as_lines(rows))
    with pytest.raises(UserError, match=f"row 1, column {message}"):
        load_source(name, tmp_path)


def test_plain_and_compressed_files_read_alike(tmp_path):
    import lzma

    text = files.as_lines(files.GSM8K)
    plain = files.put(tmp_path / "a.jsonl", "\ufeff" + text)
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(text.encode()))
    expected = [row.values for row in readers.jsonl_rows(plain)]
    assert [row.values for row in readers.jsonl_rows(packed)] == expected == files.GSM8K
    assert readers.find(tmp_path, "b.jsonl", "a.jsonl") == plain


def test_a_cell_is_checked_by_type():
    row = Row("toy", 3, {"n": 2, "t": "x", "b": "False", "l": ["x", 1], "e": " "})
    assert (row.integer("n", 1, 2), row.text("t"), row.flag("b")) == (2, "x", False)
    for check in (
        lambda: row.integer("t", 1, 2),
        lambda: row.text("n"),
        lambda: row.text("e"),
        lambda: row.flag("n"),
        lambda: row.texts("l"),
        lambda: row.option("l", ("x",)),
    ):
        with pytest.raises(UserError, match=r"toy, row 3, column '\w': expected"):
            check()
