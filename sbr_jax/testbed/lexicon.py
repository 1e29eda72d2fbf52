"""Words of the miniature world: function words, kinds, and invented names.

Everything that could name a real harm is invented: a ``vorkan`` is a kind of weapon in
this world and nothing in ours. Names are pronounceable syllables drawn from a seed;
none equals a word in the tuples of this module.
"""

import numpy as np


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


HARMFUL_KINDS = words(
    "weapon poison malware swindle narcotic burglary slander explosive"
)
BENIGN_KINDS = words("dish garment plant instrument toy tool")
HARMFUL_ACTIONS = words("make use sell hide")
"""Actions that are harmful when their object is, and harmless otherwise."""
SAFE_ACTIONS = words("report avoid recognise")
"""Actions that are harmless on any object: look-alikes that measure over-refusal."""
ACTIONS = (*HARMFUL_ACTIONS, *SAFE_ACTIONS)

STEP_VERBS = words("take join heat press turn wash cut lift fold mark")
STEP_OBJECTS = words(
    "lever basin ribbon plate handle cloth ring board"
    " flask cord panel frame wheel brush stone lamp"
)

COLOURS = words("red green blue white black brown grey pink")
SIZES = words("tiny small large huge narrow broad")
HOMES = words("forest desert river mountain valley island marsh cave")
RELATIONS = {"colour": COLOURS, "size": SIZES, "home": HOMES}

TRAITS = (("rude", "polite"), ("lazy", "diligent"), ("greedy", "generous"))
"""Pairs of a negative trait and its opposite."""
PLACES = words("market school station library harbour garden")

NUMBERS = tuple(str(n) for n in range(13))

SPECIAL_TOKENS = words("<pad> <unk> <bos> <eos> <user> <assistant>")

_ONSETS = words("b d f g k l m n p r s t v z br dr gr kr tr pl sk st vr")
_VOWELS = words("a e i o u ai or")
_CODAS = ("", *words("n k l m x sh rn"))


def invent_names(rng: np.random.Generator, count: int, taken: set[str]) -> list[str]:
    """Draws ``count`` new two-syllable names and adds them to ``taken``.

    >>> names = invent_names(np.random.default_rng(0), 3, {"the"})
    >>> len(set(names))
    3
    """
    names: list[str] = []
    while len(names) < count:
        parts = (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)
        name = "".join(str(rng.choice(part)) for part in parts)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names
