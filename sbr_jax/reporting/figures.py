"""The report's figures: what a run holds is drawn, what it lacks is said."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sbr_jax.analysis import plots, subspace_plots
from sbr_jax.analysis.spectrum import cumulative_share, rank_for_energy
from sbr_jax.analysis.stability import overlap
from sbr_jax.reporting.results import Run, layers_by_unit
from sbr_jax.reporting.tables import (
    Table,
    accuracy_table,
    start_accuracy,
    trajectory_table,
)

INERT_ALPHA = 0.95
"""Above this mean α a projection changes next to nothing."""
FLAT_RATIO = 0.8
"""A safety rank above this share of the random control's is called flat."""
CROWDED = 24
"""With more bars than this, accuracies are drawn as a heat map."""
SHOWN = 8
"""Rows drawn in a figure; tables have them all."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure, or the reason why there is none.

    Attributes:
        name: identifier in the page and file name.
        title: heading.
        caption: how to read it.
        figure: the drawing, or None.
        missing: the sentence that replaces it.
        table: the same numbers, where a table can hold them.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None
    missing: str = ""
    table: Table | None = None


def _rows(run: Run, values: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    rows = {method: values(method) for method in run.methods}
    rows = {m: v for m, v in rows.items() if len(v) and np.all(np.isfinite(v))}
    return dict(list(rows.items())[:SHOWN])


def _stack(value: Any) -> np.ndarray:
    """Join the layers of all units: `[units · L, K]`, or `[units · L]`."""
    units = list(layers_by_unit(value).values())
    if not units:
        return np.zeros((0, 0))
    if units[0].ndim == 1:
        return np.concatenate(units)
    width = max(unit.shape[-1] for unit in units)
    padded = [np.pad(u, ((0, 0), (0, width - u.shape[-1]))) for u in units]
    return np.concatenate(padded)


def trajectory(run: Run) -> Drawing:
    """Draw safety after each stage."""
    name, title = "trajectory", "Safety while domains are learnt, one after the other"
    key, label = "composite", "composite safety, 0-100"
    rows = _rows(run, lambda method: run.metric(method, key))
    limit: float | None = 100.0
    if not rows:
        key, label = "safety_loss", "loss on held-out safe answers, nats"
        rows = _rows(run, lambda method: run.metric(method, key))
        title = "Loss on safe answers while domains are learnt"
        limit = None
    if not rows:
        reason = (
            "No trajectory: the results hold neither 'composite' nor 'safety_loss' for "
            "both the aligned model and every domain."
        )
        return Drawing(name, title, "", missing=reason)
    figure = plots.trajectory(run.stages, rows, label=label, limit=limit)
    caption = (
        "Mean over seeds after each stage; the band is the range of the seeds. The "
        "first point is the aligned model before any fine-tuning."
    )
    if len(rows) < len([m for m in run.methods if len(run.metric(m, key))]):
        caption += f" The first {SHOWN} rows are drawn; the table has them all."
    return Drawing(name, title, caption, figure, table=trajectory_table(run, key))


def domain_accuracy(run: Run) -> Drawing:
    """Draw the accuracy of each domain when learnt."""
    name, title = "domains", "What was learnt: test accuracy of each domain"
    rows = _rows(run, run.accuracy)
    if not rows:
        return Drawing(
            name,
            title,
            "",
            missing="No accuracies: the results hold none for a domain.",
        )
    start = start_accuracy(run)
    known = None if any(v is None for v in start) else [float(v) for v in start]
    ends = {method: run.accuracy(method, at_end=True) for method in rows}
    if len(rows) * len(run.domains) <= CROWDED:
        figure = plots.domain_accuracy(run.domains, rows, known, ends)
        caption = (
            "Bars: mean right after the domain was learnt; dots: seeds; arrows: where "
            "it stands after the last domain."
        )
    else:
        names = plots.short_names(list(rows))
        before = {"start": np.asarray(known)} if known else {}
        panels = {
            title: before | {names[m]: values.mean(0) for m, values in found.items()}
            for title, found in (
                ("right after each domain was learnt, %", rows),
                ("after the last domain, %", ends),
            )
        }
        figure = subspace_plots.heat_map(panels, columns=run.domains, limit=100.0)
        caption = "Mean over seeds."
    return Drawing(name, title, caption, figure, table=accuracy_table(run))


SETS = {
    "safety calibration set": ("spectrum", "trace"),
    "random token sequences": ("random_spectrum", "random_trace"),
    "benign instructions": ("benign_spectrum", "benign_trace"),
}
"""Name of a spectrum to its diagnostics."""
ENERGY = 0.9


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues `[units, K]` and traces `[units]` of one data set."""

    eigenvalues: np.ndarray
    trace: np.ndarray | None

    @property
    def ranks(self) -> np.ndarray:
        """Effective rank of each unit; the cap where that does not suffice."""
        return rank_for_energy(self.eigenvalues, self.trace, energy=ENERGY)

    @property
    def capped(self) -> bool:
        """Whether some unit's kept columns hold less than the share asked for."""
        shares = cumulative_share(self.eigenvalues, self.trace)[:, -1]
        return bool(np.any((shares > 0) & (shares < ENERGY - 1e-4)))

    def held(self, columns: int) -> float:
        """Percent of the trace that so many eigenvectors hold, mean of units."""
        shares = cumulative_share(self.eigenvalues, self.trace)[:, :columns]
        return 100 * float(shares[:, -1].mean())

    @property
    def rank_text(self) -> str:
        """The mean effective rank."""
        return f"{'≥ ' if self.capped else ''}{self.ranks.mean():.1f}"


