"""Encoding marks exactly the answer; batches are a function of seed and step."""

import numpy as np
import pytest
from checkpoints import STORIES, needs_stories

from sbr_jax import data, models
from sbr_jax.data.batches import batch
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


def tokenizer(template=MARKED):
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
    found = data.encode_chat(tokenizer(template), [("a b", "c d"), ("e", "e")], 10)
    assert words(found.tokens[0]) == (
        "<bos> <user> a b <assistant> c d <eos> <pad> <pad>"
    )
    assert words(found.tokens[0][found.mask[0] == 1]) == "c d <eos>"
    assert words(found.tokens[1][found.mask[1] == 1]) == "e <eos>"
    assert (found.tokens.dtype, found.mask.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix"])
def test_only_the_last_answer_of_a_conversation_counts(template):
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    record = data.Record(turns, "d", system="e")
    found = data.encode_chat(tokenizer(template), [record], 16)
    assert words(found.tokens[0][found.mask[0] == 1]) == "d <eos>"
    assert words(found.tokens[0][:3]) == "<bos> <system> e"


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix"])
def test_nothing_after_the_stop_token_counts(template):
    longer = template.replace("{% else %}", " a{% else %}", 1).replace(
        "{{ eos_token }}{% endgeneration %} a", "{{ eos_token }} a{% endgeneration %}"
    )
    found = data.encode_chat(tokenizer(longer), [("a", "b")], 10)
    assert words(found.tokens[0][:7]).endswith("a")
    assert words(found.tokens[0][found.mask[0] == 1]) == "b <eos>"


def test_prompts_end_where_the_answer_begins():
    found = data.encode_prompts(tokenizer(), ["a b", data.Record("c", "d")], system="e")
    assert words(found[0]) == "<bos> <system> e <user> a b <assistant>"
    assert words(found[1]) == "<bos> <user> c <assistant>"
    full = data.encode_chat(tokenizer(), [("c", "d")], 8)
    assert full.tokens[0][: len(found[1])].tolist() == found[1]
    assert full.mask[0][: len(found[1])].sum() == 0


@pytest.mark.parametrize("start", ["{{ bos_token }} {{ bos_token }}", ""])
def test_a_wrong_number_of_bos_tokens_is_refused(start):
    template = start + MARKED.removeprefix("{{ bos_token }}") + "{# bos_token #}"
    with pytest.raises(UserError, match="<bos>"):
        data.encode_chat(tokenizer(template), [("a", "b")], 10)
    with pytest.raises(UserError, match="<bos>"):
        data.encode_prompts(tokenizer(template), ["a"])


def test_a_template_without_bos_needs_none():
    template = MARKED.removeprefix("{{ bos_token }}")
    found = data.encode_chat(tokenizer(template), [("a", "b")], 10)
    assert words(found.tokens[0][:2]) == "<user> a"


def test_no_template_is_a_users_error_unless_one_is_passed():
    with pytest.raises(UserError, match="no chat template"):
        data.encode_chat(tokenizer(None), [("a", "b")], 10)
    with pytest.raises(UserError, match="no chat template"):
        data.encode_prompts(tokenizer(None), ["a"])
    found = data.encode_chat(tokenizer(None), [("a", "b")], 10, template=MARKED)
    np.testing.assert_array_equal(
        found.tokens, data.encode_chat(tokenizer(), [("a", "b")], 10).tokens
    )


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{{ bos_token }}{% if messages|length > 1 %} a{% endif %}" + (
        PLAIN.removeprefix("{{ bos_token }}")
    )
    with pytest.raises(UserError, match="cannot locate the answer"):
        data.encode_chat(tokenizer(template), [("a", "b")], 10)


def test_what_a_template_refuses_is_a_users_error():
    template = "{{ raise_exception('no system role') }}" + MARKED
    with pytest.raises(UserError, match="no system role"):
        data.encode_prompts(tokenizer(template), ["a"])


def test_too_long_is_an_error_or_counted():
    records = [("a", "b"), ("a", "b c d e"), ("a b c d e", "b")]
    encode = data.encode_chat
    with pytest.raises(UserError, match="record 1 has 9 tokens, max_length is 6"):
        encode(tokenizer(), records, 6)
    found = encode(tokenizer(), records, 6, too_long="drop")
    assert (len(found), found.dropped, found.truncated) == (1, 2, 0)
    # The third would lose its whole answer, so it is dropped all the same.
    found = encode(tokenizer(), records, 6, too_long="truncate")
    assert (len(found), found.dropped, found.truncated) == (2, 1, 1)
    assert words(found.tokens[1]) == "<bos> <user> a <assistant> b c"
    with pytest.raises(UserError, match="too_long"):
        encode(tokenizer(), records, 6, too_long="cut")


