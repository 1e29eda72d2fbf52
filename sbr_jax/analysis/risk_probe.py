"""Where in the model a risk probe finds what it needs.

    AUROC(l) = P(a probe on layer l rates a harmful prompt above a harmless one)

one curve for each pair of a harmful and a harmless set that the probe was not fitted
on.

References:
    Learning to Stay Safe: https://arxiv.org/abs/2602.17546
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from sbr_jax.analysis import theme
from sbr_jax.analysis.plots import legend_above

TARGET = 0.9
"""What the paper reports at least, on sets like the fitted ones and on others."""


def figure(result: Mapping[str, Any]) -> Figure:
    """Draws the AUROC by layer of each harmful set against each harmless one.

    Args:
      result: ``{"auroc": {harmful: {harmless: [all layers, layer 0, ..., layer L]}}}``.
    """
    with theme.style():
        drawing = theme.new_figure(8.2, 2.6 * len(result["auroc"]) + 0.8)
        rows = drawing.subplots(len(result["auroc"]), sharex=True, squeeze=False)[:, 0]
        for axes, (harmful, found) in zip(rows, result["auroc"].items(), strict=True):
            for place, (harmless, (whole, *layers)) in enumerate(found.items()):
                axes.plot(
                    range(len(layers)),
                    layers,
                    color=theme.series_color(place),
                    marker=theme.MARKERS[place % len(theme.MARKERS)],
                    label=f"against {harmless} (all layers: {whole:.3f})",
                )
            axes.axhline(TARGET, color=theme.LIGHT["soft"], lw=1, ls=(0, (2, 2)))
            axes.set_ylim(min(0.5, *(min(v) for v in found.values())) - 0.02, 1.02)
            axes.set_ylabel(f"AUROC, {harmful}")
            axes.set_xticks(range(len(layers)))
            legend_above(axes)
        rows[-1].set_xlabel("layer (0: the embedding)")
    return drawing
