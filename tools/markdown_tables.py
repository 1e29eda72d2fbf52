"""Finds the tables and figures of a Markdown page."""

import dataclasses
import re
from collections.abc import Iterator

from sbr_jax.methods import METHODS, VARIANTS

MARK = "†"
"""Marks rows and numbers that were measured with older code."""
NAMED = re.compile(r"^<!-- table: (\S+) -->$")
RULE = re.compile(r"^\|[ :]*-+[ :]*\|")
EXEMPT = re.compile(r"^<!-- (no measurement|measured once at [0-9a-f]{7}) -->$")
"""Stands above a table without measurements, or of one trial that no preset has."""
FIRST = ("row", "method", "order")
"""Possible titles of the first column in a table of measured rows."""
NEXT = ("#", "|", "<!-- row", "<!-- table")
"""Beginnings of a line that no longer belongs to the table above it."""


@dataclasses.dataclass(frozen=True)
class PageTable:
    """One table of a page.

    Attributes:
        line: number of its heading, from 1.
        name: from the comment `<!-- table: NAME -->` above it; None without.
        head: titles of its columns.
        lines: the other lines, as cells.
        below: text between the table and the next heading or table.
        exempt: whether the page says that nothing in it was measured, or with which
            commit all of it was.
    """

    line: int
    name: str | None
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    below: str
    exempt: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether its lines are measured rows: it has a name, or looks like it."""
        first = re.split(r"\W", self.head[0])[0]
        looks = first in FIRST or any(map(_is_of_a_row, self.lines))
        return self.name is not None or (looks and not self.exempt)


def _is_of_a_row(line: tuple[str, ...]) -> bool:
    """Whether a line names a row first and has a number after it.

    >>> _is_of_a_row(("`plain` †", "45.7")), _is_of_a_row(("`plain`", "nothing"))
    (True, False)
    """
    names = re.findall(r"`([^`]+)`", line[0])
    known = any(name in METHODS or name in VARIANTS for name in names)
    return known and any(re.search(r"\d", cell) for cell in line[1:])


def page_tables(text: str) -> Iterator[PageTable]:
    r"""Every table of a page; its name stands above it, apart from blank lines.

    >>> [t.head for t in page_tables("| a | b |\n| -- | -: |\n| 1 | 2 |\n")]
    [('a', 'b')]
    """
    lines = [*text.splitlines(), "#"]

    def until(start: int, stop: bool, marks: str | tuple[str, ...]) -> int:
        """The first line from ``start`` on that begins (or not) with a mark."""
        places = range(start, len(lines))
        return next(i for i in places if lines[i].startswith(marks) == stop)

    for rule in range(1, len(lines)):
        if RULE.match(lines[rule]) and lines[rule - 1].startswith("|"):
            end = until(rule, False, "|")
            above = next(filter(None, reversed(lines[: rule - 1])), "")
            name = NAMED.match(above)
            yield PageTable(
                rule,
                name[1] if name else None,
                cells(lines[rule - 1]),
                tuple(map(cells, lines[rule + 1 : end])),
                "\n".join(lines[end : until(end, True, NEXT)]),
                EXEMPT.match(above) is not None,
            )


def page_figures(text: str) -> Iterator[tuple[int, str, str]]:
    r"""Line, name and the text below of every figure of `docs/figures`.

    >>> list(page_figures("![A map](docs/figures/map.png)\n\nText\n\nMore"))
    [(1, 'figures/map.png', 'Text')]
    """
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if found := re.match(r"!\[.*\]\(.*(figures/[^/]+)\)$", line):
            yield number, found[1], next(filter(None, lines[number:]), "")


def cells(line: str) -> tuple[str, ...]:
    """The cells of a line.

    >>> cells("| `plain` † | 45.7 ± 9.1 |  |")
    ('`plain` †', '45.7 ± 9.1', '')
    """
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
