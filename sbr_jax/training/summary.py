"""What a run comes to: its result lines, averaged over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOT_MEASURED = float("nan")
FINAL_METRICS = ("refusal", "truthful", "bias", "over_refusal", "general")


def summarise(records: Sequence[Mapping[str, Any]], base_name: str) -> dict[str, Any]:
    """The summary of a run: base metrics, and one entry for each method.

    Only seeds whose last domain has been evaluated count. ``retention`` is 100 · final
    composite / base composite; ``domain_accuracy`` is measured at the end like all
    else, ``domain_accuracy_learned`` right after each domain; both are means.

    Args:
      records: of ``results.Workdir.lines``.
      base_name: what stands for the method where the aligned model was measured.

    Returns:
      The content of ``summary.json``, NaN where a metric is missing or was not finite.
    """
    base: dict[str, float] = {}
    rows: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        line = record["line"]
        if line["method"] == base_name:
            base = line["metrics"]
        else:
            seeds = rows.setdefault(line["method"], {})
            seeds.setdefault(line["seed"], []).append(record)
    length = max(
        (_evaluated(run) for runs in rows.values() for run in runs.values()), default=0
    )
    methods = {}
    for name, runs in rows.items():
        whole = {s: r for s, r in runs.items() if length and _evaluated(r) == length}
        if whole:
            methods[name] = _summary_row(whole, base)
    return {"base": base, "methods": methods}


def _summary_row(
    runs: Mapping[int, list[Mapping[str, Any]]], base: Mapping[str, float]
) -> dict[str, Any]:
    evaluations = [
        [r["line"] for r in run if r["line"]["stage"] == "evaluate"]
        for run in runs.values()
    ]
    domains = [line["domain"] for line in evaluations[0]]
    learned, final = _accuracies(evaluations, domains)
    last = [run[-1]["metrics"] for run in evaluations]
    by_domain = np.array(
        [[_number(line["metrics"], "composite") for line in run] for run in evaluations]
    )
    composite, start = by_domain[:, -1], _number(base, "composite")
    trajectory = {"base": start}
    trajectory |= dict(zip(domains, by_domain.mean(0).tolist(), strict=True))
    spread = by_domain.std(0, ddof=1 if len(runs) > 1 else 0)
    row: dict[str, Any] = {
        "seeds": list(runs),
        "trajectory": trajectory,
        "trajectory_std": dict(zip(domains, spread.tolist(), strict=True)),
        "composite": float(composite.mean()),
        "composite_std": float(spread[-1]),
        "composite_by_seed": composite.tolist(),
        "retention": float(100.0 * composite.mean() / start) if start else None,
    }
    shared = [k for k in last[0] if all(k in m for m in last)]
    others = [k for k in shared if k not in FINAL_METRICS and k != "composite"]
    for key in [*(k for k in FINAL_METRICS if k in shared), *others]:
        if not key.startswith("accuracy/") and key != "domain_accuracy":
            row[key] = float(np.mean([_number(m, key) for m in last]))
    row["domain_accuracy"] = float(final.mean())
    row["domain_accuracy_learned"] = float(learned.mean())
    row["domain_accuracy_by_domain"] = dict(
        zip(domains, learned.mean(0).tolist(), strict=True)
    )
    repairs = [
        r["line"]["metrics"].get("blocks") or 0
        for run in runs.values()
        for r in run
        if r["line"]["stage"] == "repair"
    ]
    row["repair_blocks"] = float(np.sum(repairs) / len(runs))
    row["seconds_per_step"] = _seconds_per_step(runs)
    return row


def _accuracies(evaluations, domains):
    """``[seeds, domains]``: right after each was learned, and at the end."""
    learned = [
        [
            _number(line["metrics"], f"accuracy/{d}")
            for line, d in zip(run, domains, strict=True)
        ]
        for run in evaluations
    ]
    final = [
        [_number(run[-1]["metrics"], f"accuracy/{d}") for d in domains]
        for run in evaluations
    ]
    return np.array(learned), np.array(final)


def _number(metrics: Mapping[str, Any], key: str) -> float:
    """A metric; NaN where it is missing, or null: it was not finite."""
    value = metrics.get(key)
    return NOT_MEASURED if value is None else float(value)


def _seconds_per_step(runs) -> float | None:
    times = [
        r["timing"]["seconds_per_step"]
        for run in runs.values()
        for r in run
        if r["line"]["stage"] == "train"
        and r["timing"].get("seconds_per_step") is not None
    ]
    return float(np.median(times)) if times else None


def _evaluated(run: Sequence[Mapping[str, Any]]) -> int:
    return sum(r["line"]["stage"] == "evaluate" for r in run)
