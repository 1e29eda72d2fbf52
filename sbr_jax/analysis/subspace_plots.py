"""Figures of subspaces: spectra, values per layer and projection, principal angles."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sbr_jax.analysis import theme
from sbr_jax.analysis.plots import legend_above, stage_ticks
from sbr_jax.analysis.spectrum import cumulative_share

Array = NDArray[np.float64]


def spectrum(
    spectra: Mapping[str, Array],
    traces: Mapping[str, Array] | None = None,
    *,
    energy: float = 0.9,
) -> Figure:
    """Draw how much of the Fisher's trace the leading eigenvectors hold.

    Args:
        spectra: name to `[units, K]` eigenvalues; the first is the safety calibration
            set, the others are controls from equally many examples.
        traces: name to `[units]`, whole traces; else the sums of the eigenvalues.
        energy: the share that the method keeps.
    """
    palette = (theme.SERIES[1], theme.SERIES[0], theme.SERIES[4], theme.SERIES[3])
    with theme.style():
        figure = theme.new_figure(8.2, 3.8)
        axes = figure.add_subplot()
        widest = 2
        for index, (name, values) in enumerate(spectra.items()):
            trace = traces.get(name) if traces else None
            used = np.flatnonzero(np.any(values > 0, 0))
            if not used.size:
                continue
            width = int(used[-1]) + 1
            shares = 100 * cumulative_share(values, trace)[:, :width]
            shares = shares[shares[:, -1] > 0]
            count = np.arange(1, width + 1)
            color = palette[index % len(palette)]
            mean = shares.mean(0)
            axes.fill_between(
                count, shares.min(0), shares.max(0), color=color, alpha=0.13, lw=0
            )
            line = "-" if index == 0 else (0, (5, 2))
            axes.plot(count, mean, color=color, ls=line, label=name)
            axes.plot(width, mean[-1], marker="o", ms=4, color=color)
            widest = max(widest, width)
        axes.axhline(100 * energy, color=theme.LIGHT["soft"], lw=0.9, ls=(0, (2, 2)))
        axes.annotate(
            f"{100 * energy:.0f} %",
            (1, 100 * energy),
            xytext=(4, 4),
            textcoords="offset points",
            color=theme.LIGHT["soft"],
        )
        axes.set_xlim(1, widest * 1.02)
        axes.set_ylim(0, 102)
        axes.set_xlabel("leading eigenvectors of a unit's Fisher")
        axes.set_ylabel("share of the trace, %")
        legend_above(axes)
    return figure


def _cells(axes: Axes, grid: Array, top: float) -> None:
    """Fill a heat map's cells and write the values into them."""
    ramp = LinearSegmentedColormap.from_list("ramp", theme.RAMP)
    page = theme.LIGHT["page"]
    axes.pcolormesh(grid, cmap=ramp, vmin=0, vmax=top, edgecolor=page, linewidth=1.5)
    if grid.shape[1] <= 16:
        for (i, j), value in np.ndenumerate(grid):
            if np.isnan(value):
                continue
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{value:.0f}" if top > 1 else f"{value:.2f}",
                ha="center",
                va="center",
                color="#ffffff" if value > 0.55 * top else "#15140f",
                fontsize=8.5,
            )


def heat_map(
    panels: Mapping[str, Mapping[str, Array]],
    *,
    columns: Sequence[str] | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw one value per row and column, a panel for each quantity.

    Args:
        panels: title to `{row: [columns]}`, e.g. `{projection: [L]}`; NaN is blank.
        columns: their names, with panels below each other; by default layers are
            numbered and panels stand side by side.
        limit: the darkest value; by default the largest, and at least 1.
    """
    rows = max(len(panel) for panel in panels.values())
    below = columns is not None
    with theme.style():
        height = 1.1 + 0.34 * rows
        figure = theme.new_figure(
            8.2, (height + 0.3) * len(panels) if below else height
        )
        for place, (title, panel) in enumerate(panels.items()):
            shape = (len(panels), 1) if below else (1, len(panels))
            axes = figure.add_subplot(*shape, place + 1)
            grid = np.stack([np.asarray(row, float) for row in panel.values()])
            _cells(axes, grid, limit or max(1.0, float(np.nanmax(grid))))
            axes.grid(False)
            axes.spines["bottom"].set_visible(False)
            axes.invert_yaxis()
            axes.set_yticks(np.arange(len(panel)) + 0.5, list(panel))
            axes.set_title(title)
            if below:
                stage_ticks(axes, np.arange(grid.shape[1]) + 0.5, columns)
                continue
            ticks = np.arange(0, grid.shape[1], max(1, grid.shape[1] // 16))
            axes.set_xticks(ticks + 0.5, [str(t) for t in ticks])
            axes.set_xlabel("layer")
    return figure


def angles(
    rows: Mapping[str, Sequence[Array]], *, chance: float | None = None
) -> Figure:
    """Draw the principal angles between consecutive subspaces, sorted, in degrees.

    Args:
        rows: pair of stages to the angles in radians of each unit.
        chance: the angle in degrees expected of random subspaces.
    """
    many = len(rows) > 5
    ramp = LinearSegmentedColormap.from_list("ramp", theme.RAMP[2:6])
    with theme.style():
        figure = theme.new_figure(8.2, 3.6)
        axes = figure.add_subplot()
        for index, (name, units) in enumerate(rows.items()):
            quantiles = np.linspace(0, 100, 41)
            usable = [np.degrees(np.asarray(unit)) for unit in units if len(unit)]
            if not usable:
                continue
            curves = np.stack([np.percentile(unit, quantiles) for unit in usable])
            # Many pairs are read as a sequence: from light to dark, without bands.
            color = ramp(index / len(rows)) if many else theme.series_color(index + 1)
            if not many:
                low, high = np.percentile(curves, (10, 90), axis=0)
                axes.fill_between(quantiles, low, high, color=color, alpha=0.13, lw=0)
            axes.plot(quantiles, curves.mean(0), color=color, label=name)
        if chance is not None:
            axes.axhline(chance, color=theme.LIGHT["soft"], lw=0.9, ls=(0, (2, 2)))
            axes.annotate(
                "random subspaces",
                (0, chance),
                xytext=(4, -11),
                textcoords="offset points",
                color=theme.LIGHT["soft"],
            )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 92)
        axes.set_yticks([0, 15, 30, 45, 60, 75, 90])
        axes.set_xlabel("principal angles of a unit, sorted, % of them")
        axes.set_ylabel("angle, degrees")
        legend_above(axes)
    return figure
