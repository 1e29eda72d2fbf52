"""Draws a run's figures, or says why one is missing."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sbr_jax import files
from sbr_jax.analysis.spectrum import cumulative_share, overlap, rank_for_energy
from sbr_jax.reporting import plots
from sbr_jax.reporting.runs import Run, layers_by_unit
from sbr_jax.reporting.tables import (
    Table,
    accuracy_table,
    start_accuracy,
    trajectory_table,
)
from sbr_jax.reporting.theme import to_png

INERT_ALPHA = 0.95
"""Above this mean α a projection changes next to nothing."""
FLAT_RATIO = 0.8
"""A safety rank above this share of the random control's counts as flat."""
SHOWN = 8
"""Rows drawn in a figure; tables list all."""
ENERGY = 0.9
"""Share of the trace that an effective rank holds."""
SETS = {
    "safety calibration set": ("spectrum", "trace"),
    "random token sequences": ("random_spectrum", "random_trace"),
    "benign instructions": ("benign_spectrum", "benign_trace"),
}
"""Diagnostics of each spectrum, by its name."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure, or the reason why there is none.

    Attributes:
        name: identifier in the page and file name.
        title: heading.
        caption: how to read it; if there is no figure, a sentence that replaces it.
        figure: the drawing, or None.
        table: the same numbers, if a table can hold them.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None
    table: Table | None = None

    def save(self, path: Path) -> None:
        """Writes the figure as PNG, if there is one."""
        if self.figure is not None:
            files.replace(path, functools.partial(to_png, self.figure))


def drawings(run: Run) -> list[Drawing]:
    """All figures of a run, in reading order."""
    heat = [drawing for m in run.methods if (drawing := layers(run, m)) is not None]
    if not heat:
        reason = "No heat map: no finished method of this run has a safety subspace."
        heat = [Drawing("layers", "Rank and α per layer", reason)]
    first = trajectory(run), domain_accuracy(run), spectrum(run)
    return [*first, *heat[:4], principal_angles(run)]


def _rows(run: Run, values: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """The first rows that have values, all finite."""
    rows = {method: values(method) for method in run.methods}
    rows = {m: v for m, v in rows.items() if len(v) and np.all(np.isfinite(v))}
    return dict(list(rows.items())[:SHOWN])


# --- safety and accuracy --------------------------------------------------------------


def trajectory(run: Run) -> Drawing:
    """Safety after each stage; if unmeasured, the loss on safe answers."""
    key, label, limit = "composite", "composite safety, 0-100", 100.0
    title = "Safety while domains are learnt, one after the other"
    rows = _rows(run, lambda method: run.metric(method, key))
    if not rows:
        key, label, limit = "safety_loss", "loss on held-out safe answers, nats", None
        title = "Loss on safe answers while domains are learnt"
        rows = _rows(run, lambda method: run.metric(method, key))
    if not rows:
        reason = (
            "No trajectory: the results hold neither 'composite' nor 'safety_loss' for "
            "both the aligned model and every domain."
        )
        return Drawing("trajectory", title, reason)
    figure = plots.trajectory(run.stages, rows, label=label, limit=limit)
    caption = (
        "Mean over seeds after each stage; the band is the range of the seeds. The "
        "first point is the aligned model before any fine-tuning."
    )
    table = trajectory_table(run, key)
    if len(rows) < len(table.rows):
        caption += f" The first {SHOWN} rows are drawn; the table has them all."
    return Drawing("trajectory", title, caption, figure, table)


def domain_accuracy(run: Run) -> Drawing:
    """Accuracy of each domain when learnt and at the end."""
    name, title = "domains", "What was learnt: test accuracy of each domain"
    rows = _rows(run, run.accuracy)
    if not rows:
        reason = "No accuracies: the results hold none for a domain."
        return Drawing(name, title, reason)
    start = [value for value in start_accuracy(run) if value is not None]
    before = {"start": np.asarray(start)} if len(start) == len(run.domains) else {}
    ends = _rows(run, lambda method: run.accuracy(method, at_end=True))
    names = plots.short_names(list(rows))
    panels = {
        f"{when}, %": before | {names[m]: found[m].mean(0) for m in rows if m in found}
        for when, found in (
            ("right after each domain was learnt", rows),
            ("after the last domain", ends),
        )
    }
    figure = plots.heat_map(panels, columns=run.domains, limit=100.0)
    return Drawing(name, title, "Mean over seeds.", figure, accuracy_table(run))


# --- subspaces ------------------------------------------------------------------------


def _stack(value: Any) -> np.ndarray:
    """The layers of all units: `[units · L, K]`, or `[units · L]`."""
    units = list(layers_by_unit(value).values())
    width = max((unit.shape[-1] for unit in units if unit.ndim > 1), default=0)
    padded = [
        np.pad(unit, ((0, 0), (0, width - unit.shape[-1]))) if unit.ndim > 1 else unit
        for unit in units
    ]
    return np.concatenate(padded) if padded else np.zeros((0, 0))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues `[units, K]` and traces `[units]` of one data set."""

    eigenvalues: np.ndarray
    trace: np.ndarray | None

    @property
    def shares(self) -> np.ndarray:
        """Share of the trace in the leading eigenvectors, `[units, K]`."""
        return cumulative_share(self.eigenvalues, self.trace)

    @property
    def ranks(self) -> np.ndarray:
        """Effective rank of each unit; the cap if that does not suffice."""
        return rank_for_energy(self.eigenvalues, self.trace, energy=ENERGY)

    @property
    def capped(self) -> bool:
        """Whether some unit's kept columns hold less than the requested share."""
        last = self.shares[:, -1]
        return bool(np.any((last > 0) & (last < ENERGY - 1e-4)))

    @property
    def rank_text(self) -> str:
        """The mean effective rank."""
        return f"{'≥ ' if self.capped else ''}{self.ranks.mean():.1f}"


