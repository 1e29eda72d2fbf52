"""Chat templates: mask, BOS, system message, lengths; and plain text without one."""

import dataclasses

import numpy as np
import pytest
from checkpoints import STORIES, needs_stories
from templates_case import ANSWER, FAMILIES, GEMMA, QUESTION, tokenizer

from sbr_jax import data, models
from sbr_jax.typing import UserError

WORDS = [
    *("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"),
    *"abcde",
]
MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant> "
    "{% generation %}{{ message['content'] }} {{ eos_token }}{% endgeneration %}"
    "{% else %} <{{ message['role'] }}> {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def words_tokenizer(template=MARKED):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=template,
    )


def words(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix"])
def test_the_mask_is_the_answer_with_its_stop_token(template):
    found = data.encode_chat(
        words_tokenizer(template), [("a b", "c d"), ("e", "e")], 10
    )
    assert words(found.tokens[0]) == (
        "<bos> <user> a b <assistant> c d <eos> <pad> <pad>"
    )
    assert words(found.tokens[0][found.mask[0] == 1]) == "c d <eos>"
    assert words(found.tokens[1][found.mask[1] == 1]) == "e <eos>"
    assert (found.tokens.dtype, found.mask.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix"])
def test_nothing_after_the_stop_token_counts(template):
    longer = template.replace("{% else %}", " a{% else %}", 1).replace(
        "{{ eos_token }}{% endgeneration %} a", "{{ eos_token }} a{% endgeneration %}"
    )
    found = data.encode_chat(words_tokenizer(longer), [("a", "b")], 10)
    assert words(found.tokens[0][:7]).endswith("a")
    assert words(found.tokens[0][found.mask[0] == 1]) == "b <eos>"


@pytest.mark.parametrize("start", ["{{ bos_token }} {{ bos_token }}", ""])
def test_a_wrong_number_of_bos_tokens_is_refused(start):
    template = start + MARKED.removeprefix("{{ bos_token }}") + "{# bos_token #}"
    with pytest.raises(UserError, match="<bos>"):
        data.encode_chat(words_tokenizer(template), [("a", "b")], 10)
    with pytest.raises(UserError, match="<bos>"):
        data.encode_prompts(words_tokenizer(template), ["a"])


def test_a_template_without_bos_needs_none():
    template = MARKED.removeprefix("{{ bos_token }}")
    found = data.encode_chat(words_tokenizer(template), [("a", "b")], 10)
    assert words(found.tokens[0][:2]) == "<user> a"


def test_no_template_is_a_users_error_unless_one_is_passed():
    with pytest.raises(UserError, match="no chat template"):
        data.encode_chat(words_tokenizer(None), [("a", "b")], 10)
    with pytest.raises(UserError, match="no chat template"):
        data.encode_prompts(words_tokenizer(None), ["a"])
    found = data.encode_chat(words_tokenizer(None), [("a", "b")], 10, template=MARKED)
    np.testing.assert_array_equal(
        found.tokens, data.encode_chat(words_tokenizer(), [("a", "b")], 10).tokens
    )


def test_too_long_is_an_error_or_counted():
    records = [("a", "b"), ("a", "b c d e"), ("a b c d e", "b")]
    encode = data.encode_chat
    with pytest.raises(UserError, match="record 1 has 9 tokens, max_length is 6"):
        encode(words_tokenizer(), records, 6)
    found = encode(words_tokenizer(), records, 6, too_long="drop")
    assert (len(found), found.dropped, found.truncated) == (1, 2, 0)
    # The third would lose its whole answer, so it is dropped all the same.
    found = encode(words_tokenizer(), records, 6, too_long="truncate")
    assert (len(found), found.dropped, found.truncated) == (2, 1, 1)
    assert words(found.tokens[1]) == "<bos> <user> a <assistant> b c"
    with pytest.raises(UserError, match="too_long"):
        encode(words_tokenizer(), records, 6, too_long="cut")


def test_plain_text_gets_one_bos_and_one_eos():
    found = data.encode_text(words_tokenizer(None), [("a b", " c")], 8)
    assert words(found.tokens[0][:5]) == "<bos> a b c <eos>"
    assert words(found.tokens[0][found.mask[0] == 1]) == "c <eos>"
    assert data.encode_text_prompts(words_tokenizer(None), ["a b"]) == [[2, 7, 8]]
    with pytest.raises(UserError, match="encode_chat"):
        data.encode_text(words_tokenizer(None), [data.Record("a", "b", system="c")], 8)


@needs_stories
def test_plain_text_of_a_subword_tokenizer_is_that_of_the_whole():
    subwords = models.load_tokenizer(STORIES / "hf")
    found = data.encode_text(subwords, [("Once upon", " a time")], 16, add_eos=False)
    ids = subwords("Once upon a time")["input_ids"]
    assert found.tokens[0][: len(ids)].tolist() == ids
    answer = found.tokens[0][found.mask[0] == 1]
    assert subwords.decode(answer).strip() == "a time"


# --- templates of the great families --------------------------------------------------


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def taught(family, records, row=0):
    """The text under the mask."""
    tok = tokenizer(family)
    found = data.encode_chat(tok, records, 160)
    return tok.decode(found.tokens[row][found.mask[row] == 1])


def test_a_sequence_has_one_bos_where_the_family_has_it(family):
    tok = tokenizer(family)
    found = data.encode_chat(tok, [(QUESTION, ANSWER)], 160)
    (prompt,) = data.encode_prompts(tok, [QUESTION])
    for tokens in (found.tokens[0].tolist(), prompt):
        places = [i for i, t in enumerate(tokens) if t == tok.bos_token_id]
        assert family.bos is None or places == [0]
    assert QUESTION in tok.decode(prompt)


def test_a_tokenizer_that_adds_a_bos_of_its_own_doubles_nothing():
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer(FAMILIES["llama-3"])
    bos = "<|begin_of_text|>"
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tok.bos_token_id)]
    )
    assert tok("x")["input_ids"][0] == tok.bos_token_id  # it does add one
    (prompt,) = data.encode_prompts(tok, [QUESTION])
    assert prompt.count(tok.bos_token_id) == 1
    found = data.encode_chat(tok, [(QUESTION, ANSWER)], 160)
    assert (found.tokens == tok.bos_token_id).sum() == 1


