"""From text records to tokens: chat templates, answer masks, plain text.

Templates are rendered by transformers. The answer's mask comes from the template's
``{% generation %}`` blocks where it has them, else from the difference to the prompt's
own encoding. Special tokens come from the template alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data.batches import TokenDataset
from sbr_jax.data.records import Record, RecordLike, as_record
from sbr_jax.typing import UserError


def encode_chat(
    tokenizer: Any,
    records: Iterable[RecordLike],
    max_length: int,
    *,
    template: str | None = None,
    too_long: str = "error",
) -> TokenDataset:
    """Encodes exchanges with the tokenizer's chat template.

    **Guarantee**: the mask covers the last answer up to and with its stop token, and
    nothing else; every sequence begins with the BOS token at most once, and exactly
    once where the template asks for one.

    Args:
      tokenizer: of transformers.
      records: ``Record`` or ``(prompt, response)``.
      max_length: T.
      template: a chat template to use instead of the tokenizer's own.
      too_long: what to do with more than T tokens: ``"error"``, ``"drop"`` or
        ``"truncate"`` (cut the answer's end); the set counts them.

    Returns:
      ``N`` examples, padded to T.

    Raises:
      UserError: if there is no template, a sequence is too long, starts with a wrong
        number of BOS tokens, or its answer cannot be located.
    """
    template = _template(tokenizer, template)
    marked = "generation %}" in template or "generation -%}" in template
    encode = _encode_marked if marked else _encode_by_prefix
    special = _special_ids(tokenizer)

    def one(record: Record) -> tuple[list[int], list[int]]:
        tokens, mask = encode(tokenizer, record, template)
        _check_bos(tokenizer, template, tokens)
        return tokens, _stop(tokenizer, special, tokens, mask)

    return _collect(tokenizer, records, max_length, too_long, one)


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
      tokenizer: of transformers.
      prompts: text, messages, or records (whose answers are ignored).
      system: a system message for prompts that are text or messages.
      template: a chat template to use instead of the tokenizer's own.
      max_length: how many tokens a prompt may have (the model's context, less the
        answer); None for any number.

    Returns:
      Token ids, ending with the generation prompt; unpadded.

    Raises:
      UserError: if there is no template, a wrong number of BOS tokens, or a prompt that
        is too long.
    """
    template = _template(tokenizer, template)
    out = []
    for prompt in prompts:
        if not isinstance(prompt, Record):
            text = prompt if isinstance(prompt, str) else tuple(prompt)
            prompt = Record(text, system=system)
        tokens = _prompt_tokens(tokenizer, prompt, template)
        _check_bos(tokenizer, template, tokens)
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

    The text is encoded in one piece, so tokens are those the model sees in running
    text; a token that straddles the border belongs to the answer.

    Args:
      tokenizer: of transformers, fast.
      records: prompts as text, without system messages; the response follows at once,
        so put a space or a line break where one belongs.
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
        prompt = _plain(record)
        encoded = tokenizer(
            prompt + record.response,
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        tokens = list(encoded["input_ids"])
        mask = [int(end > len(prompt)) for _, end in encoded["offset_mapping"]]
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
      tokenizer: of transformers.
      prompts: text.
      max_length: how many tokens a prompt may have; None for any number.

    Returns:
      Token ids, unpadded.

    Raises:
      UserError: for a prompt that is too long.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = [
        first + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for prompt in prompts
    ]
    return _within(encoded, max_length)


def _within(prompts: list[list[int]], max_length: int | None) -> list[list[int]]:
    """The prompts, none of which may have more than ``max_length`` tokens."""
    longest = max((len(tokens) for tokens in prompts), default=0)
    if max_length is not None and longest > max_length:
        number = sum(len(tokens) > max_length for tokens in prompts)
        raise UserError(
            f"expected prompts of at most {max_length} tokens, got {number} longer "
            f"ones, the longest of {longest}: leave them out, or raise the context"
        )
    return prompts


def _plain(record: Record) -> str:
    if not isinstance(record.prompt, str) or record.system is not None:
        raise UserError(
            "expected a prompt as plain text without a system message, got messages; "
            "use encode_chat with a template"
        )
    return record.prompt


def _template(tokenizer: Any, template: str | None) -> str:
    template = template if template is not None else tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise UserError(
            "the tokenizer has no chat template; pass template=, or use encode_text "
            "for a model that is no chat model"
        )
    return template


def _render(tokenizer: Any, messages: list, template: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, **options
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise UserError(
            f"the chat template refuses messages of the roles {roles}: {error}"
        ) from error


def _prompt_tokens(tokenizer: Any, record: Record, template: str) -> list[int]:
    encoded = _render(tokenizer, record.context, template, add_generation_prompt=True)
    return list(encoded["input_ids"])


def _encode_marked(
    tokenizer: Any, record: Record, template: str
) -> tuple[list[int], list[int]]:
    """Tokens, and a mask of the template's last generation block."""
    encoded = _render(
        tokenizer, record.messages, template, return_assistant_tokens_mask=True
    )
    tokens, marks = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if 1 not in marks:
        raise UserError(
            "the chat template's generation block marked no token of an answer; check "
            "the template and that no response is empty"
        )
    end = len(marks) - marks[::-1].index(1)
    start = end
    while start and marks[start - 1]:
        start -= 1
    return tokens, [int(start <= i < end) for i in range(len(tokens))]


def _encode_by_prefix(
    tokenizer: Any, record: Record, template: str
) -> tuple[list[int], list[int]]:
    """Tokens, and a mask of what follows the prompt's own encoding."""
    tokens = list(_render(tokenizer, record.messages, template)["input_ids"])
    prompt = _prompt_tokens(tokenizer, record, template)
    if tokens[: len(prompt)] != prompt:
        raise UserError(
            "cannot locate the answer: with the answer the prompt is encoded in "
            "another way; use a template with {% generation %} blocks"
        )
    return tokens, [int(i >= len(prompt)) for i in range(len(tokens))]


def _stop(
    tokenizer: Any, special: frozenset[int], tokens: list[int], mask: list[int]
) -> list[int]:
    """Nothing is learnt after the answer's stop token.

    That is the first EOS; else the last special token, if only blanks follow it: many
    templates end a turn with a token of its own (``<end_of_turn>``, ``<|im_end|>``) and
    a line break.
    """
    inside = [i for i, marked in enumerate(mask) if marked]
    stop = next((i for i in inside if tokens[i] == tokenizer.eos_token_id), None)
    if stop is None:
        stop = next((i for i in reversed(inside) if tokens[i] in special), None)
        rest = [] if stop is None else [tokens[i] for i in inside if i > stop]
        if stop is None or tokenizer.decode(rest).strip():
            return mask
    return mask[: stop + 1] + [0] * (len(mask) - stop - 1)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({i for i, token in added if token.special})


def _check_bos(tokenizer: Any, template: str, tokens: list[int]) -> None:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    found = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
    if found > 1 or (found == 0 and "bos_token" in template):
        raise UserError(
            f"expected one {tokenizer.bos_token!r} at the start, got {found}; the chat "
            "template must write the BOS token exactly once"
        )


def _collect(
    tokenizer: Any,
    records: Iterable[RecordLike],
    max_length: int,
    too_long: str,
    encode: Callable[[Record], tuple[list[int], list[int]]],
) -> TokenDataset:
    """Pads encoded records to one length and treats those that are longer."""
    if too_long not in ("error", "drop", "truncate"):
        raise UserError(
            f"expected too_long 'error', 'drop' or 'truncate', got {too_long!r}"
        )
    kept: list[tuple[list[int], list[int]]] = []
    dropped = truncated = 0
    for i, item in enumerate(records):
        tokens, mask = encode(as_record(item))
        if len(tokens) > max_length:
            if too_long == "error":
                raise UserError(
                    f"record {i} has {len(tokens)} tokens, max_length is {max_length}; "
                    "raise it, or pass too_long='drop' or 'truncate'"
                )
            # A cut that leaves no answer would be an example without a loss.
            if too_long == "drop" or not any(mask[:max_length]):
                dropped += 1
                continue
            truncated += 1
        kept.append((tokens[:max_length], mask[:max_length]))
    pad = tokenizer.pad_token_id
    tokens = np.full((len(kept), max_length), 0 if pad is None else pad, np.int32)
    masks = np.zeros((len(kept), max_length), np.float32)
    for row, (ids, mask) in enumerate(kept):
        tokens[row, : len(ids)] = ids
        masks[row, : len(mask)] = mask
    return TokenDataset(tokens, masks, dropped, truncated)
