"""Draws the figures of the analyses from their entries in `analysis.json`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sbr_jax.reporting import plots, theme
from sbr_jax.reporting.figures import Drawing
from sbr_jax.reporting.tables import Cell, Table

Result = Mapping[str, Any]
TARGET = 0.9
"""The lowest AUROC that the probe's paper reports (arXiv:2602.17546)."""


def drawings(name: str, result: Result) -> list[Drawing]:
    """The figures of one analysis, a key of `DRAWERS`."""
    return DRAWERS[name](result)


def _number(value: float | None, digits: int = 3) -> str:
    return Cell(value, digits=digits).text()


# --- kinds of harm --------------------------------------------------------------------


def _harm_types(result: Result) -> list[Drawing]:
    kinds = result["kinds"]
    rows = tuple(
        (
            a,
            _number(result["rank"][a], 1),
            *(_number(result["captured"][a][b]) for b in kinds),
        )
        for a in kinds
    )
    table = Table(("captured by ↓ of →", "mean rank", *kinds), rows)
    caption = (
        f"Aligned model, {result['examples']} examples in each half of a kind, both "
        "subspaces of a pair cut to one rank. The diagonal is what two samples of one "
        "kind share: no pair of kinds can be expected above it. Below, 0 is what "
        "random subspaces share and 1 is that ceiling."
    )
    title = "Are refusal, truthfulness and bias one subspace?"
    return [Drawing("harm-types", title, caption, harm_types_figure(result), table)]


def harm_types_figure(result: Result) -> Figure:
    """Pairwise overlaps, raw and relative to the ceiling."""
    kinds = result["kinds"]
    grids = {
        key: np.array([[result[key][a][b] for b in kinds] for a in kinds], np.float64)
        for key in ("overlap", "specific", "chance")
    }
    chance = grids["chance"].mean()
    panels = {
        f"overlap; chance {chance:.3f}, diagonal: two halves of one kind": "overlap"
    }
    if np.any(np.isfinite(grids["specific"])):
        panels["share of the way from chance to the ceiling"] = "specific"
    values = {
        title: dict(zip(kinds, grids[key], strict=True))
        for title, key in panels.items()
    }
    return plots.heat_map(values, columns=kinds, limit=1.0)


# --- calibration examples -------------------------------------------------------------

LINES = {
    "overlap": "overlap with the largest set",
    "captured": "energy of the largest set captured",
    "twin": "overlap of two disjoint sets of this size",
    "chance": "overlap of random subspaces",
}


def _sensitivity(result: Result) -> list[Drawing]:
    keys = ("rank", "overlap", "captured", "twin", "chance")
    rows = tuple(
        (str(n), *(_number(result[key][i]) for key in keys))
        for i, n in enumerate(result["sizes"])
    )
    head = ("examples", "rank", "overlap", "captured", "disjoint twins", "chance")
    caption = (
        "Subspaces of the aligned model from the first examples of the calibration "
        "set. They are part of the largest set; the disjoint twins are not."
    )
    title = "How many calibration examples does it take?"
    figure = sensitivity_figure(result)
    return [Drawing("sensitivity", title, caption, figure, Table(head, rows))]


def sensitivity_figure(result: Result) -> Figure:
    """Overlaps and ranks against the number of calibration examples."""
    sizes = np.asarray(result["sizes"], np.float64)
    control = {"color": theme.LIGHT["soft"], "ls": plots.DOTTED, "marker": ""}
    with theme.panels(6.0, 2, height_ratios=(3, 2)) as (figure, (shares, ranks)):
        for place, (key, label) in enumerate(LINES.items()):
            more = control if key == "chance" else {}
            values = np.asarray(result[key], np.float64)
            plots.line(shares, sizes, values, place, label=label, **more)
        shares.set_ylim(0, 1.02)
        shares.set_ylabel("share")
        plots.legend_above(shares)
        plots.line(ranks, sizes, result["rank"], 1, marker="o")
        plots.line(ranks, sizes, sizes, 0, lw=1, **control)
        ranks.set_ylim(0, 1.3 * max(result["rank"]))
        ranks.set_ylabel("mean effective rank")
        ranks.set_xscale("log")
        ranks.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
        ranks.minorticks_off()
        ranks.set_xlabel("calibration examples")
    return figure


# --- exhaustion -----------------------------------------------------------------------

PANELS = {
    "used": ("rank used, % of the cap", 100.0),
    "removed": ("task gradient removed, %", 100.0),
    "accuracy": ("accuracy when learnt, %", 1.0),
}


def _exhaustion(result: Result) -> list[Drawing]:
    keys = ("rank", "used", "full", "removed", "accuracy", "gap")
    rows = tuple(
        (row, *(_number(found["slope"].get(key)) for key in keys))
        for row, found in result.items()
    )
    caption = (
        "Rank and removed share while a domain is learnt, and its test accuracy right "
        "after. A row of the same rank about nothing says what rank alone costs."
    )
    title = "Does the growing subspace leave room to learn?"
    table = Table(("row: change per domain of", *keys), rows)
    return [Drawing("exhaustion", title, caption, exhaustion_figure(result), table)]