def test_a_system_message_is_kept_or_refused(family):
    record = data.Record(QUESTION, ANSWER, system="Be brief.")
    if family.template == GEMMA:
        with pytest.raises(UserError, match="System role not supported"):
            data.encode_chat(tokenizer(family), [record], 160)
        return
    assert taught(family, [record]) == f"{family.space}{ANSWER}{family.stop}"
    (prompt,) = data.encode_prompts(tokenizer(family), [QUESTION], system="Be brief.")
    assert "Be brief." in tokenizer(family).decode(prompt)


def test_a_special_token_inside_an_answer_does_not_end_it():
    template = GEMMA.replace("| trim }}<end_of_turn>", "| trim }}<end_of_turn> done")
    family = dataclasses.replace(FAMILIES["gemma"], template=template)
    assert taught(family, [(QUESTION, "No.")]) == "No.<end_of_turn> done\n"


def test_prompts_longer_than_the_context_are_refused():
    tok = tokenizer(FAMILIES["llama-2"])
    prompts = data.encode_prompts(tok, ["a", QUESTION])
    longest = max(map(len, prompts))
    fitting = data.encode_prompts(tok, ["a", QUESTION], max_length=longest)
    assert fitting == prompts
    message = (
        f"at most {longest - 1} tokens, got 1 longer ones, the longest of {longest}"
    )
    with pytest.raises(UserError, match=message):
        data.encode_prompts(tok, ["a", QUESTION], max_length=longest - 1)
    with pytest.raises(UserError, match="at most 1 tokens, got 2 longer"):
        data.encode_text_prompts(tok, ["How long?", QUESTION], max_length=1)
    record = (QUESTION, ANSWER)
    found = data.encode_chat(tok, [record], longest - 1, too_long="truncate")
    assert (len(found), found.dropped) == (0, 1)


@pytest.mark.parametrize("encode", [data.encode_prompts, data.encode_text_prompts])
def test_a_text_is_no_list_of_prompts(encode):
    with pytest.raises(UserError, match="expected a list of prompts, got a text"):
        encode(None, "How do I bake bread?")
