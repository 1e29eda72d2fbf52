"""Where a prompt ends and an option begins, here and in the harness, token by token."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import checkpoints
import jax
import numpy as np
import pytest
from test_scorer import direct

from sbr_jax import models
from sbr_jax.evaluation import harness
from sbr_jax.evaluation.runner import ModelRunner, encode_options
from sbr_jax.typing import UserError

LETTERS = "abcd :\n"
TEMPLATES = {
    "plain": None,
    "bos": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}:{% endfor %}",
    "no bos": "</s>{% for m in messages %}{{ m['content'] }}:{% endfor %}",
    "a line break": "</s>{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    "a space": "</s>{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ m['content'] }}:{% else %} {{ m['content'] }}{% endif %}{% endfor %}",
}


def tokenizer(template=None, bos="<s>", seed=0):
    """Merges of any two letters, spaces and line breaks too: every border can move."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pairs = [(a, b) for a in LETTERS for b in LETTERS]
    order = np.random.default_rng(seed).permutation(len(pairs))
    merges = [pairs[i] for i in order[:30]]
    names = ["<s>", "</s>", *LETTERS, *(a + b for a, b in merges)]
    raw = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token="</s>", chat_template=template
    )


def texts(rng, count, longest):
    letters = list("aabbccdd  :")
    made = (
        "".join(rng.choice(letters, rng.integers(2, longest))) for _ in range(count)
    )
    return [text.strip(" ") or "a" for text in made]


@pytest.fixture(scope="module")
def model():
    words = tokenizer()
    config = dataclasses.replace(
        checkpoints.CONFIG, vocab_size=len(words), context=48, bos=0, eos=(1,)
    )
    return models.make_model(config, checkpoints.params(config), words)


def examples(seed, count=40):
    rng = np.random.default_rng(seed)
    return [
        (prompt, [rng.choice(["", " "]) + o for o in texts(rng, 3, 8)])
        for prompt in texts(rng, count, 14)
    ]


def moved(tokenizer, prompt, option):
    """Whether a token of the whole text spans the border."""
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, option)]
    whole = tokenizer(prompt + option, add_special_tokens=False).input_ids
    return ids[0] != whole[: len(ids[0])]


@pytest.mark.parametrize("seed", range(4))
def test_options_are_cut_at_what_all_texts_have_in_common(seed):
    words, spanned = tokenizer(seed=seed), 0
    for prompt, options in examples(seed):
        pairs = encode_options(words, prompt, options)
        (start,) = {tuple(before) for before, _ in pairs}
        ids = [
            [0, *words(text, add_special_tokens=False).input_ids]
            for text in [prompt, *(prompt + option for option in options)]
        ]
        assert [[*before, *after] for before, after in pairs] == ids[1:]
        assert all(after for _, after in pairs)
        # The longest that all have: one token more is not in each of them.
        assert all(tuple(one[: len(start)]) == start for one in ids)
        assert len({tuple(one[: len(start) + 1]) for one in ids}) > 1
        mine = [moved(words, prompt, option) for option in options]
        spanned += any(mine)
        if not any(mine):
            assert list(start) == ids[0]
    assert spanned > 3


def test_an_option_that_adds_no_token_is_refused():
    words = tokenizer()
    for context, options in (("ab", ["a", ""]), ("ab", [""])):
        with pytest.raises(UserError, match="at least one token"):
            encode_options(words, context, options)
    assert encode_options(words, "ab", []) == []
    # Nothing before the token that spans: there is no context to score it after.
    joined = next(
        p + o
        for p in "abcd"
        for o in "abcd"
        if len(words(p + o, add_special_tokens=False).input_ids) == 1
    )
    with pytest.raises(UserError, match="at least one token"):
        encode_options(tokenizer(bos=None), joined[0], [joined[1]])