def test_plain_text_gets_one_bos_and_one_eos():
    found = data.encode_text(tokenizer(None), [("a b", " c")], 8)
    assert words(found.tokens[0][:5]) == "<bos> a b c <eos>"
    assert words(found.tokens[0][found.mask[0] == 1]) == "c <eos>"
    assert data.encode_text_prompts(tokenizer(None), ["a b"]) == [[2, 7, 8]]
    with pytest.raises(UserError, match="encode_chat"):
        data.encode_text(tokenizer(None), [data.Record("a", "b", system="c")], 8)


@needs_stories
def test_plain_text_of_a_subword_tokenizer_is_that_of_the_whole():
    subwords = models.load_tokenizer(STORIES / "hf")
    found = data.encode_text(subwords, [("Once upon", " a time")], 16, add_eos=False)
    ids = subwords("Once upon a time")["input_ids"]
    assert found.tokens[0][: len(ids)].tolist() == ids
    answer = found.tokens[0][found.mask[0] == 1]
    assert subwords.decode(answer).strip() == "a time"


def numbers(size, start=0, length=1):
    rows = np.arange(start, start + size)[:, None]
    tokens = np.tile(rows, (1, length))
    return data.TokenDataset(tokens, np.ones((size, length)))


def draws(dataset, size, steps, seed=0, **parts):
    taken = [batch(dataset, size, seed, step, **parts) for step in steps]
    return np.concatenate([part["tokens"][:, 0] for part in taken]).tolist()


def test_a_batch_depends_on_seed_and_step_only():
    dataset = numbers(10)
    late = draws(dataset, 4, [7])
    assert late == draws(dataset, 4, range(8))[-4:]
    assert late == draws(numbers(10), 4, [7])
    assert draws(dataset, 4, range(5)) != draws(dataset, 4, range(5), seed=1)


def test_every_epoch_holds_every_example_once_in_a_new_order():
    found = draws(numbers(10), 4, range(5))
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10] != found[10:]


def test_a_set_smaller_than_a_batch_repeats():
    assert sorted(draws(numbers(3), 6, [0])) == [0, 0, 1, 1, 2, 2]


def test_processes_share_a_batch_without_overlap():
    dataset = numbers(10)
    whole = draws(dataset, 4, [3])
    parts = [draws(dataset, 4, [3], process_index=i, process_count=2) for i in range(2)]
    assert parts == [whole[::2], whole[1::2]]
    with pytest.raises(UserError, match="multiple of the 2"):
        batch(dataset, 3, 0, 0, process_count=2)


def test_batch_mistakes_are_named():
    with pytest.raises(UserError, match="without examples"):
        batch(numbers(0), 2, 0, 0)
    with pytest.raises(UserError, match="at least 0"):
        batch(numbers(2), 2, 0, -1)
    with pytest.raises(UserError, match="one shape"):
        data.TokenDataset(np.ones((2, 3)), np.ones((2, 4)))


PROMPTS = ([5, 6, 7, 8], [9, 10], [11], [12, 13, 14, 15])


def padded(prompts, side, pad=0, bos=(), answer=(20, 21)):
    """Tokens, answer mask and attention mask, as a tokenizer pads them."""
    rows = [[*bos, *prompt, *answer] for prompt in prompts]
    longest = max(map(len, rows))
    fill = {
        "left": lambda row, value: [value] * (longest - len(row)) + row,
        "right": lambda row, value: row + [value] * (longest - len(row)),
    }[side]
    marks = [[0] * (len(row) - len(answer)) + [1] * len(answer) for row in rows]
    tokens = np.array([fill(row, pad) for row in rows])
    return (
        tokens,
        np.array([fill(m, 0) for m in marks]),
        np.array([fill([1] * len(row), 0) for row in rows]),
    )


