"""The scorer against running every continuation alone."""

import copy
import dataclasses

import checkpoints
import jax
import numpy as np
import pytest
import tiny_stories

from sbr_jax import models
from sbr_jax.evaluation import scorer
from sbr_jax.evaluation.runner import ModelRunner, decode_after, encode_options
from sbr_jax.evaluation.scorer import Budget, Request, score
from sbr_jax.typing import UserError

# Float rounding between shapes: sums of a dozen float32 log-probabilities of size 5.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
CONTEXT = 128


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(checkpoints.CONFIG, context=CONTEXT)
    return models.make_model(config, checkpoints.params(config))


@pytest.fixture(scope="module")
def adapter():
    return checkpoints.adapter()


def naive(model, adapter, requests):
    """One whole sequence per continuation, all padded to one length."""
    texts = [
        (*q.context, *c) + (0,) * (CONTEXT - len(q.context) - len(c))
        for q in requests
        for c in q.continuations
    ]
    logits = np.asarray(
        jax.jit(model.apply_fn)(model.params, adapter, np.asarray(texts, np.int32)),
        np.float64,
    )
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    out, row = [], 0
    for q in requests:
        sums, greedy = [], []
        for c in q.continuations:
            steps = log_p[row, len(q.context) - 1 :][: len(c)]
            sums.append(sum(step[t] for step, t in zip(steps, c, strict=True)))
            greedy.append([int(t) for t in c] == steps.argmax(-1).tolist())
            row += 1
        out.append((np.array(sums), np.array(greedy)))
    return out


def random_requests(seed, count=12, low=1, high=24, longest=6):
    rng = np.random.default_rng(seed)

    def ids(n):
        return tuple(int(t) for t in rng.integers(3, 24, n))

    return [
        Request(
            ids(rng.integers(low, high)),
            [ids(rng.integers(1, longest)) for _ in range(rng.integers(1, 5))],
        )
        for _ in range(count)
    ]


def check(model, adapter, requests, **options):
    found = score(model, model.params, adapter, requests, **options)
    for scores, (sums, greedy) in zip(
        found, naive(model, adapter, requests), strict=True
    ):
        np.testing.assert_allclose(scores.log_likelihoods, sums, **CLOSE)
        np.testing.assert_array_equal(scores.greedy, greedy)
    return found


def test_equals_the_naive_scorer(model, adapter):
    requests = random_requests(0)
    found = check(model, adapter, requests)
    # The test can fail: other weights give other numbers.
    other = score(model, model.params, None, requests)
    assert not np.allclose(other[0].log_likelihoods, found[0].log_likelihoods, **CLOSE)


def test_greedy_continuations_are_known(model):
    contexts = [q.context for q in random_requests(1, count=4)]
    answers = models.generate(model, model.params, None, contexts, max_new_tokens=3)
    eos = model.config.eos[0]
    requests = [
        Request(c, [[*a, eos][:3], [*a[:-1], 5 if not a or a[-1] != 5 else 6]])
        for c, a in zip(contexts, answers, strict=True)
    ]
    found = check(model, None, requests)
    assert [bool(s.greedy[0]) for s in found] == [True] * 4
    assert not any(s.greedy[1] for s in found)


def test_options_of_one_token_share_one_row(model, monkeypatch):
    sizes = []
    real = scorer._end

    def counted(*arguments):
        sizes.append(arguments[6].shape)
        return real(*arguments)

    monkeypatch.setattr(scorer, "_end", counted)
    contexts = [q.context for q in random_requests(2, count=8, low=5, high=8)]
    requests = [Request(c, [[7], [8], [9], [10]]) for c in contexts]
    check(model, None, requests)
    assert sizes == [(8, 1)]
    # The same when a harness sends the options one by one.
    apart = [Request(c, [[t]]) for c in contexts for t in (7, 8, 9, 10)]
    together = score(model, model.params, None, requests)
    found = score(model, model.params, None, apart)
    assert sizes[-1] == (8, 1)
    np.testing.assert_array_equal(
        [s.log_likelihoods[0] for s in found],
        np.concatenate([s.log_likelihoods for s in together]),
    )


