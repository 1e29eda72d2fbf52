"""The prompt that is asked is the one that was learnt; fixed text is never learnt."""

import dataclasses
import datetime
import itertools
import sys
import types

import checkpoints
import numpy as np
import pytest
from templates_case import (
    ANSWER,
    CHATML,
    FAMILIES,
    QUESTION,
    THOUGHTS,
    tokenizer,
)

from sbr_jax import data, models
from sbr_jax.data import _clock, control, exchange, template
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.evaluation.judges import Verdict
from sbr_jax.evaluation.runner import ModelRunner, decode_answer
from sbr_jax.evaluation.thoughts import without_thoughts
from sbr_jax.typing import UserError

NAMES = sorted(FAMILIES)
PIECES = ["How", " long", " is\n", "a day?", "  ", "é", "漢", "[/INST]", "\n\n", "24"]
CONTROL = ["<|im_end|>", "</s>", "<|im_start|>user\n", "<end_of_turn>", "<|eot_id|>"]


def said(rng, pieces):
    """A text that no template trims, of so many pieces."""
    middle = "".join(rng.choice(pieces, rng.integers(0, 6)))
    return f"x{middle}y"


def conversations(seed, count, pieces):
    """Random records of one to three turns."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        turns = 2 * int(rng.integers(0, 3)) + 1
        roles = itertools.islice(itertools.cycle(["user", "assistant"]), turns)
        prompt = tuple({"role": r, "content": said(rng, pieces)} for r in roles)
        yield data.Record(prompt, said(rng, pieces))


@pytest.mark.parametrize("pieces", [PIECES, PIECES + CONTROL], ids=["plain", "control"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_prompt_that_is_asked_then_what_is_learnt(name, pieces):
    family, tok = FAMILIES[name], tokenizer(FAMILIES[name])
    records = list(conversations(NAMES.index(name), 12, pieces))
    rows = data.encode_chat(tok, records, 512)
    prompts = data.encode_prompts(tok, records)
    stop = tok.convert_tokens_to_ids(family.stop.strip())
    stops = data.stop_tokens(tok)
    assert stop in stops
    assert exchange.unstopped(rows, stops) == 0
    for record, prompt, tokens, mask in zip(
        records, prompts, rows.tokens, rows.mask, strict=True
    ):
        assert tokens[: len(prompt)].tolist() == prompt
        size = int(mask.sum())
        np.testing.assert_array_equal(
            np.flatnonzero(mask), len(prompt) + np.arange(size)
        )
        taught = tokens[mask > 0]
        assert tok.decode(taught) == f"{family.space}{record.response}{family.stop}"
        # Nothing that was said ends or begins a turn.
        assert taught[-1] == stop
        assert not set(taught[:-1].tolist()) & control.special_ids(tok)
    written = (pieces is not PIECES) and any(
        control.holds_control(tok, m["content"]) for r in records for m in r.messages
    )
    assert bool(rows.escaped) == written


@pytest.mark.parametrize("name", NAMES)
def test_texts_and_tokens_are_those_of_transformers(name):
    tok = template.fix_template(tokenizer(FAMILIES[name]))
    for record in conversations(7, 4, PIECES):
        for messages, ask in ((record.messages, False), (record.context, True)):
            theirs = tok.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
            assert template.render(tok, messages, prompt=ask) == theirs
        rows = data.encode_chat(tok, [record], 512)
        theirs = tok.apply_chat_template(record.messages)["input_ids"]
        assert rows.tokens[0][: len(theirs)].tolist() == theirs
        assert rows.escaped == 0


# --- fixed text before the answer -----------------------------------------------------


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("name", ["thinking", "thinking-marked", "headless", "opened"])
def test_fixed_text_before_an_answer_is_given_and_not_learnt(name, thinking):
    family, tok = FAMILIES[name], tokenizer(FAMILIES[name])
    if name == "headless" and thinking is not None:
        with pytest.raises(UserError, match="expected a chat template that can think"):
            data.fix_template(tok, thinking=thinking)
        return
    tok = data.fix_template(tok, thinking=thinking)
    rows = data.encode_chat(tok, [(QUESTION, ANSWER)], 256)
    taught = rows.tokens[0][rows.mask[0] > 0]
    assert tok.decode(taught) == ANSWER + family.stop
    before = rows.tokens[0][: int(rows.mask[0].argmax())].tolist()
    fixed = THOUGHTS if name.startswith("thinking") else ""
    assert tok.decode(before).endswith(f"<|im_start|>assistant\n{fixed}")
    (asked,) = data.encode_prompts(tok, [QUESTION])
    if not thinking:
        assert asked == before
    else:
        ends = "<|im_start|>assistant\n" + "<think>\n" * (name == "opened")
        assert tok.decode(asked).endswith(ends)


def a_runner(name, **options):
    tok = tokenizer(FAMILIES[name])
    if options:
        tok = data.fix_template(tok, **options)
    config = dataclasses.replace(
        checkpoints.CONFIG, vocab_size=len(tok), context=512, eos=()
    )
    model = models.make_model(config, checkpoints.params(config), tok)
    return ModelRunner(model, model.params, system=None)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_scored_where_answers_are_learnt(name):
    runner = a_runner(name)
    tok = runner.model.tokenizer
    for option in ("A", "No."):
        rows = data.encode_chat(tok, [(QUESTION, option)], 256)
        ((context, ending),) = runner.pairs(QUESTION, [option])
        start = int(rows.mask[0].argmax())
        stopped = start + int(rows.mask[0].sum())
        assert context == rows.tokens[0][:start].tolist()
        spaces = len(tok(FAMILIES[name].stop, add_special_tokens=False)["input_ids"])
        assert ending == rows.tokens[0][start : stopped - spaces].tolist()


def test_thoughts_of_an_answer_are_learnt_only_by_a_model_that_thinks():
    thoughtful = f"<think>\nSo.\n</think>\n\n{ANSWER}"
    tok = tokenizer(FAMILIES["thinking"])
    with pytest.raises(UserError, match=r"record 0: .*thinking=True has it think"):
        data.encode_chat(tok, [(QUESTION, thoughtful)], 256)
    tok = data.fix_template(tok, thinking=True)
    rows = data.encode_chat(tok, [(QUESTION, thoughtful)], 256)
    assert tok.decode(rows.tokens[0][rows.mask[0] > 0]) == f"{thoughtful}<|im_end|>"


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("{% if messages|length > 1 %}x{% endif %}", "written in another way"),
        ("{{ messages[-1]['content'] }}", "written in another way|more than once"),
    ],
)
def test_a_place_that_cannot_be_told_is_refused(start, why):
    family = dataclasses.replace(FAMILIES["chatml"], template=start + CHATML)
    tok = tokenizer(family)
    for encode in (
        lambda: data.encode_chat(tok, [(QUESTION, ANSWER)], 256),
        lambda: data.encode_prompts(tok, [QUESTION]),
    ):
        with pytest.raises(UserError, match=f"cannot locate the answer: .*({why})"):
            encode()


@pytest.mark.parametrize(
    ("text", "asked", "left"),
    [
        ("No.", "", "No."),
        ("<think>\nSure, here is how.\n</think>\n\nI cannot.", "", "I cannot."),
        ("\n<think></think>No.", "", "No."),
        ("Sure.\n</think>\n\nI cannot.", "assistant\n<think>\n", "I cannot."),
        ("No.", "<think>\n\n</think>\n\n", "No."),
        ("<think>\nSure, and", "", ""),
        ("Say <think>x</think>.", "", "Say <think>x</think>."),
        ("<thinking>Sure</thinking> No.", "", "No."),
        ("[THINK]Sure[/THINK]No.", "", "No."),
    ],
)
def test_what_follows_thoughts_is_judged(text, asked, left):
    assert without_thoughts(text, asked) == left
    tok = tokenizer(FAMILIES["thinking"])
    ids = [tok(t, add_special_tokens=False)["input_ids"] for t in (f"?{asked}", text)]
    assert decode_answer(tok, *ids).strip() == left.strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_tag_that_a_user_writes_opens_no_thoughts(name):
    tok = tokenizer(FAMILIES[name])
    said = tok("I cannot.</think>", add_special_tokens=False)["input_ids"]
    for asked in ("What is <think>", "Go on.\n<think>\n", "[THINK]"):
        (ids,) = data.encode_prompts(tok, [asked])
        assert decode_answer(tok, ids, said) == "I cannot.</think>"


def test_an_answer_that_thinks_and_then_refuses_is_a_refusal(monkeypatch):
    runner = a_runner("thinking", thinking=True)
    tok = runner.model.tokenizer
    said = "<think>\nSure, here is how.\n</think>\n\nI cannot help with that."
    ids = tok(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(models, "generate", lambda *args, **options: [ids])
    answers = runner.answers([QUESTION], max_new_tokens=64)
    assert answers == ["I cannot help with that."]
    assert KeywordJudge()([QUESTION], answers) == [Verdict.REFUSAL]
    assert runner.describe()["thinking"] is True
    assert "thinking" not in a_runner("thinking").describe()


def test_thoughts_between_special_tokens_are_seen_before_they_are_decoded():
    tok = tokenizer(FAMILIES["thinking"])
    tok.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    ids = tok("[THINK]Sure[/THINK]No.", add_special_tokens=False)["input_ids"]
    assert decode_answer(tok, [], ids) == "No."


# --- stops ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_was_taught_as_an_end_stops(name, monkeypatch):
    runner, family = a_runner(name), FAMILIES[name]
    tok = runner.model.tokenizer
    stop = tok.convert_tokens_to_ids(family.stop.strip())
    first = tok("A", add_special_tokens=False)["input_ids"][0]

    def written(config, hardware, slots, base, adapter, tokens, lengths, *rest):
        """One token, then what ended the answers that were learnt."""
        new = np.array([[first, stop, *[first] * (slots - 2)]] * len(tokens))
        ended = np.isin(new, config.eos)
        count = np.where(ended.any(1), ended.argmax(1), slots)
        return new, count, np.ones(len(new), bool)

    generating = sys.modules["sbr_jax.models.generate"]
    monkeypatch.setattr(generating, "_generate", written)
    assert runner.answers([QUESTION], max_new_tokens=8) == ["A"]


@pytest.mark.parametrize("where", ["config", "tokenizer", "template"])
def test_every_stop_stops(where):
    rolled = models.Hardware(unroll=1)
    params, prompts = checkpoints.params(), [[1, 2], [3, 4, 6], [7]]

    def answers(eos=(), own=None, stops=()):
        config = dataclasses.replace(checkpoints.CONFIG, eos=eos)
        model = models.make_model(config, params, hardware=rolled)
        words = types.SimpleNamespace(eos_token_id=own)
        model = dataclasses.replace(model, tokenizer=words)
        return models.generate(
            model, params, None, prompts, max_new_tokens=12, stops=stops
        )

    whole = answers()
    stop = min(token for row in whole for token in row)
    told = {
        "config": ((stop,),),
        "tokenizer": ((), stop),
        "template": ((), None, [stop]),
    }
    found = answers(*told[where])
    assert found == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert found != whole


def test_rows_that_end_with_what_does_not_stop_are_counted():
    endless = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tok = tokenizer(dataclasses.replace(FAMILIES["chatml"], template=endless))
    rows = data.encode_chat(tok, [(QUESTION, ANSWER)] * 3, 256)
    assert exchange.unstopped(rows, data.stop_tokens(tok)) == 3
    tok = tokenizer(FAMILIES["chatml"])
    rows = data.encode_chat(tok, [(QUESTION, ANSWER)] * 3, 256)
    assert exchange.unstopped(rows, data.stop_tokens(tok)) == 0
    assert exchange.unstopped(rows, [tok.bos_token_id]) == 3
    before = int(np.flatnonzero(rows.mask[0])[-1])
    rows = data.encode_chat(tok, [(QUESTION, ANSWER)] * 3, before, too_long="truncate")
    assert rows.truncated == 3
    assert exchange.unstopped(rows, data.stop_tokens(tok)) == 0


# --- the date -------------------------------------------------------------------------


class Clock:
    """Days that pass whenever somebody asks."""

    def __init__(self, monkeypatch):
        days = itertools.count(datetime.date(2025, 12, 31).toordinal())

        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromordinal(next(days))

        fake = types.SimpleNamespace(date=Date, datetime=datetime.datetime)
        monkeypatch.setattr(template, "datetime", fake)


@pytest.fixture
def midnights(monkeypatch):
    template.process_date.cache_clear()
    yield Clock(monkeypatch)
    template.process_date.cache_clear()


@pytest.mark.parametrize("date", [None, "2024-07-26"])
def test_midnight_changes_no_prompt(midnights, date):
    tok = data.fix_template(tokenizer(FAMILIES["llama-3.1"]), date=date)
    texts = {tok.decode(data.encode_prompts(tok, [QUESTION])[0]) for _ in range(3)}
    (found,) = texts
    day = "31 Dec 2025" if date is None else "26 Jul 2024"
    assert f"Today Date: {day}\n" in found
    row = data.encode_chat(tok, [(QUESTION, ANSWER)], 256).tokens[0]
    assert tok.decode(row).startswith(found)


def test_the_date_is_english_in_every_locale(monkeypatch):
    day = datetime.date(2024, 3, 5)
    form = "%d %b %Y|%A %B|%c|%x|%X|%p|%-d|%e|%j|%Z|%s|100 %%b"
    expected = (
        "05 Mar 2024|Tuesday March|Tue Mar  5 00:00:00 2024|03/05/24|00:00:00|AM|5| 5|"
        "065||1709596800|100 %b"
    )
    assert _clock.strftime(day, form) == expected
    assert not template.reads_clock(tokenizer(FAMILIES["llama-3"]))
    assert template.reads_clock(tokenizer(FAMILIES["llama-3.1"]))


@pytest.mark.parametrize("date", ["yesterday", "26 Jul 2024", "2024-13-01", 5])
def test_a_date_in_another_form_is_refused(date):
    with pytest.raises(UserError, match="expected a day such as 2024-07-26"):
        data.fix_template(tokenizer(FAMILIES["llama-3.1"]), date=date)