def spectra(run: Run, method: str) -> dict[str, Spectrum]:
    """The spectra that a method recorded on the aligned model, by data set."""
    found = {}
    for name, keys in SETS.items():
        values, traces = (run.diagnostics(method, "subspace", key)[:1] for key in keys)
        if values:
            trace = _stack(traces[0][1]) if traces else None
            found[name] = Spectrum(np.atleast_2d(_stack(values[0][1])), trace)
    return found


def spectrum(run: Run) -> Drawing:
    """The spectrum of the safety Fisher beside its controls."""
    name, title = "spectrum", "Is the safety Fisher low-rank? Spectrum beside a control"
    recorded = {m: found for m in run.methods if (found := spectra(run, m))}
    if not recorded:
        reason = (
            "No spectrum: no finished method of this run estimates a Fisher subspace."
        )
        return Drawing(name, title, reason)
    method = max(recorded, key=lambda m: len(recorded[m]))
    found = recorded[method]
    labels = {n: f"{n}: mean effective rank {s.rank_text}" for n, s in found.items()}
    figure = plots.spectrum(
        {labels[n]: s.eigenvalues for n, s in found.items()},
        {labels[n]: s.trace for n, s in found.items() if s.trace is not None},
        energy=ENERGY,
    )
    caption = (
        f"From {method}, on the aligned model: mean over layers and projections, with "
        "their range as a band. A curve ends where the method stops keeping columns, "
        "at 90 % of the trace or at its rank cap. All sets have equally many examples, "
        "since that number bounds the rank."
    )
    if len(found) == 1:
        caption += " This run recorded no control."
    head = ("set", "mean effective rank at 90 %", "range", "first 8 hold, %", "all, %")
    rows = tuple(
        (
            n,
            s.rank_text,
            f"{s.ranks.min()}-{s.ranks.max()}",
            *(f"{100 * s.shares[:, :k][:, -1].mean():.0f}" for k in (8, None)),
        )
        for n, s in found.items()
    )
    return Drawing(name, title, caption, figure, Table(head, rows))


def layers(run: Run, method: str) -> Drawing | None:
    """Effective rank and α per layer and projection of one method."""
    labels = {
        "effective_rank": "effective rank",
        "alpha": "α (0 strict, 1 no projection)",
    }
    found = {key: run.diagnostics(method, "subspace", key) for key in labels}
    panels = {labels[k]: layers_by_unit(v[-1][1]) for k, v in found.items() if v}
    if not panels:
        return None
    caption = (
        "After the last domain that has a value, first seed. α is the share of the "
        "gradient's safety component that is let through."
    )
    slug = "".join(c if c.isalnum() else "-" for c in method)
    title = f"Where {method} holds on: layers × projections"
    return Drawing(f"layers-{slug}", title, caption, plots.heat_map(panels))


def principal_angles(run: Run) -> Drawing:
    """Angles between the subspaces of consecutive domains."""
    name, title = "angles", "Does the safety subspace move? Principal angles"
    for method in run.methods:
        rows = {}
        for index, value in run.diagnostics(method, "subspace", "principal_angles"):
            units = layers_by_unit(value).values()
            angles = [layer for unit in units for layer in np.atleast_2d(unit)]
            angles = [layer for layer in angles if layer.size]
            if index >= 0 and angles:
                rows[f"{run.stages[index]} → {run.domains[index]}"] = angles
        if rows:
            overlaps = {p: np.mean([overlap(a) for a in x]) for p, x in rows.items()}
            table = Table(
                ("pair", "overlap, mean cos² of the angles"),
                tuple((pair, f"{value:.3f}") for pair, value in overlaps.items()),
            )
            caption = (
                f"Between the subspace before and after each domain, from {method}; "
                "means over layers and projections, bands (where drawn) from the 10th "
                "to the 90th percentile. 0° is unchanged, 90° is orthogonal."
            )
            return Drawing(name, title, caption, plots.angles(rows), table)
    reason = (
        "No angles: no finished method of this run updates its subspace after a domain."
    )
    return Drawing(name, title, reason)


def warnings(run: Run) -> list[str]:
    """Sentences about inert projections and failed premises."""
    found = []
    for method in run.methods:
        alphas = run.diagnostics(method, "subspace", "alpha")
        if alphas and (mean := float(_stack(alphas[-1][1]).mean())) >= INERT_ALPHA:
            found.append(
                f"{method}: mean α is {mean:.3f}, so its projection is inert: next to "
                "nothing of the gradient's safety component is removed, and what the "
                "row gains comes from its other parts (anchor, monitor)."
            )
        elif alphas:
            units = layers_by_unit(alphas[-1][1])
            means = {name: float(a.mean()) for name, a in units.items()}
            idle = [f"{n} ({m:.3f})" for n, m in means.items() if m >= INERT_ALPHA]
            if idle:
                found.append(
                    f"{method}: the projection is inert for {', '.join(idle)} (mean α)."
                )
        ranks = run.diagnostics(method, "subspace", "effective_rank")
        if ranks and not _stack(ranks[-1][1]).any():
            found.append(f"{method}: every subspace has rank 0: nothing is protected.")
        sets = list(spectra(run, method).values())
        if len(sets) > 1 and not sets[0].capped:
            ours, theirs = sets[0].ranks.mean(), sets[1].ranks.mean()
            if ours >= FLAT_RATIO * theirs:
                found.append(
                    f"{method}: the safety spectrum is about as flat as the random "
                    f"control's (effective rank {ours:.1f} against {theirs:.1f}): the "
                    "premise of a low-rank safety subspace fails here."
                )
    return found