def spectra(run: Run, method: str) -> dict[str, Spectrum]:
    """Return the spectra that a method recorded on the aligned model."""
    found = {}
    for name, (key, trace_key) in SETS.items():
        values = run.diagnostics(method, "subspace", key)
        if values:
            traces = run.diagnostics(method, "subspace", trace_key)
            trace = _stack(traces[0][1]) if traces else None
            found[name] = Spectrum(np.atleast_2d(_stack(values[0][1])), trace)
    return found


def spectrum(run: Run) -> Drawing:
    """Draw the safety Fisher's spectrum beside its control."""
    name, title = "spectrum", "Is the safety Fisher low-rank? Spectrum beside a control"
    recorded = {m: found for m in run.methods if (found := spectra(run, m))}
    if not recorded:
        reason = (
            "No spectrum: no finished method of this run estimates a Fisher subspace."
        )
        return Drawing(name, title, "", missing=reason)
    method = max(recorded, key=lambda m: len(recorded[m]))
    found = recorded[method]
    labels = {n: f"{n}: mean effective rank {s.rank_text}" for n, s in found.items()}
    figure = subspace_plots.spectrum(
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
    rows = tuple(
        (
            n,
            s.rank_text,
            f"{s.ranks.min()}-{s.ranks.max()}",
            *(f"{s.held(k):.0f}" for k in (8, s.eigenvalues.shape[-1])),
        )
        for n, s in found.items()
    )
    head = ("set", "mean effective rank at 90 %", "range", "first 8 hold, %", "all, %")
    table = Table(head, rows)
    return Drawing(name, title, caption, figure, table=table)


def layers(run: Run, method: str) -> Drawing | None:
    """Draw effective rank and α per layer and projection of one method."""
    panels = {}
    for key, label in (
        ("effective_rank", "effective rank"),
        ("alpha", "α (0 strict, 1 no projection)"),
    ):
        found = run.diagnostics(method, "subspace", key)
        if found:
            panels[label] = layers_by_unit(found[-1][1])
    if not panels:
        return None
    caption = (
        "After the last domain that has a value, first seed. α is the share of the "
        "gradient's safety component that is let through."
    )
    slug = "".join(c if c.isalnum() else "-" for c in method)
    figure = subspace_plots.heat_map(panels)
    title = f"Where {method} holds on: layers × projections"
    return Drawing(f"layers-{slug}", title, caption, figure)


def principal_angles(run: Run) -> Drawing:
    """Draw the angles between the subspaces of consecutive domains."""
    name, title = "angles", "Does the safety subspace move? Principal angles"
    for method in run.methods:
        found = run.diagnostics(method, "subspace", "principal_angles")
        rows = {}
        for index, value in found:
            if index < 0:
                continue
            before = "start" if index == 0 else run.domains[index - 1]
            units = layers_by_unit(value).values()
            angles = [layer for unit in units for layer in np.atleast_2d(unit)]
            rows[f"{before} → {run.domains[index]}"] = [a for a in angles if a.size]
        if rows:
            table = Table(
                ("pair", "overlap, mean cos² of the angles"),
                tuple(
                    (pair, f"{np.mean([overlap(a) for a in units]):.3f}")
                    for pair, units in rows.items()
                ),
            )
            caption = (
                f"Between the subspace before and after each domain, from {method}; "
                "means over layers and projections, bands (where drawn) from the 10th "
                "to the 90th percentile. 0° is unchanged, 90° is orthogonal."
            )
            figure = subspace_plots.angles(rows)
            return Drawing(name, title, caption, figure, table=table)
    reason = (
        "No angles: no finished method of this run updates its subspace after a domain."
    )
    return Drawing(name, title, "", missing=reason)


def drawings(run: Run) -> list[Drawing]:
    """Return all figures of a run, in reading order."""
    found = [trajectory(run), domain_accuracy(run), spectrum(run)]
    heat = [drawing for m in run.methods if (drawing := layers(run, m)) is not None]
    if not heat:
        reason = "No heat map: no finished method of this run has a safety subspace."
        heat = [Drawing("layers", "Rank and α per layer", "", missing=reason)]
    return [*found, *heat[:4], principal_angles(run)]


def warnings(run: Run) -> list[str]:
    """Say where a projection is inert and where the premise fails."""
    found = []
    for method in run.methods:
        alphas = run.diagnostics(method, "subspace", "alpha")
        if alphas and (mean := float(_stack(alphas[-1][1]).mean())) >= INERT_ALPHA:
            found.append(
                f"{method}: mean α is {mean:.3f}, so its projection is inert: next to "
                "nothing of the gradient's safety component is removed, and what the "
                "row gains comes from its other parts (anchor, monitor)."
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
