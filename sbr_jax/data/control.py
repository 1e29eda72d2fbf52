"""Keeps control tokens written in data apart from those that a template writes.

``<|im_end|>`` in a user's message is ten characters and ends nothing. Before a template
sees such places, they are put between noncharacters, so that the template's own control
tokens can be told apart after rendering. Text without control tokens is encoded as
before.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sbr_jax.typing import UserError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_RESERVED = re.compile("[\ufdd0-\ufdef]")


class Encoded(NamedTuple):
    """Token ids, and the characters of the given text that each one covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


def check_text(text: str) -> None:
    """Refuses texts that no tokenizer can encode, without quoting them.

    Raises:
      UserError: for a lone surrogate or a noncharacter.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"expected text, got a lone surrogate (half of a character) as character "
            f"{error.start} of {len(text)}: mend the row, or leave it out"
        ) from error
    if found := _RESERVED.search(text):
        raise UserError(
            f"expected text, got the noncharacter U+{ord(found[0]):04X} as character "
            f"{found.start()} of {len(text)}: mend the row, or leave it out"
        )


def mark(tokenizer: Any, text: str, template: str = "") -> str:
    """Puts every control token in a text between noncharacters.

    Args:
      tokenizer: a transformers tokenizer.
      text: data.
      template: also mark added tokens that this template writes but that are not
        special, such as ``<tool_call>``.

    Returns:
      The same text if it holds none.
    """
    check_text(text)
    controls = _pattern(tokenizer, len(tokenizer), template)
    return controls.sub(rf"{_OPEN}\g<0>{_CLOSE}", text)


def holds_control(tokenizer: Any, text: str) -> bool:
    """Whether a text holds one of the tokenizer's special tokens."""
    return bool(_pattern(tokenizer, len(tokenizer), "").search(text))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, including those added as special."""
    return _special_ids(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special)


@functools.lru_cache(maxsize=16)
def _pattern(tokenizer: Any, size: int, template: str) -> re.Pattern[str]:
    names = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    }
    longest = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; parts that :func:`mark` marked are read as plain text."""
    if _OPEN not in text:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return _encode_marked(tokenizer, text).ids


def encode_spans(tokenizer: Any, text: str) -> Encoded:
    """Like :func:`encode`, with the characters of the text that each token covers."""
    if _OPEN not in text:
        return _whole(tokenizer, text)
    return _encode_marked(tokenizer, text)


def _encode_marked(tokenizer: Any, text: str) -> Encoded:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for found in re.finditer(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}?|[^{_OPEN}]+", text):
        piece, start = found[0], found.start()
        plain = piece.startswith(_OPEN) and piece.endswith(_CLOSE)
        # A template that cut a text inside a mark left half of the mark behind.
        body = piece.strip(_OPEN + _CLOSE)
        if not body:
            continue
        if plain:
            new = _plain_ids(tokenizer, body)
            pieces = Encoded(new, [(0, len(piece))] * len(new))
        else:
            start += len(piece) - len(piece.lstrip(_OPEN + _CLOSE))
            pieces = _whole(tokenizer, body, middle=bool(ids))
        ids += pieces.ids
        spans += [(start + a, start + b) for a, b in pieces.spans]
    return Encoded(ids, spans)


def _whole(tokenizer: Any, text: str, *, middle: bool = False) -> Encoded:
    """Encodes a text with control tokens; in the ``middle`` without a first space."""
    lead = "\n" if middle else ""
    found = tokenizer(
        lead + text, add_special_tokens=False, return_offsets_mapping=True
    )
    ids, spans = list(found["input_ids"]), list(found["offset_mapping"])
    if not middle:
        return Encoded(ids, spans)
    # SentencePiece puts a space before the first word of any text.
    breaks = list(tokenizer(lead, add_special_tokens=False)["input_ids"])
    if ids[: len(breaks)] != breaks:
        return _whole(tokenizer, text)
    moved = [(max(a - 1, 0), max(b - 1, 0)) for a, b in spans[len(breaks) :]]
    return Encoded(ids[len(breaks) :], moved)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Encodes a control token's text with the tokenizer's model alone."""
    breaks = _pipeline(tokenizer, "\n")
    ids = _pipeline(tokenizer, "\n" + text)
    ids = ids[len(breaks) :] if ids[: len(breaks)] == breaks else ids
    own = tokenizer.convert_tokens_to_ids(text)
    if not ids or own in ids:
        raise UserError(
            f"expected a tokenizer that can write the control token {text!r} of a row "
            "as plain text, got one that always reads it as the token: take it out of "
            "the row"
        )
    return ids


def _pipeline(tokenizer: Any, text: str) -> list[int]:
    inner = tokenizer.backend_tokenizer
    if inner.normalizer is not None:
        text = inner.normalizer.normalize_str(text)
    pieces = [text]
    if inner.pre_tokenizer is not None:
        pieces = [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces for token in inner.model.tokenize(piece)]


def marked_messages(
    tokenizer: Any, messages: list[Mapping[str, Any]], template: str
) -> list[dict[str, Any]]:
    """Messages with their control tokens marked.

    In an answer only special tokens are marked: other added tokens may stand there,
    such as those around its thoughts.
    """

    def marked(message: Mapping[str, Any]) -> dict[str, Any]:
        guarded = "" if message.get("role") == "assistant" else template
        return {
            key: mark(tokenizer, value, guarded) if isinstance(value, str) else value
            for key, value in message.items()
        }

    return [marked(message) for message in messages]
