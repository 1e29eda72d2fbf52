"""What templates of each family make of an exchange: mask, BOS, system message."""

import dataclasses

import numpy as np
import pytest
from templates_case import ANSWER, FAMILIES, GEMMA, QUESTION, tokenizer

from sbr_jax import data
from sbr_jax.typing import UserError


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def taught(family, records, row=0):
    """The text under the mask."""
    tok = tokenizer(family)
    found = data.encode_chat(tok, records, 160)
    return tok.decode(found.tokens[row][found.mask[row] == 1])


def test_the_mask_is_the_answer_with_its_stop_token(family):
    answers = [ANSWER, "No.", "Two\n\nparts"]
    records = [(QUESTION, answer) for answer in answers]
    for row, answer in enumerate(answers):
        expected = f"{family.space}{answer}{family.stop}"
        assert taught(family, records, row) == expected


def test_of_several_turns_the_last_answer_counts(family):
    turns = (
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": QUESTION},
    )
    expected = f"{family.space}{ANSWER}{family.stop}"
    assert taught(family, [data.Record(turns, ANSWER)]) == expected


def test_a_sequence_has_one_bos_and_keeps_the_prompt(family):
    tok = tokenizer(family)
    found = data.encode_chat(tok, [(QUESTION, ANSWER)], 160)
    (prompt,) = data.encode_prompts(tok, [QUESTION])
    ids = [found.tokens[0].tolist(), prompt]
    for tokens in ids:
        count = 0 if family.bos is None else tokens.count(tok.bos_token_id)
        assert count == (family.bos is not None)
        if count:
            assert tokens[0] == tok.bos_token_id
    start = int(np.argmax(found.mask[0]))
    assert found.tokens[0][:start].tolist() == prompt
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


def test_prompts_longer_than_the_context_are_refused(family):
    tok = tokenizer(family)
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
