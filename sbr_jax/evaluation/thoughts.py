"""Answers without the block of thinking that they begin with.

A model that thinks and then refuses has refused; one that has not finished thinking has
said nothing yet.
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
"""Beginnings and ends of blocks of thoughts."""

_NEAR = 8
"""Tokens before an answer in which a template may have opened a block."""


def without_thoughts(text: str, asked: str = "") -> str:
    r"""The text behind a block of thoughts that it begins with.

    Args:
      text: what was written.
      asked: what was before it, where a template may have opened the block.

    Returns:
      The text itself where it begins with none; nothing for a block without an end.

    >>> without_thoughts("<think>\nWell.\n</think>\n\nI cannot.")
    'I cannot.'
    >>> without_thoughts("Well.</think>No.", "<think>\n"), without_thoughts("<think>So")
    ('No.', '')
    """
    for opening, closing in TAGS:
        open_before = asked.rfind(opening) > asked.rfind(closing)
        if open_before or text.lstrip().startswith(opening):
            return re.sub(r"^\s+", "", text.partition(closing)[2])
    return text


def tokens_without_thoughts(
    tokenizer: Any, before: Sequence[int], new: Sequence[int]
) -> list[int]:
    """New tokens behind a block of thoughts whose tags are tokens of their own.

    Special tokens are not decoded, so such tags must be seen before.

    Returns:
      The tokens behind the block, or all of them.
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