def test_scores_equal_the_dense_twin_past_the_common_beginning(model):
    runner, asked = ModelRunner(model, model.params), examples(0, count=12)
    found = runner.log_likelihoods(*zip(*asked, strict=True))
    rows = [
        (before, after)
        for prompt, options in asked
        for before, after in encode_options(model.tokenizer, prompt, options)
    ]
    assert any(moved(model.tokenizer, p, o) for p, options in asked for o in options)
    # One forward over whole texts; what stands after a text is not seen before it.
    longest = max(len(before) + len(after) for before, after in rows)
    whole = [[*b, *a] + [0] * (longest - len(b) - len(a)) for b, a in rows]
    logits = jax.jit(model.apply_fn)(model.params, None, np.asarray(whole, np.int32))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    twin = [
        sum(log_p[i, len(b) + k - 1, token] for k, token in enumerate(a))
        for i, (b, a) in enumerate(rows)
    ]
    # Float rounding between shapes.
    np.testing.assert_allclose(np.concatenate(found), twin, rtol=1e-5, atol=2e-5)
    before, after = rows[0]
    assert found[0][0] == pytest.approx(
        direct(model, [*before, *after], len(after)), abs=1e-4
    )


# --- the harness --------------------------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch):
    """As much of lm-eval as the adapter's log-likelihoods need."""
    names = ("lm_eval", "lm_eval.utils", "lm_eval.api", "lm_eval.api.model")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].utils = sys.modules["lm_eval.utils"]
    sys.modules["lm_eval.api.model"].TemplateLM = object


def sent(runner, template, prompt, options):
    """Context and options as lm-eval sends them: in a template without a space."""
    if template is None:
        return [(prompt, option) for option in options]
    context = runner.model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False
    )
    return [(context, option.strip()) for option in options]


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_harness_encodes_as_our_own_tasks_do(model, name, bos):
    template = TEMPLATES[name]
    if bos is None and name == "bos":
        pytest.skip("there is none to write")
    words = tokenizer(template, bos)
    runner = ModelRunner(dataclasses.replace(model, tokenizer=words), model.params)
    # A first token that spans prompt and option would leave no context without BOS.
    start = "" if bos or template else "dcd"
    asked = [(start + prompt, options) for prompt, options in examples(1)]
    requests = [r for p, options in asked for r in sent(runner, template, p, options)]
    ours = [pair for p, options in asked for pair in runner.pairs(p, options)]
    found = harness.encode_requests(words, requests, chat=template is not None)
    if name == "a space":
        # Ours are asked with the space; lm-eval knows of none.
        assert found != ours
        return
    assert found == ours
    begins = bos is not None and name in ("plain", "bos")
    assert all((before[0] == 0) is begins for before, _ in found)
    # Sent in another order, each finds its own siblings.
    again = harness.encode_requests(words, requests[::-1], chat=template is not None)
    assert again == found[::-1]


@pytest.mark.parametrize("name", ["plain", "no bos", "a line break"])
def test_the_harness_scores_as_our_own_tasks_do(model, name, lm_eval):
    template = TEMPLATES[name]
    whole = dataclasses.replace(model, tokenizer=tokenizer(template))
    runner, asked = ModelRunner(whole, model.params), examples(2, count=6)
    lm = harness.harness_model(runner)
    if template is not None:
        # The harness has every prompt written before it asks for the first score.
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    requests = [
        SimpleNamespace(args=pair)
        for prompt, options in asked
        for pair in sent(runner, template, prompt, options)
    ]
    found = [score for score, _ in lm.loglikelihood(requests)]
    ours = np.concatenate(runner.log_likelihoods(*zip(*asked, strict=True)))
    np.testing.assert_array_equal(np.float32(found), np.float32(ours))
    # Answers are asked for in the same way.
    first = requests[0].args[0]
    (prompt,) = ([0] * (template is None),)
    ids = whole.tokenizer(first, add_special_tokens=False).input_ids
    assert lm.tok_encode(first) == [*prompt, *ids]


def test_a_text_without_a_context_follows_one_bos(model, lm_eval):
    lm = harness.harness_model(ModelRunner(model, model.params))
    ids = model.tokenizer("abc", add_special_tokens=False).input_ids
    (found,) = lm.loglikelihood([SimpleNamespace(args=("", "abc"))])
    assert found[0] == pytest.approx(direct(model, [0, *ids], len(ids)), abs=1e-4)
    # Written in data it is text, and this tokenizer has no letters for it.
    with pytest.raises(UserError, match="the control token '<s>' of a row as plain"):
        lm.loglikelihood([SimpleNamespace(args=("", "<s>abc"))])
