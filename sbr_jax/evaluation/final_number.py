r"""The number that a worked answer ends with, in the ways people and models write it.

A minus may be a hyphen, U+2212 or a dash; groups of three digits may be parted by a
comma, an apostrophe, an underscore, a thin or no-break space, or LaTeX's spellings of
these (``9{,}500``, ``9\,500``). A plain space parts two numbers, and so does a comma
that three digits do not follow.
"""

import re

_SPELLINGS = (
    (re.compile("[\u200b\u2060\ufeff]"), ""),
    # Full-width digits and signs, as CJK keyboards write them.
    (re.compile("[\uff01-\uff5e]"), lambda found: chr(ord(found[0]) - 0xFEE0)),
    (re.compile("[\u2010-\u2015\u2212]"), "-"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=\d)(?:\{[,.]\}|,?\\[,;:! ]|~)(?=\d{3}(?!\d))"), ","),
    (re.compile("(?<=\\d)['_\u2019\u00a0\u2002-\u200a\u202f](?=\\d{3}(?!\\d))"), ","),
)
"""Patterns of other spellings, and what they say."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)])-[$€£¥]?|[$€£¥]-?)?"
    r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+|(?<![\w.])(?=\.\d))(?:\.\d+)?"
    r"(?:[eE][+-]?\d+(?!\w))?"
)


def final_number(answer: str, *, marked: bool = False) -> float | None:
    """The number an answer ends with; None if there is none.

    Args:
      answer: text.
      marked: read only the number after ``####``, as GSM8K's answers have it.

    Returns:
      The number.

    >>> final_number("so 3 apples, $1,200.50."), final_number("6", marked=True)
    (1200.5, None)
    """
    if marked:
        _, mark, answer = answer.rpartition("####")
        answer = answer if mark else ""
    for pattern, plain in _SPELLINGS:
        answer = pattern.sub(plain, answer)
    found = _NUMBER.findall(answer)
    if not found:
        return None
    return float(re.sub("[$€£¥,]", "", found[0 if marked else -1]))
