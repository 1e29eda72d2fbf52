"""Suffixes are sent as text: where they stand in a prompt, and which ones survive."""

import functools

import numpy as np
import pytest
import tiny
from gcg_case import FIRST, LENGTH, PROMPTS, TARGETS, attack, found

from sbr_jax.attacks.suffix import (
    SplitPrompt,
    ascii_tokens,
    gcg_prompts,
    lay_out,
    round_trips,
    text_round_trips,
)
from sbr_jax.data import encode_prompts
from sbr_jax.typing import UserError

# --- the filter in the search -----------------------------------------------------


def test_candidates_that_do_not_survive_are_never_moved_to():
    asked = {token for prompt in PROMPTS for part in prompt for token in part}
    liked = set(found().suffixes.ravel().tolist()) - asked - {FIRST}
    seen = []

    def refuses_liked(prompts):
        seen.extend(prompts)
        return np.array([liked.isdisjoint(prompt) for prompt in prompts])

    result = attack(round_trip=refuses_liked)
    assert liked
    assert liked.isdisjoint(result.suffixes.ravel().tolist())
    assert liked.isdisjoint(result.best_suffixes.ravel().tolist())
    assert (result.best_losses[:, -1] < result.losses[:, 0]).all()
    # What fills the place of a refused candidate is no candidate: every step moves.
    assert (np.diff(result.losses) != 0).all()
    # The whole prompt was asked about, without its target.
    for before, after in PROMPTS:
        whole = [*before, *[FIRST] * LENGTH, *after]
        assert whole in seen
    assert not any(13 in prompt[-3:] and 15 in prompt[-1:] for prompt in seen)


def test_where_nothing_survives_the_search_stays():
    result = attack(
        round_trip=lambda prompts: np.array([p.count(FIRST) == LENGTH for p in prompts])
    )
    assert (result.suffixes == FIRST).all()
    assert (result.losses == result.losses[:, :1]).all()


def test_a_round_trip_is_checked():
    with pytest.raises(UserError, match=r"prompts\[0\].*initial_token"):
        attack(round_trip=lambda prompts: np.zeros(len(prompts), bool))
    with pytest.raises(UserError, match=r"round_trip.*bool \[3\]"):
        attack(round_trip=lambda prompts: np.ones(2, bool))


# --- a tokenizer that merges ------------------------------------------------------

VOCABULARY = ["<bos>", "<user>", "<end>", "a", "b", "ab", "Ġ", "!", "Ġ!", "Ã", "x"]
BOS, USER, END, A, B, AB, SPACE, MARK, SPACE_MARK, HALF, X = range(len(VOCABULARY))


@functools.cache
def tokenizer():
    """Byte-level BPE of eleven tokens, where "a" and "b" merge, with a template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    merges = [("a", "b"), ("Ġ", "!")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=["<user>"],
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<user>"
            "{{ m['content'] }}<end>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def test_prompts_are_split_where_the_template_puts_the_suffix():
    split = gcg_prompts(tokenizer(), ["ab", "xa!"], 3, "!")
    assert split[0] == SplitPrompt([BOS, USER, AB], [END])
    assert split[1] == SplitPrompt([BOS, USER, X, A, MARK], [END])
    (whole,) = encode_prompts(tokenizer(), ["ab ! ! !"])
    assert [*split[0].before, *[SPACE_MARK] * 3, *split[0].after] == whole


@pytest.mark.parametrize(
    ("question", "placeholder"),
    [("a", "aa"), ("a", "é"), ("a !", "!"), ("a ! ! ! b", "!")],
    ids=["two", "unknown", "question ends so", "question holds"],
)
def test_a_placeholder_that_cannot_be_found_is_refused(question, placeholder):
    with pytest.raises(UserError, match=r"questions\[[01]\].*placeholder_token"):
        gcg_prompts(tokenizer(), ["x", question], 3, placeholder)


def test_printable_ascii_is_allowed_and_special_tokens_are_not():
    allowed = ascii_tokens(tokenizer(), len(VOCABULARY) + 3)
    wanted = [A, B, AB, SPACE, MARK, SPACE_MARK, X]
    assert np.flatnonzero(allowed).tolist() == wanted
    assert allowed.shape == (len(VOCABULARY) + 3,)


def test_the_round_trip_is_of_the_whole_prompt():
    check = round_trips(tokenizer())
    kept = [[BOS, USER, A, X, B, END], [BOS, USER, AB, SPACE_MARK, END]]
    lost = [[BOS, USER, A, B, END], [BOS, USER, X, SPACE, MARK, END]]
    assert check([*kept, *lost]).tolist() == [True, True, False, False]


def test_an_attack_on_text_can_be_sent_as_text():
    split = gcg_prompts(tokenizer(), ["xa", "b"], LENGTH, "!")
    check, refused = round_trips(tokenizer()), []

    def watched(prompts):
        kept = check(prompts)
        refused.extend(p for p, ok in zip(prompts, kept, strict=True) if not ok)
        return kept

    sent = attack(
        split,
        TARGETS[:2],
        round_trip=watched,
        initial_token=SPACE_MARK,
        allowed=ascii_tokens(tokenizer(), tiny.VOCAB),
    )
    layout = lay_out(split, TARGETS[:2], LENGTH)
    for suffixes in (sent.suffixes, sent.best_suffixes):
        assert check(layout.asked(suffixes[:, None])).all()
    assert (sent.best_losses[:, -1] < sent.losses[:, 0]).all()
    # Some that would survive alone do not in their prompt: "xa" merges with "b…".
    merging = [p[4:-1] for p in refused if p[:4] == [BOS, USER, X, A] and p[4] == B]
    assert check(merging).any()


# --- a tokenizer that puts a space before every piece of text ----------------------


def spaced():
    """Like Llama 2's: "<s>[" is decoded to "<s> [", which is encoded differently."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *"▁[]!abi", "▁[", "▁!", "▁▁"]
    merges = [("▁", "["), ("▁", "!"), ("▁", "▁")]
    ids = {token: i for i, token in enumerate(names)}
    inner = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
            "[i] {{ m['content'].strip() }} [i]{% else %}[a] {{ m['content'] }} [b]"
            "{% endif %}{% endfor %}"
        ),
    )


@pytest.mark.parametrize("system", [None, "ba"])
def test_a_suffix_is_sent_as_text_that_the_template_writes(system):
    own, questions = spaced(), ["ab", "b a"]
    split = gcg_prompts(own, questions, 3, "!", system=system)
    check = text_round_trips(own, questions, split, system=system)
    of = own.convert_tokens_to_ids
    suffixes = [["▁!"] * 3, ["▁", "a", "▁!"], ["▁", "!", "a"], ["a", "b", "▁"]]
    whole = [prompt.asked(of(suffix)) for prompt in split for suffix in suffixes]
    assert not round_trips(own)(whole).any()
    # "▁" and "!" merge, and the template strips a blank at the end.
    assert check(whole).tolist() == [True, True, False, False] * 2
