"""Removes the block of thoughts that an answer begins with.

A model that thinks and then refuses has refused; one that has not finished thinking has
not answered yet.
"""

import re
from collections.abc import Sequence
from typing import Any

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)
"""Tags that begin and end blocks of thoughts."""

_NEAR = 8
"""Tokens before an answer in which a template may have opened a block."""


def without_thoughts(text: str, asked: str = "") -> str:
    r"""The text after a leading block of thoughts.

    Args:
      text: the text that the model wrote.
      asked: the text before it, which a template may end by opening the block. A tag
        that a user's own words end with stands before the header of the answer.

    Returns:
      The text itself if no block begins it; empty if the block does not end.

    >>> without_thoughts("<think>\nWell.\n</think>\n\nI cannot.")
    'I cannot.'
    >>> without_thoughts("Well.</think>No.", "<think>\n"), without_thoughts("<think>So")
    ('No.', '')
    """
    for opening, closing in TAGS:
        open_before = asked.rstrip().endswith(opening)
        if open_before or text.lstrip().startswith(opening):
            return re.sub(r"^\s+", "", text.partition(closing)[2])
    return text


def tokens_without_thoughts(
    tokenizer: Any, before: Sequence[int], new: Sequence[int]
) -> list[int]:
    """New tokens after a block of thoughts whose tags are special tokens.

    Special tokens are not decoded, so such tags must be found before decoding.

    Returns:
      The tokens after the block, or all of them.
    """
    special = set(tokenizer.all_special_ids)
    near = list(before[-_NEAR:])
    for tags in TAGS:
        opening, closing = (tokenizer.convert_tokens_to_ids(tag) for tag in tags)
        if not {opening, closing} <= special or opening == closing:
            continue
        opened = opening in near and closing not in near[near.index(opening) :]
        if opened or list(new[:1]) == [opening]:
            rest = list(new)
            return rest[rest.index(closing) + 1 :] if closing in rest else []
    return list(new)
