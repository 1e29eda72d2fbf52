"""Encodes text records as tokens: chat templates, answer masks, plain text.

The answer's mask comes from the template's ``{% generation %}`` blocks if it has them,
else from the difference to the prompt's own encoding. Fixed text before the answer is
never learnt. Only the template adds special tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data import control
from sbr_jax.data import template as chat
from sbr_jax.data.batches import TokenDataset
from sbr_jax.data.exchange import check_bos, encode_exchange
from sbr_jax.data.records import Record, RecordLike, as_record
from sbr_jax.typing import UserError


def encode_chat(
    tokenizer: Any,
    records: Iterable[RecordLike],
    max_length: int,
    *,
    template: str | None = None,
    too_long: str = "error",
    names: Sequence[str] | None = None,
) -> TokenDataset:
    """Encodes exchanges with the tokenizer's chat template.

    **Guarantee**: the mask covers exactly the last answer and its stop token. The text
    before it equals what :func:`encode_prompts` gives a model to answer. Every sequence
    begins with the BOS token at most once, and exactly once if the template asks for
    one. Control tokens in a record's text are plain text; the set counts such records
    as ``escaped``.

    Args:
      tokenizer: a transformers tokenizer.
      records: ``Record`` or ``(prompt, response)``.
      max_length: T.
      template: a chat template to use instead of the tokenizer's own.
      too_long: what to do with more than T tokens: ``"error"``, ``"drop"`` or
        ``"truncate"`` (cut the answer's end); the set counts these records.
      names: the records' names in errors; None for their numbers from 0.

    Returns:
      ``N`` examples, padded to T.

    Raises:
      UserError: naming the record, if there is no template or it fails, or if a
        sequence is too long, starts with a wrong number of BOS tokens, or has an answer
        that cannot be located.
    """
    encode = functools.partial(encode_exchange, tokenizer, template=template)
    return _collect(tokenizer, records, max_length, too_long, encode, names)


def encode_prompts(
    tokenizer: Any,
    prompts: Iterable[str | Record | Sequence[Mapping[str, str]]],
    *,
    system: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """Encodes prompts with the chat template, ready for the model to answer.

    Args:
      tokenizer: a transformers tokenizer.
      prompts: text, messages, or records (whose answers are ignored).
      system: a system message for prompts that are text or messages.
      template: a chat template to use instead of the tokenizer's own.
      max_length: the most tokens of a prompt (the model's context, less the answer);
        None: no limit.

    Returns:
      Token ids, ending where the answer begins; unpadded.

    Raises:
      UserError: if there is no template, or for a wrong number of BOS tokens or a
        prompt that is too long.
    """
    out = []
    for number, prompt in enumerate(_list_of(prompts)):
        if not isinstance(prompt, Record):
            text = prompt if isinstance(prompt, str) else tuple(prompt)
            prompt = Record(text, system=system)
        with _of(f"prompt {number}"):
            asked = chat.place(tokenizer, prompt, template).asked
            tokens = control.encode(tokenizer, asked)
            check_bos(tokenizer, template, tokens)
        out.append(tokens)
    return _within(out, max_length)


def encode_text(
    tokenizer: Any,
    records: Iterable[RecordLike],
    max_length: int,
    *,
    add_eos: bool = True,
    too_long: str = "error",
) -> TokenDataset:
    """Encodes ``BOS prompt response EOS`` as plain text, for models without a template.

    Prompt and response are encoded in one piece, so the tokens are those of running
    text; a token that straddles the border belongs to the answer.

    Args:
      tokenizer: a fast transformers tokenizer.
      records: prompts as text, without system messages; the response follows directly,
        so include any space or line break between them.
      max_length: T.
      add_eos: whether the answer ends with the tokenizer's EOS token.
      too_long: ``"error"``, ``"drop"`` or ``"truncate"``.

    Returns:
      ``N`` examples, padded to T.

    Raises:
      UserError: for a sequence that is too long or a record that needs a template.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def one(record: Record) -> tuple[list[int], list[int]]:
        # Mark both at once: a control token may begin in one and end in the other.
        prompt = _plain(record)
        before = len(control.mark(tokenizer, prompt))
        whole = control.mark(tokenizer, prompt + record.response)
        tokens, spans = control.encode_spans(tokenizer, whole)
        mask = [int(end > before) for _, end in spans]
        if bos is not None:
            tokens, mask = [bos, *tokens], [0, *mask]
        if add_eos and eos is not None:
            tokens, mask = [*tokens, eos], [*mask, 1]
        return tokens, mask

    return _collect(tokenizer, records, max_length, too_long, one)


def encode_text_prompts(
    tokenizer: Any, prompts: Iterable[str], *, max_length: int | None = None
) -> list[list[int]]:
    """Encodes ``BOS prompt`` as plain text, for models without a template.

    Args:
      tokenizer: a transformers tokenizer.
      prompts: text.
      max_length: the most tokens of a prompt; None: no limit.

    Returns:
      Token ids, unpadded.
    """
    prompts = _list_of(prompts)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for number, prompt in enumerate(prompts):
        with _of(f"prompt {number}"):
            text = control.mark(tokenizer, prompt)
        encoded.append(first + control.encode(tokenizer, text))
    return _within(encoded, max_length)


def _list_of(prompts: Iterable[Any]) -> Iterable[Any]:
    """The prompts; refuses a single text, which would be read letter by letter."""
    if isinstance(prompts, str):
        raise UserError("expected a list of prompts, got a text: put it into a list")
    return prompts


def _within(prompts: list[list[int]], max_length: int | None) -> list[list[int]]:
    """The prompts; refuses any with more than ``max_length`` tokens."""
    long = (
        [] if max_length is None else [n for n in map(len, prompts) if n > max_length]
    )
    if long:
        raise UserError(
            f"expected prompts of at most {max_length} tokens, got {len(long)} longer "
            f"ones, the longest of {max(long)}: leave them out, or raise the context"
        )
    return prompts


def _plain(record: Record) -> str:
    if not isinstance(record.prompt, str) or record.system is not None:
        raise UserError(
            "expected a prompt as plain text without a system message, got messages; "
            "use encode_chat with a template"
        )
    return record.prompt


@contextlib.contextmanager
def _of(row: str) -> Iterator[None]:
    """Adds the row's name to an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row}: {error}") from error


def _collect(
    tokenizer: Any,
    records: Iterable[RecordLike],
    max_length: int,
    too_long: str,
    encode: Callable[[Record], tuple[list[int], list[int]]],
    names: Sequence[str] | None = None,
) -> TokenDataset:
    """Pads encoded records to one length and handles those that are too long."""
    if too_long not in ("error", "drop", "truncate"):
        raise UserError(
            f"expected too_long 'error', 'drop' or 'truncate', got {too_long!r}"
        )
    kept: list[tuple[list[int], list[int]]] = []
    dropped = truncated = escaped = 0
    for i, item in enumerate(records):
        record, name = as_record(item), f"record {i}" if names is None else names[i]
        with _of(name):
            tokens, mask = encode(record)
        if len(tokens) > max_length:
            if too_long == "error":
                raise UserError(
                    f"{name} has {len(tokens)} tokens, max_length is {max_length}; "
                    "raise it, or pass too_long='drop' or 'truncate'"
                )
            # A cut that leaves no answer would give an example without a loss.
            if too_long == "drop" or not any(mask[:max_length]):
                dropped += 1
                continue
            truncated += 1
        texts = (message["content"] for message in record.messages)
        escaped += any(control.holds_control(tokenizer, text) for text in texts)
        kept.append((tokens[:max_length], mask[:max_length]))
    pad = tokenizer.pad_token_id
    tokens = np.full((len(kept), max_length), 0 if pad is None else pad, np.int32)
    masks = np.zeros((len(kept), max_length), np.float32)
    there = np.zeros((len(kept), max_length), np.int8)
    for row, (ids, mask) in enumerate(kept):
        tokens[row, : len(ids)] = ids
        masks[row, : len(mask)] = mask
        there[row, : len(ids)] = 1
    return TokenDataset(
        tokens, masks, dropped, truncated, escaped=escaped, attention_mask=there
    )
