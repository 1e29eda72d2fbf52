"""What the model of `realtext` learns and never sees, as text, tokens and batches.

Of the real sets only counts are looked at, never text.
"""

import numpy as np
import pytest
from realtext_case import PLANTED, SECRET, everything, save_data
from tiny_data import DATA, needs_data

from sbr_jax.data import TokenDataset, encode_chat, encode_prompts, load_source
from sbr_jax.data.leaks import normalised
from sbr_jax.evaluation import KEYWORD_LISTS, KeywordJudge, Verdict
from sbr_jax.recipes.realtext import PRESET
from sbr_jax.studies.realtext import corpus
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parts(data):
    return corpus.read_corpus(data, corpus.kept_out(data), seed=0)


# --- what is learnt -------------------------------------------------------------------


def test_what_is_measured_or_learnt_later_is_in_no_part(data, parts):
    banned = corpus.kept_out(data)
    for name, prompt in PLANTED.items():
        assert normalised(prompt) in map(normalised, banned[name]), name
    learnt = {normalised(x.prompt) for x in everything(parts)}
    for name, prompts in banned.items():
        assert not learnt & {normalised(p) for p in prompts}, name
    assert parts["alpaca"].dropped["kept_out"] == len(PLANTED)
    assert parts["refusals"].dropped["kept_out"] == 2
    assert SECRET not in str(parts)


def test_the_leaks_are_there_unless_they_are_kept_out(data):
    careless = corpus.read_corpus(data, {}, seed=0)
    learnt = {normalised(x.prompt) for x in everything(careless)}
    assert {normalised(p) for p in PLANTED.values()} <= learnt
    assert careless["alpaca"].dropped["kept_out"] == 0


def test_a_prompt_is_learnt_once_and_what_is_refused_is_not_answered(parts):
    found = [normalised(x.prompt) for x in everything(parts)]
    assert len(found) == len(set(found))
    # One that differs in case, one that the refusals have.
    assert parts["alpaca"].dropped["repeated"] == 2
    assert parts["alpaca"].dropped["refusing"] == 1
    assert {part: len(p.train) + len(p.held_out) for part, p in parts.items()} == {
        "refusals": 60 + 3 + 2,
        "safe-answers": 60,
        "alpaca": 80,
        "gsm8k": 40,
    }


def test_the_corpus_is_a_function_of_the_seed(data, parts):
    banned = corpus.kept_out(data)
    assert corpus.read_corpus(data, banned, seed=0) == parts
    other = corpus.read_corpus(data, banned, seed=1)
    assert other["refusals"].held_out != parts["refusals"].held_out
    assert {x.prompt for x in everything(other)} == {
        x.prompt for x in everything(parts)
    }


def test_every_refusal_is_seen_by_the_judge_and_benign_answers_are_not(parts):
    judge = KeywordJudge(corpus.KEYWORDS)
    said = {x.answer for x in (*parts["refusals"].train, *parts["refusals"].held_out)}
    assert said == set(corpus.REFUSALS)
    assert set(judge([""] * len(said), sorted(said))) == {Verdict.REFUSAL}
    benign = [x.answer for name in ("alpaca", "gsm8k") for x in parts[name].train]
    assert Verdict.REFUSAL not in judge([""] * len(benign), benign)


def test_an_emptied_part_is_refused(data):
    sums = [pair.prompt for pair in load_source("gsm8k", data)]
    with pytest.raises(UserError, match=r"part 'gsm8k', got 0 of 40"):
        corpus.read_corpus(data, {"sums": sums}, seed=0)


@needs_data
@pytest.mark.parametrize("name", PRESET.domains)
def test_no_answer_of_a_domain_looks_like_a_refusal(name):
    splits = ("train", "test") if name == "legalbench" else (None,)
    answers = [x.answer for s in splits for x in load_source(name, DATA, split=s)]
    phrases = KEYWORD_LISTS[corpus.KEYWORDS]
    assert sum(phrases.matches(a.replace("’", "'")) for a in answers) == 0


# --- the tokenizer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(parts):
    texts = [t for p in parts.values() for x in p.train for t in (x.prompt, x.answer)]
    return corpus.make_tokenizer(texts, size=512)


@pytest.mark.parametrize(
    "text",
    [
        "How do I cook bread for the barn?",
        "  two  blanks,\n\ta tab\r\n",
        "naïve – 日本語 🙂 <user> def f(x):\n    return x",
        "",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_writes_one_bos_and_marks_the_answer(tokenizer):
    data = encode_chat(tokenizer, [("Why?", "It’s so.")], 32)
    tokens, mask = data.tokens[0].tolist(), data.mask[0] > 0
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[0] == tokenizer.bos_token_id
    answer = data.tokens[0][mask].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "It’s so."
    (prompt,) = encode_prompts(tokenizer, ["Why?"])
    assert tokens[: len(prompt)] == prompt
    assert len(prompt) == int(np.argmax(mask))
    assert tokens[len(prompt) + len(answer) :] == [tokenizer.pad_token_id] * (
        32 - len(prompt) - len(answer)
    )


def test_a_system_message_is_refused(tokenizer):
    with pytest.raises(UserError, match="user and assistant only"):
        encode_prompts(tokenizer, ["Why?"], system="Be kind.")


def test_the_tokenizer_knows_the_training_text_and_nothing_else(tokenizer, parts):
    assert len(tokenizer(" bread")["input_ids"]) == 1
    assert len(tokenizer(f" {SECRET}")["input_ids"]) > 2
    texts = [t for p in parts.values() for x in p.train for t in (x.prompt, x.answer)]
    again = corpus.make_tokenizer(texts, size=512)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 512


# --- batches --------------------------------------------------------------------------


def drawn(count, seed, lengths, monkeypatch, data):
    monkeypatch.setattr(corpus, "LENGTHS", (4, 8))
    monkeypatch.setattr(corpus, "TOKENS", 16)
    pipeline = corpus.batches(data, lengths, seed)
    return [next(pipeline) for _ in range(count)]


def test_batches_hold_every_row_at_its_weight(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 23)
    tokens = np.zeros((23, 8), np.int32)
    mask = np.zeros((23, 8), np.float32)
    for i, n in enumerate(lengths):
        tokens[i, :n] = 100 * (i + 1) + np.arange(n)
        mask[i, n // 2 : n] = 1
    data = TokenDataset(tokens, mask)
    short = int(np.sum(lengths <= 4))
    epoch = -(-short // 4) + -(-(23 - short) // 2)
    found = drawn(epoch, 3, lengths, monkeypatch, data)
    for batch in found:
        count, width = batch["tokens"].shape
        assert count * width == 16
        for ids, weights in zip(batch["tokens"], batch["mask"], strict=True):
            row = ids[0] // 100 - 1
            n = lengths[row]
            assert width == (4 if n <= 4 else 8)
            assert ids[:n].tolist() == tokens[row, :n].tolist()
            # The slow twin of the weights.
            assert weights.tolist() == [
                np.float32(1.0 if t >= n // 2 else corpus.PROMPT_WEIGHT) if t < n else 0
                for t in range(width)
            ]
    seen = {int(ids[0]) // 100 - 1 for batch in found for ids in batch["tokens"]}
    assert seen == set(range(23))
    again = drawn(epoch, 3, lengths, monkeypatch, data)
    other = drawn(epoch, 4, lengths, monkeypatch, data)
    order = [batch["tokens"][:, 0].tolist() for batch in found]
    assert [batch["tokens"][:, 0].tolist() for batch in again] == order
    assert [batch["tokens"][:, 0].tolist() for batch in other] != order
