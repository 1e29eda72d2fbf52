"""Chat templates in the manner of the great families, over a tiny byte-level BPE."""

import dataclasses
import functools

import numpy as np
import pytest

from sbr_jax import data
from sbr_jax.typing import UserError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    template: str
    bos: str | None
    eos: str
    stop: str
    """What ends an answer; everything after it is not learned."""
    space: str = ""
    """What the template sets before the answer, as a part of it."""


FAMILIES = {
    "llama-2": Family(LLAMA2, "<s>", "</s>", " </s>", space=" "),
    "llama-3": Family(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama-3-base-eos": Family(LLAMA3, "<|begin_of_text|>", "</s>", "<|eot_id|>"),
    "chatml": Family(CHATML, None, "<|im_end|>", "<|im_end|>"),
    "chatml-other-eos": Family(CHATML, None, "</s>", "<|im_end|>"),
    "chatml-marked": Family(CHATML_MARKED, None, "<|im_end|>", "<|im_end|>"),
    "chatml-marked-other-eos": Family(CHATML_MARKED, None, "</s>", "<|im_end|>"),
    "gemma": Family(GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
}
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
QUESTION, ANSWER = "How long is a day?", "A day has 24 hours.\nNo more."


@functools.cache
def trained():
    """A byte-level BPE that merges common pairs, line breaks among them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = f"user\nmodel\nassistant\n\n[INST] [/INST] {QUESTION} {ANSWER}\n"
    inner.train_from_iterator([text] * 4, trainer)
    return inner.to_str()


def tokenizer(family):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()),
        pad_token="<pad>",
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


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