@pytest.fixture
def shapes(monkeypatch):
    """What is read, in order: (rows, width)."""
    found = []
    real = scorer._read

    def counted(*arguments):
        found.append(arguments[3].shape)
        return real(*arguments)

    monkeypatch.setattr(scorer, "_read", counted)
    return found


def test_a_common_beginning_is_read_once(model, shapes, adapter):
    (start,) = (q.context for q in random_requests(3, count=1, low=98, high=99))
    rest = random_requests(4, count=4, low=2, high=9, longest=3)
    requests = [Request((*start, *q.context), q.continuations) for q in rest]
    check(model, adapter, requests)
    assert shapes[0] == (1, 96)
    assert all(width < 24 for _, width in shapes[1:])
    # Contexts that only begin alike for a few tokens share nothing.
    shapes.clear()
    check(model, adapter, random_requests(5, count=4, low=70, high=80, longest=2))
    assert all(rows > 1 for rows, _ in shapes)


def test_one_long_context_does_not_pad_the_short_ones(model, shapes, adapter):
    short = random_requests(8, count=6, low=10, high=14, longest=3)
    long = random_requests(9, count=1, low=90, high=91, longest=3)
    check(model, adapter, [*short, *long])
    assert sorted(width for _, width in shapes) == [16, 96]
    # Near lengths still go together.
    shapes.clear()
    check(model, adapter, random_requests(10, count=6, low=10, high=30, longest=3))
    assert len(shapes) == 1


def test_the_budget_changes_no_result(model, adapter):
    requests = random_requests(6, count=4, low=9, high=10, longest=2)
    whole = score(model, model.params, adapter, requests)
    parts = score(model, model.params, adapter, requests, budget=Budget(24, 2))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, **CLOSE)


@pytest.mark.parametrize(
    ("context", "continuation", "word"),
    [
        ((), (3,), "at least one"),
        ((3,), (), "at least one"),
        ((3,) * 200, (3,), "200 tokens"),
    ],
)
def test_impossible_requests_are_refused(model, context, continuation, word):
    good = Request((3,), [(4,)])
    with pytest.raises(UserError, match=word) as caught:
        score(model, model.params, None, [good, Request(context, [continuation])])
    assert "request 1" in str(caught.value)


def test_the_last_token_may_fill_the_context(model):
    requests = [Request((3,) * CONTEXT, [(4,), (5,)])]
    (found,) = score(model, model.params, None, requests)
    assert np.isfinite(found.log_likelihoods).all()


