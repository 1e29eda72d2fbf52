"""Control tokens in data are plain text; other texts keep their tokens."""

import pytest
from checkpoints import STORIES, needs_stories
from templates_case import FAMILIES, SPECIAL, tokenizer

from sbr_jax import data, models
from sbr_jax.data import control
from sbr_jax.evaluation.runner import ModelRunner, encode_options
from sbr_jax.typing import UserError

NAMES = sorted(FAMILIES)


def specials(tok, ids):
    return [i for i in ids if int(i) in control.special_ids(tok)]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_token_in_a_message_does_nothing(name):
    tok = tokenizer(FAMILIES[name])
    said = [(f"Say {t} now", f"I say {t} too") for t in ("it", *SPECIAL)]
    rows = data.encode_chat(tok, said, 512)
    prompts = data.encode_prompts(tok, [question for question, _ in said])
    assert rows.escaped == len(SPECIAL)
    clean = [i for i in specials(tok, rows.tokens[0]) if i]
    assert clean
    for row, prompt, texts in zip(rows.tokens, prompts, said, strict=True):
        assert [i for i in specials(tok, row) if i] == clean
        assert specials(tok, prompt) == specials(tok, prompts[0])
        assert all(text in tok.decode(row) for text in texts)
        assert row[: len(prompt)].tolist() == prompt


def test_tokens_that_only_the_template_writes_are_guarded_in_what_users_say():
    tok = tokenizer(FAMILIES["thinking"])
    tag = tok.convert_tokens_to_ids("</think>")
    rows = data.encode_chat(tok, [("Is </think> a tag?", "Yes.")], 512)
    assert rows.tokens[0].tolist().count(tag) == 1  # that of the template
    assert "Is </think> a tag?" in tok.decode(rows.tokens[0])


def test_plain_text_has_no_control_tokens_either():
    tok = tokenizer(FAMILIES["llama-2"])
    rows = data.encode_text(tok, [("Say </s> or", " <s> no")], 64)
    assert specials(tok, [i for i in rows.tokens[0] if i]) == [
        tok.bos_token_id,
        tok.eos_token_id,
    ]
    assert rows.escaped == 1
    taught = rows.tokens[0][rows.mask[0] > 0]
    assert tok.decode(taught) == " <s> no</s>"
    (prompt,) = data.encode_text_prompts(tok, ["Say </s> or"])
    assert specials(tok, prompt) == [tok.bos_token_id]
    assert rows.tokens[0][: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("chat", [True, False])
def test_options_hold_no_control_tokens(chat):
    tok = tokenizer(FAMILIES["llama-2"])
    runner = ModelRunner(models.Model(None, None, tok, None), None, chat=chat)
    pairs = runner.pairs("Say </s> or", [" a</s>", " b"])
    assert all(specials(tok, before) == [tok.bos_token_id] for before, _ in pairs)
    assert all(specials(tok, after) == [] for _, after in pairs)
    # Text that a template has written is taken as it is.
    ((_, after),) = encode_options(tok, "<s>a", ["b</s>"], plain=False)
    assert specials(tok, after) == [tok.eos_token_id]


@needs_stories
def test_sentencepiece_puts_no_space_after_a_control_token():
    tok = models.load_tokenizer(STORIES / "hf")
    text = control.mark(tok, "Once</s>upon")
    ids = control.encode(tok, text)
    assert tok.decode(ids) == "Once</s>upon"
    assert tok.eos_token_id not in ids
    assert control.encode(tok, "Once upon") == tok.encode(
        "Once upon", add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half \ud83d a face", "lone surrogate .* as character 5 of 13"),
        ("a\ufdd0", r"noncharacter U\+FDD0 as character 1 of 2"),
    ],
)
def test_what_is_no_text_is_told_with_its_row(text, message):
    tok = tokenizer(FAMILIES["chatml"])
    good = ("Hello.", "Hello.")
    for bad in ((text, "Yes."), ("Yes?", text), data.Record("a", "b", system=text)):
        with pytest.raises(UserError, match=f"^record 1: .*{message}") as caught:
            data.encode_chat(tok, [good, bad], 256)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^record 0: .*{message}"):
        data.encode_text(tok, [(text, "Yes.")], 256)
    for encode in (data.encode_prompts, data.encode_text_prompts):
        with pytest.raises(UserError, match=f"^prompt 1: .*{message}"):
            encode(tok, ["Hello.", text])


def test_counts_are_added_where_sets_are_joined():
    tok = tokenizer(FAMILIES["chatml"])
    one = data.encode_chat(tok, [("Say <|im_end|>.", "No.")], 256)
    assert data.concatenate([one, one]).escaped == 2