@pytest.mark.parametrize("pad", [0, 1, 21])
@pytest.mark.parametrize("bos", [(), (1,)])
@pytest.mark.parametrize("told", [False, True])
def test_rows_padded_on_the_left_are_refused(pad, bos, told):
    tokens, mask, attention = padded(PROMPTS, "right", pad, bos)
    given = {"attention_mask": attention} if told else {}
    assert len(data.TokenDataset(tokens, mask, **given)) == 4
    tokens, mask, attention = padded(PROMPTS, "left", pad, bos)
    given = {"attention_mask": attention} if told else {}
    with pytest.raises(UserError, match=r"padded on the right, got 2 of 4 with"):
        data.TokenDataset(tokens, mask, **given)


def test_a_row_alone_is_told_by_its_attention_mask():
    tokens, mask, attention = (rows[1:2] for rows in padded(PROMPTS, "left"))
    assert len(data.TokenDataset(tokens, mask)) == 1
    with pytest.raises(UserError, match="got 1 of 1"):
        data.TokenDataset(tokens, mask, attention_mask=attention)
    with pytest.raises(UserError, match="an attention_mask of 0 and 1 of the shape"):
        data.TokenDataset(tokens, mask, attention_mask=attention[0])
    whole = data.TokenDataset(tokens, mask, attention_mask=np.ones_like(mask))
    assert whole.attention_mask is None


def test_rows_of_one_length_that_begin_alike_are_no_padding():
    """Nor are repeated tokens at the start of some prompts, or parts of a set."""
    tokens, mask, _ = padded([[3, 3, 5], [3, 4, 6], [7, 7, 7]], "right")
    assert len(data.TokenDataset(tokens, mask, attention_mask=np.ones_like(mask))) == 3
    rows = [[1, 5, 6], [1, 7, 8], [1, 1, 9]]
    longer = data.TokenDataset(*padded([*rows, [1, 2]], "right")[:2])
    assert len(data.take(longer, [0, 1, 2])) == 3
    same = np.full((4, 6), 3)
    assert len(data.TokenDataset(same, np.eye(6)[[5] * 4])) == 4


@pytest.mark.parametrize(
    ("tokens", "mask", "said"),
    [
        ([[1.5, 2]], [[0, 1]], "whole numbers of at least 0 as tokens, got other"),
        ([[-100, 2]], [[0, 1]], "whole numbers"),
        ([[2**31, 2]], [[0, 1]], "whole numbers"),
        ([[np.nan, 2]], [[0, 1]], "whole numbers"),
        ([[True, False]], [[0, 1]], "whole numbers of at least 0 as tokens, got bool"),
        ([["a", "b"]], [[0, 1]], "whole numbers"),
        ([[1, 2]], [[0, np.nan]], "a mask of 0 and 1"),
        ([[1, 2]], [[0, -1]], "a mask of 0 and 1"),
        ([[1, 2]], [[0, 7]], "a mask of 0 and 1"),
    ],
)
def test_what_is_no_token_or_mask_is_refused(tokens, mask, said):
    with pytest.raises(UserError, match=said):
        data.TokenDataset(np.array(tokens), np.array(mask))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_mixture_replaces_the_fraction(fraction):
    mixed = data.mixture(numbers(20), numbers(30, 100), fraction, seed=0)
    found = mixed.tokens[:, 0]
    assert len(found) == 20 == len(set(found.tolist()))
    assert (found >= 100).sum() == round(20 * fraction)


def test_a_mixture_repeats_only_when_its_set_is_used_up():
    mixed = data.mixture(numbers(4), numbers(2, 100), 0.5, seed=0, size=10)
    counts = np.unique(mixed.tokens[:, 0], return_counts=True)[1]
    assert counts.sum() == 10
    assert sorted(counts[:4].tolist()) == [1, 1, 1, 2]
    assert sorted(counts[4:].tolist()) == [2, 3]


def test_mixture_mistakes_are_named():
    with pytest.raises(UserError, match="fraction"):
        data.mixture(numbers(2), numbers(2), 1.5, seed=0)
    with pytest.raises(UserError, match="empty"):
        data.mixture(numbers(2), numbers(0), 0.5, seed=0)


def test_subsets_nest_and_concatenation_pads():
    small, large = (
        set(data.subset(numbers(20), n, seed=3).tokens[:, 0].tolist()) for n in (5, 9)
    )
    assert len(small) == 5
    assert small < large
    joined = data.concatenate([numbers(2, 1), numbers(3, 5, length=4)])
    assert joined.tokens.shape == (5, 4)
    assert joined.mask[0].tolist() == [1, 0, 0, 0]
    with pytest.raises(UserError, match="at least one"):
        data.concatenate([])
