"""What is drawn of each analysis, from what `analysis.json` holds of it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sbr_jax.reporting.figures import Drawing
from sbr_jax.reporting.tables import Table


def drawings(name: str, result: Mapping[str, Any]) -> list[Drawing]:
    """The figures of one analysis, from what `analysis.json` holds of it."""
    return DRAWERS[name](result)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _harm_types(result: Mapping[str, Any]) -> list[Drawing]:
    from sbr_jax.analysis import harm_types

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
    drawing = harm_types.figure(result)
    return [Drawing("harm-types", title, caption, drawing, table=table)]


def _sensitivity(result: Mapping[str, Any]) -> list[Drawing]:
    from sbr_jax.analysis import sensitivity

    keys = ("rank", "overlap", "captured", "twin", "chance")
    table = Table(
        ("examples", "rank", "overlap", "captured", "disjoint twins", "chance"),
        tuple(
            (str(n), *(_number(result[key][i]) for key in keys))
            for i, n in enumerate(result["sizes"])
        ),
    )
    caption = (
        "Subspaces of the aligned model from the first examples of the calibration "
        "set. They are part of the largest set; the disjoint twins are not."
    )
    title = "How many calibration examples does it take?"
    drawing = sensitivity.figure(result)
    return [Drawing("sensitivity", title, caption, drawing, table=table)]


def _exhaustion(result: Mapping[str, Any]) -> list[Drawing]:
    from sbr_jax.analysis import exhaustion

    keys = ("rank", "used", "full", "removed", "accuracy", "gap")
    table = Table(
        ("row: change per domain of", *keys),
        tuple(
            (row, *(_number(found["slope"].get(key)) for key in keys))
            for row, found in result.items()
        ),
    )
    caption = (
        "Rank and removed share while a domain is learnt, and its test accuracy right "
        "after. A row of the same rank about nothing says what rank alone costs."
    )
    title = "Does the growing subspace leave room to learn?"
    drawing = exhaustion.figure(result)
    return [Drawing("exhaustion", title, caption, drawing, table=table)]


def _probe(result: Mapping[str, Any]) -> list[Drawing]:
    from sbr_jax.analysis import risk_probe

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
    return [Drawing("probe", title, caption, risk_probe.figure(result), table=table)]


def _coupling(result: Mapping[str, Any]) -> list[Drawing]:
    from sbr_jax.analysis import coupling, plots

    cosines = {
        row: np.asarray(seeds, np.float64)
        for row, seeds in result["direction_cosine"].items()
        if seeds
    }
    figure = plots.trajectory(
        result["stages"], cosines, label="cosine with the aligned model's", limit=None
    )
    drift = Drawing(
        "coupling-drift",
        "Does the refusal direction stay where it was?",
        "Difference of means of the residual stream at the last prompt token, held-out "
        "harmful against harmless requests, mean over layers and seeds.",
        figure,
    )
    causal = Drawing(
        "coupling-causal",
        "What do steps inside the subspace do to it?",
        "Steps of one length from the aligned model: along the leading eigenvector, in "
        "random combinations of eigenvectors, and outside the subspace, at random or "
        "in a benign set's subspace. Bands are the range over steps.",
        coupling.figure(result["causal"]),
    )
    return [drift, causal]


DRAWERS: dict[str, Callable[[Mapping[str, Any]], list[Drawing]]] = {
    "harm-types": _harm_types,
    "sensitivity": _sensitivity,
    "exhaustion": _exhaustion,
    "coupling": _coupling,
    "probe": _probe,
}