# --- text: what a runner asks -------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tiny model whose tokenizer knows the words w0 to w9."""
    tokenizer = tiny_stories.tokenizer()
    config = dataclasses.replace(
        checkpoints.CONFIG, vocab_size=len(tokenizer), context=24
    )
    return models.make_model(config, checkpoints.params(config), tokenizer)


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def chatty(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = CHAT
    return dataclasses.replace(model, tokenizer=tokenizer)


def direct(model, ids, count):
    """Summed log-likelihood of the last tokens, one forward."""
    row = np.zeros((1, model.config.context + 1), np.int32)  # One program for all.
    row[0, : len(ids)] = ids
    logits = jax.jit(model.apply_fn)(model.params, None, row)
    logits = np.asarray(logits, np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[i - 1, ids[i]] for i in range(len(ids) - count, len(ids)))


def test_a_plain_runner_asks_with_one_bos(words):
    runner = ModelRunner(words, words.params)
    (found,) = runner.log_likelihoods(["w1 w2"], [[" w3 w4", " w5"]])
    tokenizer = words.tokenizer
    for got, text, count in zip(found, ("w3 w4", "w5"), (2, 1), strict=True):
        ids = tokenizer(f"<s> w1 w2 {text}", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert got == pytest.approx(direct(words, ids, count), abs=1e-4)
    assert runner.describe()["chat"] is False


def test_a_chat_runner_asks_in_its_own_template(words):
    model = chatty(words)
    runner = ModelRunner(model, model.params, system="w9")
    assert runner.describe() == {"chat": True, "system": "w9", "too_long": "error"}
    (found,) = runner.log_likelihoods(["w1 w2"], [[" w3"]])
    ids = model.tokenizer("<s>s w9 u w1 w2 a w3", add_special_tokens=False)["input_ids"]
    assert found[0] == pytest.approx(direct(model, ids, 1), abs=1e-4)
    plain = ModelRunner(model, model.params, chat=False)
    (other,) = plain.log_likelihoods(["w1 w2"], [[" w3"]])
    assert abs(found[0] - other[0]) > 1e-3
    with pytest.raises(UserError, match="chat template"):
        ModelRunner(model, model.params, chat=False, system="w9")


def test_spaces_at_the_end_of_a_context_move_on(words):
    def encode(context, option):
        return encode_options(words.tokenizer, context, [option])[0]

    assert encode("w1 w2 ", "w3") == encode("w1 w2", " w3")
    # BOS that the text writes itself is not doubled.
    assert encode("<s> w1", " w3") == encode("w1", " w3")
    assert encode("", "w3")[0] == [words.tokenizer.bos_token_id]
    with pytest.raises(UserError, match="one token"):
        encode("w1", "")


def test_long_prompts_are_refused_or_lose_their_beginning(words):
    prompt = " ".join(f"w{i}" for i in range(40))
    with pytest.raises(UserError, match="41 tokens"):
        ModelRunner(words, words.params).log_likelihoods([prompt], [[" w3"]])
    runner = ModelRunner(words, words.params, too_long="left")
    (found,) = runner.log_likelihoods([prompt], [[" w3"]])
    ids = words.tokenizer(f"<s> {prompt} w3", add_special_tokens=False)["input_ids"]
    # 24 positions predict: BOS, the 23 last of the prompt, then the option.
    kept = [ids[0], *ids[-24:]]
    assert found[0] == pytest.approx(direct(words, kept, 1), abs=1e-4)
    with pytest.raises(UserError, match="too_long"):
        ModelRunner(words, words.params, too_long="right")


def test_answers_are_greedy_text_up_to_a_stop(words):
    runner = ModelRunner(words, words.params)
    (whole,) = runner.answers(["w1 w2"], max_new_tokens=6)
    ids = models.generate(
        words,
        words.params,
        None,
        [[words.tokenizer.bos_token_id, *words.tokenizer("w1 w2")["input_ids"]]],
        max_new_tokens=6,
    )[0]
    assert whole == " " + words.tokenizer.decode(ids, skip_special_tokens=True)
    stop = whole.split()[1]
    (short,) = runner.answers(["w1 w2"], max_new_tokens=6, stop=[stop])
    assert short == whole[: whole.index(stop)]
    with pytest.raises(UserError, match="chat template"):
        runner.answers([[{"role": "user", "content": "w1"}]], max_new_tokens=2)
    with pytest.raises(UserError, match="tokenizer"):
        ModelRunner(models.make_model(words.config, words.params), words.params)


@checkpoints.needs_stories
def test_answers_keep_their_first_space():
    tokenizer = models.load_tokenizer(checkpoints.STORIES / "hf")
    text = "Once upon a time there was a dog"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for border in range(1, len(ids)):
        before, new = ids[:border], ids[border:]
        assert (
            decode_after(tokenizer, before, new)
            == text[len(tokenizer.decode(before)) :]
        )
    # Decoded alone, the space is lost: the test can fail.
    assert not tokenizer.decode(ids[3:]).startswith(" ")