def exhaustion_figure(results: Mapping[str, Result]) -> Figure:
    """Rank, removed share and accuracy over the domains, which all rows share."""
    domains = next(iter(results.values()))["domains"]
    x, places = np.arange(len(domains)), theme.slots(list(results))
    with theme.panels(7.2, len(PANELS)) as (figure, panels):
        for axes, (key, (label, scale)) in zip(panels, PANELS.items(), strict=True):
            for row, found in results.items():
                # A row without a subspace draws nothing but keeps its name.
                values = scale * np.asarray(found.get(key, ()), np.float64)
                plots.line(axes, x[: len(values)], values, places[row], label=row)
            axes.set_ylim(0, 104)
            axes.set_ylabel(label)
        plots.legend_above(panels[0])
        plots.stage_ticks(panels[-1], x, domains)
    return figure


# --- the risk probe -------------------------------------------------------------------


def _probe(result: Result) -> list[Drawing]:
    harmless = list(next(iter(result["auroc"].values())))
    rows = tuple(
        (name, *(_number(found[other][0]) for other in harmless))
        for name, found in result["auroc"].items()
    )
    table = Table(("AUROC of ↓ against →", *harmless), rows)
    caption = (
        f"Fitted as the defence fits it, on {result['fitted']} prompts; on those of "
        f"them kept back the AUROC is {_number(result['validation'])} and the "
        f"calibration error {_number(result['calibration_error'])}. Measured on a "
        "split of its own, with other things and phrasings, and on what the domains "
        "teach. Look-alikes ask something harmless about harmful things."
    )
    title = "Does the probe tell harmful prompts it never saw?"
    return [Drawing("probe", title, caption, probe_figure(result), table)]


def probe_figure(result: Result) -> Figure:
    """AUROC by layer of each harmful set against each harmless one.

    Args:
        result: `{"auroc": {harmful: {harmless: [all layers, layer 0, ..., layer L]}}}`.
    """
    sets = result["auroc"]
    with theme.panels(2.6 * len(sets) + 0.8, len(sets)) as (figure, panels):
        for axes, (harmful, found) in zip(panels, sets.items(), strict=True):
            for place, (harmless, (whole, *layers)) in enumerate(found.items()):
                label = f"against {harmless} (all layers: {whole:.3f})"
                plots.line(axes, range(len(layers)), layers, place, label=label)
                axes.set_xticks(range(len(layers)))
            axes.set_ylim(min(0.5, *(min(v) for v in found.values())) - 0.02, 1.02)
            axes.set_ylabel(f"AUROC, {harmful}")
            plots.level(axes, TARGET)
            plots.legend_above(axes)
        panels[-1].set_xlabel("layer (0: the embedding)")
    return figure


# --- coupling to the refusal direction ------------------------------------------------


def _coupling(result: Result) -> list[Drawing]:
    cosines = {
        row: np.asarray(seeds, np.float64)
        for row, seeds in result["direction_cosine"].items()
        if seeds
    }
    label = "cosine with the aligned model's"
    drift = Drawing(
        "coupling-drift",
        "Does the refusal direction stay where it was?",
        "Difference of means of the residual stream at the last prompt token, held-out "
        "harmful against harmless requests, mean over layers and seeds.",
        plots.trajectory(result["stages"], cosines, label=label, limit=None),
    )
    causal = Drawing(
        "coupling-causal",
        "What do steps inside the subspace do to it?",
        "Steps of one length from the aligned model: along the leading eigenvector, in "
        "random combinations of eigenvectors, and outside the subspace, at random or "
        "in a benign set's subspace. Bands are the range over steps.",
        causal_figure(result["causal"]),
    )
    return [drift, causal]


def causal_figure(result: Result) -> Figure:
    """The effect of each kind of step against its length."""
    labels = {
        "cosine": "cosine with the\nrefusal direction before",
        "log_odds": "change of the refusals'\nlog-odds, nats",
    }
    with theme.panels(6.0, 2) as (figure, panels):
        for axes, (key, label) in zip(panels, labels.items(), strict=True):
            for place, (kind, rows) in enumerate(result[key].items()):
                band = (rows["low"], rows["high"])
                plots.line(axes, result["sizes"], rows["mean"], place, band, label=kind)
            axes.set_ylabel(label)
        panels[0].set_ylim(top=1.02)
        plots.legend_above(panels[0])
        panels[1].set_xlabel("length of the step in the adapter")
    return figure


# --- selectivity ----------------------------------------------------------------------


def _selectivity(result: Result) -> list[Drawing]:
    rows, sets = result["rows"], list(next(iter(result["rows"].values()))["share"])
    lines = tuple(
        (
            name,
            _number(row["rank"], 1),
            _number(row["held_out"]),
            *(
                f"{_number(row['share'][s])} ({_number(row['selectivity'][s], 2)})"
                for s in sets
            ),
        )
        for name, row in rows.items()
    )
    table = Table(("row", "mean rank", "held-out safety", *sets), lines)
    caption = (
        f"Subspaces of the aligned model from {result['examples']} safe examples: the "
        "share of gradient energy inside, of safe examples that had no part in them "
        "and of others; in the table, in brackets, the quotient of the two. At 1 it "
        "protects nothing that learning does not need."
    )
    panels = {
        "share of gradient energy inside": {
            name: np.array([row["held_out"], *(row["share"][s] for s in sets)])
            for name, row in rows.items()
        }
    }
    figure = plots.heat_map(panels, columns=["held-out safety", *sets])
    title = "Is it the safety subspace?"
    return [Drawing("selectivity", title, caption, figure, table)]


DRAWERS: dict[str, Callable[[Result], list[Drawing]]] = {
    "harm-types": _harm_types,
    "sensitivity": _sensitivity,
    "exhaustion": _exhaustion,
    "coupling": _coupling,
    "probe": _probe,
    "selectivity": _selectivity,
}
