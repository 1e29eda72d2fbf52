"""Differences between rows over the seeds that they share, with their intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from sbr_jax.reporting.columns import COLUMNS, Table, per_seed
from sbr_jax.reporting.runs import Run

COMPARED = ("lowest", "composite", "refusal", "accuracy_learned", "over_refusal")
"""Columns whose differences between rows are told, where a run has them."""
SAFE, LEARNT = COMPARED[:3], COMPARED[3]


def paired_table(run: Run) -> Table:
    """Differences from the best row, seed by seed, with their 95 % intervals.

    ``d̄ ± t₀.₉₇₅,ₙ₋₁ s / √n`` of the n seeds that both rows have finished. The best row
    has the highest mean of safety and learning: a model that learns nothing is safe.
    """
    rows = [m for m in run.methods if len(run.seeds(m)) > 1]
    if len(rows) < 2:
        return Table((), ())
    found = {
        m: {key: _by_seed(run, m, key) for key in COMPARED if _by_seed(run, m, key)}
        for m in rows
    }
    safe = next((key for key in SAFE if all(key in found[m] for m in rows)), None)
    if safe is None:
        return Table((), ())
    rank = [safe, *([LEARNT] if all(LEARNT in found[m] for m in rows) else [])]
    best = max(rows, key=lambda m: np.mean([[*found[m][key].values()] for key in rank]))
    used = [key for key in COMPARED if any(key in found[m] for m in rows)]
    lines = []
    for method in rows:
        seeds = sorted({*run.seeds(method)} & {*run.seeds(best)})
        if method != best and len(seeds) > 1:
            pairs = [(found[best].get(key), found[method].get(key)) for key in used]
            texts = [_difference(*pair, seeds) for pair in pairs]
            lines.append((method, str(len(seeds)), *texts))
    titles = {column.key: column.title for column in COLUMNS}
    notes = (
        f"{best}, the best row by {' and '.join(titles[key] for key in rank)}, minus "
        "each other row, seed by seed: mean and 95 % interval (Student's t). Where the "
        "interval holds 0, these seeds do not tell the two apart.",
    )
    return Table(
        ("method", "seeds", *(titles[key] for key in used)), tuple(lines), notes
    )


def _by_seed(run: Run, method: str, key: str) -> dict[int, float]:
    """A column's numbers by seed; empty where one is missing."""
    seeds, values = run.seeds(method), per_seed(run, method, key)
    whole = len(values) == len(seeds) and bool(np.all(np.isfinite(values)))
    return dict(zip(seeds, values.tolist(), strict=True)) if whole else {}


def _difference(
    best: Mapping[int, float] | None,
    other: Mapping[int, float] | None,
    seeds: Sequence[int],
) -> str:
    if not best or not other:
        return "–"
    gaps = np.array([best[seed] - other[seed] for seed in seeds])
    half = stdtrit(len(gaps) - 1, 0.975) * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    mean = gaps.mean()
    # Adding 0 takes the sign off a zero.
    texts = [f"{round(x, 1) + 0.0:.1f}" for x in (mean, mean - half, mean + half)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"
