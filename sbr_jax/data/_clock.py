"""Formats dates as text, alike in every locale and time zone."""

import datetime
import re

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = (
    "January February March April May June July August September October November "
    "December"
)
LONGEST = 1000
"""Most characters of a format."""

LONG_FORMS = {
    "%c": "%a %b %e %H:%M:%S %Y",
    "%r": "%I:%M:%S %p",
    "%x": "%m/%d/%y",
    "%X": "%H:%M:%S",
    "%h": "%b",
    "%+": "%a %b %e %H:%M:%S UTC %Y",
}
"""Directives that abbreviate others in the C locale."""


def strftime(day: datetime.date, form: str) -> str:
    """The start of a day as text, in English whatever the locale.

    >>> strftime(datetime.date(2024, 7, 26), "%d %b %Y, %A %H:%M %p")
    '26 Jul 2024, Friday 00:00 AM'

    Raises:
      ValueError: the format has more than :data:`LONGEST` characters.
    """
    if len(form) > LONGEST:
        raise ValueError(
            f"too long a format of a date: {len(form):,} characters, expected at most "
            f"{LONGEST:,}"
        )
    for short, whole in LONG_FORMS.items():
        form = re.sub(f"(?<!%)((?:%%)*){re.escape(short)}", rf"\g<1>{whole}", form)
    weekday, month = _DAYS.split()[day.weekday()], _MONTHS.split()[day.month - 1]
    words = {
        **{"%a": weekday[:3], "%A": weekday, "%b": month[:3], "%B": month},
        **{"%p": "AM", "%P": "am", "%Z": "", "%z": ""},
        "%s": str((day - datetime.date(1970, 1, 1)).days * 86400),
    }
    moment = datetime.datetime(day.year, day.month, day.day)
    return re.sub(
        r"%[-_0^#]?.",
        lambda m: words[m[0]] if m[0] in words else moment.strftime(m[0]),
        form,
    )
