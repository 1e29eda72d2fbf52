"""Progress of long work: the work records it, and a listener reports it.

    with task("answers", total=80) as done:
        done(16)

Nothing is printed until a program says how (:class:`Ticker`), so that a library call
stays silent. A thread reports, since one step may take minutes: a compilation, or a
batch of answers.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 30.0
"""Seconds between two lines of a redirected log."""
LIVE = 5.0
"""Seconds between two lines on a terminal."""


_DAY = 86400.0
UNITS = {
    **{"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
    **{"days": _DAY, "years": 365.25 * _DAY},
}


def duration(seconds: float, digits: int = 2) -> str:
    """A readable time, in the largest unit that it fills one and a half times.

    Args:
        seconds: how long.
        digits: how many to show.

    >>> duration(0.0047), duration(42.0), duration(600.0), duration(9000.0)
    ('4.7 ms', '42 s', '10 min', '2.5 h')
    >>> duration(4e5), duration(1e12), duration(3700.0, digits=3)
    ('4.6 days', '31688 years', '61.7 min')
    """
    # From one and a half on: "80 min" is more precise than "1.3 h".
    least = {name: size * (1.5 if size > 1 else 1) for name, size in UNITS.items()}
    large = [name for name, size in least.items() if seconds >= size]
    unit = large[-1] if large else "s" if seconds == 0 else "ms"
    value = seconds / UNITS[unit]
    shown = f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"
    return f"{shown} {unit}"


class Task:
    """Work in progress.

    >>> work = Task("answers", 80)
    >>> work(16)
    >>> work.said().split(",")[0]
    'answers 16 of 80'
    """

    def __init__(self, what: str, total: int | None = None, *, drawn: bool = False):
        """Starts the clock.

        Args:
            what: the work, at the start of the line.
            total: number of its parts, if they are counted.
            drawn: whether it has its own bar on the terminal.
        """
        self.what, self.total, self.drawn = what, total, drawn
        self._done, self._began, self._note = 0, time.monotonic(), ""

    def __call__(self, done: int, note: str | None = None) -> None:
        """Records how many parts are done, and an optional note."""
        self._done = done
        self._note = self._note if note is None else note
        for heard in HEARD:
            heard()

    def said(self) -> str:
        """What is being done, how far, for how long, and how long is left."""
        seconds = time.monotonic() - self._began
        if self.total is None:
            return f"{self.what}, {duration(round(seconds))}"
        left = ""
        if 0 < self._done < self.total and seconds >= 1:
            left = seconds * (self.total / self._done - 1)
            left = f", about {duration(round(left))} left"
        note = f", {self._note}" if self._note else ""
        counted = f"{self.what} {self._done} of {self.total}"
        return f"{counted}{note}, {duration(round(seconds))}{left}"


HEARD: list[Callable[[], None]] = []
"""Called after each part of any work, as a sign of life."""
_TASKS: list[Task] = []
"""The work in progress, the innermost last."""


@contextlib.contextmanager
def task(what: str, total: int | None = None, *, drawn: bool = False) -> Iterator[Task]:
    """Work in progress until the block ends; see :class:`Task`."""
    work = Task(what, total, drawn=drawn)
    _TASKS.append(work)
    try:
        yield work
    finally:
        _TASKS.remove(work)


def said() -> str | None:
    """One line about all work in progress; None if there is none.

    >>> with task("start model"), task("answers", 8) as done:
    ...     done(2)
    ...     said()
    'start model: answers 2 of 8, 0 s'
    """
    found = list(_TASKS)
    if not found or found[-1].drawn:
        return None
    return ": ".join([*(work.what for work in found[:-1]), found[-1].said()])


class Ticker:
    """A thread that reports the work in progress.

    >>> with Ticker(print, every=0.01), task("waiting"):
    ...     time.sleep(0.1)  # doctest: +ELLIPSIS
    waiting, 0 s...
    """

    def __init__(self, tell: Callable[[str], None], *, every: float | None = None):
        """Prepares the thread; entering the context starts it.

        Args:
            tell: called with each line, in another thread.
            every: seconds between lines; None: what suits standard error.
        """
        self._tell, self._ended = tell, threading.Event()
        self._every = every or (LIVE if sys.stderr.isatty() else EVERY)
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        while not self._ended.wait(self._every):
            line = said()
            if line is not None:
                self._tell(line)

    def __enter__(self) -> "Ticker":
        """Starts to report."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops, after any line that is being reported."""
        self._ended.set()
        self._thread.join()
