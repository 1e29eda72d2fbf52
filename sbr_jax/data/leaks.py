"""Prompts that stand in two sets: counted, refused, or dropped.

Two prompts are the same if they agree after taking full-width and other compatible
forms for the letters they stand for (NFKC), lower-casing, dropping punctuation and
collapsing blanks. Public sets share more than their names tell (hh-rlhf and BeaverTails
come from the same red-team prompts, JailbreakBench takes from AdvBench and HarmBench),
so a calibration set and a test set are to be checked before any split.

The check of a built study (:mod:`sbr_jax.training.study`) compares tokens, which a
changed comma hides; this one compares texts, before they are encoded. Its counts have
the form of :attr:`sbr_jax.training.study.Study.leak_check`.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sbr_jax.typing import UserError

T = TypeVar("T")


def normalised(text: str) -> str:
    r"""Plain forms in lower case, without punctuation, with single blanks.

    A text of punctuation alone stays as it is, so that such texts do not all agree.

    >>> normalised("  What's THIS,\tthen? ")
    'whats this then'
    >>> normalised("?!")
    '?!'
    >>> normalised("\uff27\uff4f\u3000\u2460\uff01")  # Full-width "Go ①!"
    'go 1'
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    # Dropping a mark may bring parts of one letter together.
    words = unicodedata.normalize("NFKC", re.sub(r"[^\w\s]|_", "", plain)).split()
    return " ".join(words) or plain.strip()


def prompt_of(item: Any) -> str:
    """The text that identifies an item.

    Args:
      item: a text, a pair or item with a ``prompt``, or a record whose prompt is a list
        of messages (their contents are joined).

    Raises:
      UserError: for anything else.

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
    if isinstance(items, str):  # It would be taken for a list of its letters.
        raise UserError("leak check: expected a list of prompts, got a text")
    return {normalised(prompt_of(item)) for item in items}


def shared(named: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    """Counts the distinct prompts that two sets have in common, for every pair.

    Args:
      named: sets by name; a name holds no ``/``.

    Returns:
      ``{"first/second": count}``.

    Raises:
      UserError: for a name with ``/``, and for items without a prompt.

    >>> shared({"train": ["Who are you?", "Go!"], "test": ["who are you", "Stop!"]})
    {'train/test': 1}
    """
    for name in named:
        if "/" in name:
            raise UserError(f"leak check: expected names without '/', got '{name}'")
    keys = {name: _keys(items) for name, items in named.items()}
    names = list(keys)
    return {
        f"{a}/{b}": len(keys[a] & keys[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def refuse_shared(named: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    """Refuses sets that share prompts.

    Args:
      named: see :func:`shared`.

    Returns:
      The counts, all 0.

    Raises:
      UserError: naming every pair that shares prompts, with its count.
    """
    counts = shared(named)
    found = [f"{pair}: {count}" for pair, count in counts.items() if count]
    if found:
        raise UserError(
            f"expected sets without common prompts, got {', '.join(found)}; drop them "
            "from the first of each pair (sbr_jax.data.leaks.without), or the second "
            "measures what was learned by heart"
        )
    return counts


def without(items: Iterable[T], *others: Iterable[Any]) -> tuple[list[T], int]:
    """Drops the items whose prompt stands in another set.

    **Guarantee**: what is kept shares no prompt with any of the others; order and
    repetitions within ``items`` stay.

    Args:
      items: what is to be cleaned.
      *others: what must not occur in it.

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
    """Keeps the first of the items that have one prompt, so that splits share none.

    Args:
      items: in any order.

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


__all__ = [
    "distinct",
    "normalised",
    "prompt_of",
    "refuse_shared",
    "shared",
    "without",
]
