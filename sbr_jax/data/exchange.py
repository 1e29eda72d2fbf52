"""Encodes one exchange: its answer, and the token that ends the answer.

Nothing is learnt after an answer's stop token; generation stops at the same token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbr_jax.data import control
from sbr_jax.data import template as chat
from sbr_jax.data.batches import TokenDataset
from sbr_jax.data.records import Record
from sbr_jax.typing import UserError


def encode_exchange(
    tokenizer: Any, record: Record, *, template: str | None = None
) -> tuple[list[int], list[int]]:
    """The tokens of an exchange, and the mask of its answer and stop token."""
    whole, where, (start, end) = chat.located(tokenizer, record, template)
    tokens, spans = control.encode_spans(tokenizer, whole)
    check_bos(tokenizer, template, tokens)
    if (start, end) == (len(where.before), len(whole)):
        prompt = control.encode(tokenizer, where.before)
        if tokens[: len(prompt)] != prompt:
            raise UserError(
                "cannot locate the answer: with the answer the prompt is encoded in "
                "another way; use a template with {% generation %} blocks"
            )
        mask = [int(i >= len(prompt)) for i in range(len(tokens))]
    else:
        mask = [int(b > start and a < end) for a, b in spans]
    if 1 not in mask:
        raise UserError(
            "the chat template writes no token of an answer; check the template and "
            "that no response is empty"
        )
    return tokens, _stop(tokenizer, _ends(tokenizer, where.after), tokens, mask)


def _ends(tokenizer: Any, after: str) -> frozenset[int]:
    """Tokens that can end a turn: special ones, and others found in ``after``."""
    written = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.content in after and not token.content.isspace()
    }
    return control.special_ids(tokenizer) | written


def stop_tokens(tokenizer: Any, *, system: str | None = None) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's EOS and the chat template's own.

    Give a system message if the template requires one.
    """
    record = Record("Hello.", "I.", system=system)
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    where = chat.place(tokenizer, record)
    if where.after:
        tokens, mask = encode_exchange(tokenizer, record)
        last = tokens[len(mask) - 1 - mask[::-1].index(1)]
        if last in _ends(tokenizer, where.after) and last not in found:
            found.append(last)
    return tuple(found)


def unstopped(data: TokenDataset, stops: Sequence[int]) -> int:
    """Number of uncut answers that end with none of the tokens ``stops``."""
    last = data.length - 1 - np.argmax(data.mask[:, ::-1] > 0, axis=1)
    ends = np.take_along_axis(data.tokens, last[:, None], axis=1)[:, 0]
    return max(int((~np.isin(ends, list(stops))).sum()) - data.truncated, 0)


def _stop(
    tokenizer: Any, ends: frozenset[int], tokens: list[int], mask: list[int]
) -> list[int]:
    """Cuts the mask after the answer's stop token.

    That is the first EOS; else the last token that can end a turn, if only blanks
    follow it: many templates end a turn with a token of their own (``<end_of_turn>``,
    ``<|im_end|>``) and a line break.
    """
    inside = [i for i, marked in enumerate(mask) if marked]
    stop = next((i for i in inside if tokens[i] == tokenizer.eos_token_id), None)
    if stop is None:
        stop = next((i for i in reversed(inside) if tokens[i] in ends), None)
        rest = [] if stop is None else [tokens[i] for i in inside if i > stop]
        if stop is None or tokenizer.decode(rest).strip():
            return mask
    return mask[: stop + 1] + [0] * (len(mask) - stop - 1)


def check_bos(tokenizer: Any, template: str | None, tokens: list[int]) -> None:
    """Refuses a sequence that begins with a wrong number of BOS tokens.

    Raises:
      UserError: for several, or for none if the template asks for one.
    """
    template = template or chat.default_template(tokenizer) or ""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    found = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
    if found > 1 or (found == 0 and "bos_token" in template):
        raise UserError(
            f"expected one {tokenizer.bos_token!r} at the start, got {found}; the chat "
            "template must write the BOS token exactly once"
        )
