"""Finds the tables and figures of a Markdown page."""

import dataclasses
import re
from collections.abc import Iterator

MARK = "†"
"""Marks rows and numbers that were measured with older code."""
NAMED = re.compile(r"^<!-- table: (\S+) -->$")
RULE = re.compile(r"^\|[ :]*-+[ :]*\|")
EXEMPT = "<!-- no measurement -->"
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
        exempt: whether the page says that nothing in it was measured.
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
        return self.name is not None or (first in FIRST and not self.exempt)


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
                above == EXEMPT,
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
