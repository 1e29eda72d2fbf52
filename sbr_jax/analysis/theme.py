"""The look of the figures, and their way into a page as SVG that follows its theme.

A figure is drawn once, in the light palette. `to_svg` replaces every palette colour by
a CSS variable with that colour as fallback, so the same drawing is legible in a dark
page that defines the variables of `DARK`.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1b1a19",
    "soft": "#5f5e59",
    "grid": "#e4e3dd",
    "page": "#fcfcfa",
    "muted": "#a3a29b",
    "series-1": "#e8662f",
    "series-2": "#2a78d6",
    "series-3": "#17a077",
    "series-4": "#7a4fc4",
    "series-5": "#d9a106",
    "series-6": "#d6589a",
    "series-7": "#6b7f1e",
    "series-8": "#b3403e",
}
DARK = {
    "ink": "#f4f3f0",
    "soft": "#bdbcb4",
    "grid": "#34342f",
    "page": "#1a1a18",
    "muted": "#7d7c75",
    "series-1": "#f08a5b",
    "series-2": "#5b9ff0",
    "series-3": "#35bd92",
    "series-4": "#a88bea",
    "series-5": "#dcb23a",
    "series-6": "#e682b6",
    "series-7": "#a3b84f",
    "series-8": "#e07a77",
}
SERIES = tuple(LIGHT[f"series-{i}"] for i in range(1, 9))
MAIN_ROWS = ("plain", "safeanchor", "safeanchor-exact")
"""Rows that keep the first colours in every figure of every run."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
RAMP = ("#f1f6fd", "#cde2fa", "#9ec5f2", "#66a1e6", "#3479cb", "#1d569d", "#10376b")

_STYLE = {
    "axes.edgecolor": LIGHT["soft"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": LIGHT["soft"],
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "sbr_jax",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.color": LIGHT["soft"],
    "ytick.major.size": 0,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in this project's look, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot: no global state, no display needed."""
    return Figure(figsize=(width, height))


def slots(names: Sequence[str]) -> dict[str, int]:
    """Give every row a place in the palette: the main rows always the same one.

    >>> slots(["ewc", "safeanchor-exact", "plain"])
    {'ewc': 3, 'safeanchor-exact': 2, 'plain': 0}
    """
    fixed = {name: place for place, name in enumerate(MAIN_ROWS) if name in names}
    free = itertools.count(len(MAIN_ROWS))
    return {name: fixed[name] if name in fixed else next(free) for name in names}


def series_color(place: int) -> str:
    """Return the colour of a place; past the palette all rows are muted.

    >>> series_color(0) != series_color(1), series_color(99) == LIGHT["muted"]
    (True, True)
    """
    return SERIES[place] if place < len(SERIES) else LIGHT["muted"]


def to_svg(figure: Figure, *, name: str, alt: str) -> str:
    """Render a figure as one inline `<svg>` element.

    Args:
        figure: what to draw.
        name: unique in the page; prefixes every id of the drawing.
        alt: what a reader who does not see it should know.

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


def to_png(figure: Figure, path: str, *, dpi: int = 160) -> None:
    """Write a figure as PNG on the light page colour."""
    with style():
        figure.savefig(
            path,
            format="png",
            dpi=dpi,
            facecolor=LIGHT["page"],
            metadata={"Software": "made by sbr_jax"},
        )
