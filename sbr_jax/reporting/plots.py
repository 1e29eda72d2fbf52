"""Draws arrays: pure functions that return Matplotlib figures.

Rows are methods in the given order; a row keeps its colour and marker in all figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sbr_jax.analysis.spectrum import cumulative_share
from sbr_jax.reporting import theme

Array = NDArray[np.float64]
DOTTED = (0, (2, 2))


# --- parts ----------------------------------------------------------------------------


def line(
    axes: Axes,
    x: Any,
    y: Any,
    place: int,
    band: Any = None,
    **more: Any,
) -> None:
    """Draws a row with the colour and marker of its place.

    ``place`` is one of :func:`sbr_jax.reporting.theme.slots`; ``band`` has a lower and
    an upper end.
    """
    color = theme.series_color(place)
    if band is not None:
        axes.fill_between(x, *band, color=color, alpha=0.14, lw=0)
    marker = theme.MARKERS[place % len(theme.MARKERS)]
    axes.plot(x, y, **{"color": color, "marker": marker, **more})


def level(axes: Axes, height: float, label: str = "") -> None:
    """Draws and names a dotted line to compare with."""
    soft = theme.LIGHT["soft"]
    axes.axhline(height, color=soft, lw=0.9, ls=DOTTED)
    start = (axes.get_xlim()[0], height)
    axes.annotate(label, start, (4, 4), textcoords="offset points", color=soft)


def stage_ticks(axes: Axes, places: Any, names: Sequence[str]) -> None:
    """Labels stages, slanted if they would touch."""
    if sum(len(name) + 2 for name in names) > 80:
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, names, **slanted)
    else:
        axes.set_xticks(places, names)


def legend_above(axes: Axes) -> None:
    """Puts the legend above the axes, in as many columns as its names allow."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=1)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=max(1, min(4, 105 // (longest + 7))),
        borderaxespad=0.2,
        columnspacing=1.6,
        handletextpad=0.5,
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Drops the method from a variant's name if the method has a row of its own.

    >>> short_names(["plain", "sbr", "sbr:no-anchor"])["sbr:no-anchor"]
    '…:no-anchor'
    """
    found = {}
    for name in names:
        method, colon, part = name.partition(":")
        found[name] = f"…:{part}" if colon and method in names else name
    return found


def _spread(values: Sequence[float], gap: float) -> Array:
    """Heights of labels, moved apart to at least `gap` between neighbours."""
    order = np.argsort(values)
    placed = np.asarray(values, float)[order]
    for _ in range(200):
        lack = np.clip(gap - np.diff(placed), 0.0, None)
        placed[:-1] -= lack / 2
        placed[1:] += lack / 2
    return placed[np.argsort(order)]


# --- figures --------------------------------------------------------------------------


def trajectory(
    stages: Sequence[str],
    rows: Mapping[str, Array],
    *,
    label: str,
    limit: float | None = 100,
) -> Figure:
    """A metric after each stage: the mean of the seeds, and their range as a band.

    Args:
        stages: names along the axis; the first is the aligned model.
        rows: method to `[seeds, stages]`.
        label: of the vertical axis.
        limit: upper end of that axis; None: as much as the values need.
    """
    x = np.arange(len(stages))
    every = [values.ravel() for values in rows.values()] or [np.array([0.0, 1.0])]
    low, high = (float(end(np.concatenate(every))) for end in (np.min, np.max))
    if limit is None:
        top, floor, digits = high, low - 0.15 * (high - low), 2
    else:
        tenth = limit / 10
        floor = 0.0 if low < limit / 2 else tenth * np.floor(low / tenth - 0.5)
        top, digits = limit, 1
    names, places = short_names(list(rows)), theme.slots(list(rows))
    with theme.panels(4.2) as (figure, (axes,)):
        for name, values in rows.items():
            band = (values.min(0), values.max(0)) if len(values) > 1 else None
            edge = {"markeredgecolor": theme.LIGHT["page"], "markeredgewidth": 1.2}
            line(axes, x, values.mean(0), places[name], band, zorder=3, **edge)
        axes.set_ylim(floor, top + 0.02 * (top - floor))
        ends = {name: float(values.mean(0)[-1]) for name, values in rows.items()}
        inside = np.clip(list(ends.values()), floor, top)
        heights = _spread(inside.tolist(), (top - floor) / 20)
        for (name, value), height in zip(ends.items(), heights, strict=True):
            axes.annotate(
                f"{names[name]}  {value:.{digits}f}",
                (x[-1], height),
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                color=theme.series_color(places[name]),
                fontweight="bold",
                annotation_clip=False,
            )
        stage_ticks(axes, x, stages)
        axes.set_xlim(-0.15, len(stages) - 1 + 0.08)
        axes.set_ylabel(label)
    return figure


def spectrum(
    spectra: Mapping[str, Array], traces: Mapping[str, Array], *, energy: float
) -> Figure:
    """How much of the Fisher's trace the leading eigenvectors hold.

    Args:
        spectra: name to `[units, K]` eigenvalues; the first is the safety calibration
            set, the others are controls from equally many examples.
        traces: name to `[units]`, whole traces; default: sums of the eigenvalues.
        energy: the share that the method keeps.
    """
    palette, widest = (1, 0, 4, 3), 2
    with theme.panels(3.8) as (figure, (axes,)):
        for index, (name, values) in enumerate(spectra.items()):
            used = np.flatnonzero(np.any(values > 0, 0))
            if not used.size:
                continue
            width = int(used[-1]) + 1
            shares = 100 * cumulative_share(values, traces.get(name))[:, :width]
            shares = shares[shares[:, -1] > 0]
            line(
                axes,
                np.arange(1, width + 1),
                shares.mean(0),
                palette[index % len(palette)],
                (shares.min(0), shares.max(0)),
                ls=(0, (5, 2)) if index else "-",
                marker="o",
                ms=4,
                markevery=[width - 1],
                label=name,
            )
            widest = max(widest, width)
        axes.set_xlim(1, widest * 1.02)
        axes.set_ylim(0, 102)
        level(axes, 100 * energy, f"{100 * energy:.0f} %")
        axes.set_xlabel("leading eigenvectors of a unit's Fisher")
        axes.set_ylabel("share of the trace, %")
        legend_above(axes)
    return figure


def heat_map(
    panels: Mapping[str, Mapping[str, Array]],
    *,
    columns: Sequence[str] | None = None,
    limit: float | None = None,
) -> Figure:
    """One value per row and column, a panel for each quantity.

    Args:
        panels: title to `{row: [columns]}`, e.g. `{projection: [L]}`; NaN is blank.
        columns: names of the columns, with panels one below another; by default layers
            are numbered and panels stand side by side.
        limit: the darkest value; default: the largest, at least 1.
    """
    height = 1.1 + 0.34 * max(map(len, panels.values()))
    if columns is None:
        size, shape = (theme.WIDTH, height), (1, len(panels))
    else:
        size, shape = (theme.WIDTH, (height + 0.3) * len(panels)), (len(panels), 1)
    with theme.style():
        figure = Figure(figsize=size)
        grids = figure.subplots(*shape, squeeze=False).ravel()
        for axes, (title, panel) in zip(grids, panels.items(), strict=True):
            grid = np.stack([np.asarray(row, float) for row in panel.values()])
            _cells(axes, grid, limit or max(1.0, float(np.nanmax(grid))))
            axes.set_yticks(np.arange(len(panel)) + 0.5, list(panel))
            axes.set_title(title)
            if columns is not None:
                stage_ticks(axes, np.arange(grid.shape[1]) + 0.5, columns)
                continue
            ticks = np.arange(0, grid.shape[1], max(1, grid.shape[1] // 16))
            axes.set_xticks(ticks + 0.5, [str(t) for t in ticks])
            axes.set_xlabel("layer")
    return figure


def _cells(axes: Axes, grid: Array, top: float) -> None:
    """Fills a heat map's cells and writes the values into them."""
    ramp = LinearSegmentedColormap.from_list("ramp", theme.RAMP)
    page = theme.LIGHT["page"]
    axes.pcolormesh(grid, cmap=ramp, vmin=0, vmax=top, edgecolor=page, linewidth=1.5)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    for (i, j), value in np.ndenumerate(grid) if grid.shape[1] <= 16 else ():
        if np.isfinite(value):
            text = f"{value:.0f}" if top > 1 else f"{value:.2f}"
            color = "#ffffff" if value > 0.55 * top else "#15140f"
            middle = {"ha": "center", "va": "center", "fontsize": 8.5}
            axes.text(j + 0.5, i + 0.5, text, color=color, **middle)


def angles(rows: Mapping[str, Sequence[Array]]) -> Figure:
    """Principal angles between consecutive subspaces, sorted, in degrees.

    Args:
        rows: pair of stages to each unit's angles in radians, none empty.
    """
    # Many pairs form a sequence: draw them from light to dark, without bands.
    many, quantiles = len(rows) > 5, np.linspace(0, 100, 41)
    ramp = LinearSegmentedColormap.from_list("ramp", theme.RAMP[2:6])
    with theme.panels(3.6) as (figure, (axes,)):
        for index, (name, units) in enumerate(rows.items()):
            curves = np.stack([np.percentile(np.degrees(u), quantiles) for u in units])
            band = None if many else np.percentile(curves, (10, 90), axis=0)
            more = {"color": ramp(index / len(rows))} if many else {}
            more |= {"marker": "", "label": name}
            line(axes, quantiles, curves.mean(0), index + 1, band, **more)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 92)
        axes.set_yticks([0, 15, 30, 45, 60, 75, 90])
        axes.set_xlabel("principal angles of a unit, sorted, % of them")
        axes.set_ylabel("angle, degrees")
        legend_above(axes)
    return figure
