"""The look of figures, and their conversion to SVG that follows a page's theme.

A figure is drawn once, in the light palette. `to_svg` replaces every palette colour by
a CSS variable with that colour as fallback, so the drawing is also legible in a dark
page that defines the variables of `DARK`.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLORS = """
ink       #1b1a19  #f4f3f0
soft      #5f5e59  #bdbcb4
grid      #e4e3dd  #34342f
page      #fcfcfa  #1a1a18
muted     #a3a29b  #7d7c75
series-1  #e8662f  #f08a5b
series-2  #2a78d6  #5b9ff0
series-3  #17a077  #35bd92
series-4  #7a4fc4  #a88bea
series-5  #d9a106  #dcb23a
series-6  #d6589a  #e682b6
series-7  #6b7f1e  #a3b84f
series-8  #b3403e  #e07a77
"""
LIGHT, DARK = (
    {row.split()[0]: row.split()[place] for row in _COLORS.strip().splitlines()}
    for place in (1, 2)
)
SERIES = tuple(LIGHT[f"series-{i}"] for i in range(1, 9))
MAIN_ROWS = ("plain", "safeanchor", "safeanchor-exact")
"""Rows that keep the first colours in every figure of every run."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
RAMP = ("#f1f6fd", "#cde2fa", "#9ec5f2", "#66a1e6", "#3479cb", "#1d569d", "#10376b")
WIDTH = 8.2
"""Width of every figure, in inches."""

_SOFT = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_INK = ("axes.titlecolor", "legend.labelcolor", "text.color")
_CLEAR = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
_SPINES = ("axes.spines.left", "axes.spines.right", "axes.spines.top")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(_SOFT, LIGHT["soft"]),
    **dict.fromkeys(_INK, LIGHT["ink"]),
    **dict.fromkeys(_CLEAR, "none"),
    **dict.fromkeys(_SPINES, False),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.8),
    **dict.fromkeys(("axes.labelsize", "font.size"), 9.5),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "sbr_jax",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draws in this project's look, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


@contextlib.contextmanager
def panels(
    height: float, rows: int = 1, **more: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A new figure with its axes one below another; no pyplot global state."""
    with style():
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(rows, squeeze=False, sharex=True, **more)[:, 0]
        yield figure, list(axes)


def slots(names: Sequence[str]) -> dict[str, int]:
    """A place in the palette for every row; a main row always has the same one.

    >>> slots(["ewc", "safeanchor-exact", "plain"])
    {'ewc': 3, 'safeanchor-exact': 2, 'plain': 0}
    """
    fixed = {name: place for place, name in enumerate(MAIN_ROWS) if name in names}
    free = itertools.count(len(MAIN_ROWS))
    return {name: fixed[name] if name in fixed else next(free) for name in names}


def series_color(place: int) -> str:
    """The colour of a place; beyond the palette all rows are muted.

    >>> series_color(0) != series_color(1), series_color(99) == LIGHT["muted"]
    (True, True)
    """
    return SERIES[place] if place < len(SERIES) else LIGHT["muted"]


def to_svg(figure: Figure, *, name: str, alt: str) -> str:
    """A figure as one inline `<svg>` element.

    Args:
        figure: what to draw.
        name: unique in the page; prefixes every id of the drawing.
        alt: what a reader who cannot see it should know.

    Returns:
        The element: no external resource, palette colours as CSS variables.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for key, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{key}, {color})")
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    alt = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head, tail = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    head += f' role="img" aria-labelledby="{name}-title"'
    return f'{head}>\n<title id="{name}-title">{alt}</title>{tail}'


def to_png(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG on the light page colour."""
    with style():
        figure.savefig(
            path,
            format="png",
            dpi=160,
            facecolor=LIGHT["page"],
            metadata={"Software": "made by sbr_jax"},
        )
