"""Counts, refuses or drops prompts that two sets share.

Texts are compared before encoding, by :func:`normalised`, which ignores changes such as
a comma; encoded sets by the tokens of their prompts. Public sets share more than their
names suggest (hh-rlhf and BeaverTails come from the same red-team prompts,
JailbreakBench takes from AdvBench and HarmBench), so check a calibration set and a test
set before any split.

Counts always have the form ``{"first/second": count}``, like
:attr:`sbr_jax.training.study.Study.leak_check`.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np

from sbr_jax.typing import UserError

T = TypeVar("T")


def normalised(text: str) -> str:
    r"""A text in lower case and plain letters, without punctuation, single-spaced.

    Full-width and other compatibility forms become plain letters (NFKC). A text of
    punctuation alone stays as it is, so that such texts do not all become equal.

    >>> normalised("  What's THIS,\tthen? ")
    'whats this then'
    >>> normalised("?!")
    '?!'
    >>> normalised("\uff27\uff4f\u3000\u2460\uff01")  # Full-width "Go ①!"
    'go 1'
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    # Dropping a mark may bring parts of one letter together, so normalise again.
    words = unicodedata.normalize("NFKC", re.sub(r"[^\w\s]|_", "", plain)).split()
    return " ".join(words) or plain.strip()


def prompt_of(item: Any) -> str:
    """The text that identifies an item.

    Args:
      item: a text, a pair or item with a ``prompt``, or a record whose prompt is a list
        of messages (their contents are joined).

    >>> prompt_of(({"role": "user", "content": "Hello."},))
    'Hello.'
    """
    prompt = getattr(item, "prompt", item)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt):
        contents = [message.get("content") for message in prompt]
        if contents and all(isinstance(content, str) for content in contents):
            return "\n".join(contents)
    raise UserError(
        f"leak check: expected texts, pairs, items or records, got a "
        f"{type(item).__name__}"
    )


def _keys(items: Iterable[Any]) -> set[str]:
    if isinstance(items, str):  # It would be read as a list of its letters.
        raise UserError("leak check: expected a list of prompts, got a text")
    return {normalised(prompt_of(item)) for item in items}


def _token_keys(data: Any) -> Iterator[tuple[int, ...]]:
    if not hasattr(data, "mask"):
        yield from (tuple(map(int, row)) for row in data)
        return
    tokens, mask = np.asarray(data.tokens), np.asarray(data.mask)
    for row, answer in zip(tokens, mask, strict=True):
        stop = int(np.argmax(answer > 0)) if (answer > 0).any() else len(row)
        yield tuple(row[:stop].tolist())


def _overlaps(sets: Mapping[str, Set[Hashable]]) -> dict[str, int]:
    names = list(sets)
    return {
        f"{a}/{b}": len(sets[a] & sets[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def shared(named: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    """Counts the distinct prompts that each pair of text sets shares.

    Args:
      named: texts, pairs, items or records by name; names must not hold ``/``.

    Returns:
      ``{"first/second": count}``.

    Raises:
      UserError: for a name with ``/``, or items without a prompt.

    >>> shared({"train": ["Who are you?", "Go!"], "test": ["who are you", "Stop!"]})
    {'train/test': 1}
    """
    for name in named:
        if "/" in name:
            raise UserError(f"leak check: expected names without '/', got '{name}'")
    return _overlaps({name: _keys(items) for name, items in named.items()})


def shared_prompts(named: Mapping[str, Any]) -> dict[str, int]:
    """Counts the distinct prompts that each pair of encoded sets shares.

    Args:
      named: token data sets (a prompt is the tokens before the first answer token) or
        lists of prompts' token ids.

    Returns:
      ``{"first/second": count}``.

    >>> shared_prompts({"a": [[1, 2], [3]], "b": [[3], [4]]})
    {'a/b': 1}
    """
    return _overlaps({name: set(_token_keys(data)) for name, data in named.items()})


def refuse_leaks(
    counts: Mapping[str, int],
    remedy: str = "drop them from the first of each pair (sbr_jax.data.leaks.without), "
    "or the second measures nothing",
) -> dict[str, int]:
    """Refuses counts above 0; else returns the counts."""
    found = [
        f"{pair.replace('/', ' and ', 1)} share {count} prompts"
        for pair, count in counts.items()
        if count
    ]
    if found:
        raise UserError(f"expected disjoint sets, but {', '.join(found)}: {remedy}")
    return dict(counts)


def without(items: Iterable[T], *others: Iterable[Any]) -> tuple[list[T], int]:
    """Drops the items whose prompt also occurs in another set.

    **Guarantee**: the kept items share no prompt with any of the others; order and
    repetitions within ``items`` stay.

    Returns:
      The items kept, and how many were dropped.

    >>> without(["Go!", "Stop!"], ["go"])
    (['Stop!'], 1)
    """
    items = list(items)
    banned: set[str] = set().union(*map(_keys, others))
    kept = [item for item in items if normalised(prompt_of(item)) not in banned]
    return kept, len(items) - len(kept)


def distinct(items: Iterable[T]) -> tuple[list[T], int]:
    """Keeps the first item of each prompt, so that splits share none.

    Returns:
      The items kept, in their order, and how many were dropped.

    >>> distinct(["Go!", "go", "Stop!"])
    (['Go!', 'Stop!'], 1)
    """
    items = list(items)
    first: dict[str, T] = {}
    for item in items:
        first.setdefault(normalised(prompt_of(item)), item)
    return list(first.values()), len(items) - len(first)
