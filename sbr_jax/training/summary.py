"""A run's summary: its result lines, averaged over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FINAL_METRICS = ("refusal", "truthful", "bias", "over_refusal", "general")
Records = Sequence[Mapping[str, Any]]


def summarise(records: Records, base_name: str) -> dict[str, Any]:
    """The summary of a run: base metrics, and one entry for each variant.

    Only seeds whose last domain has been evaluated count. ``retention`` is 100 · final
    composite / base composite. ``domain_accuracy`` is the mean over domains at the end;
    ``domain_accuracy_learned`` is the mean of the accuracies right after each domain. A
    metric that is missing or not finite gives NaN.

    ``records`` come from ``RunFolder.lines``; ``base_name`` is the variant's name in
    the aligned model's line.
    """
    base: Mapping[str, float] = {}
    runs: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        line = record["line"]
        if line["method"] == base_name:
            base = line["metrics"]
        else:
            seeds = runs.setdefault(line["method"], {})
            seeds.setdefault(line["seed"], []).append(record)
    evaluated = {
        (name, seed): len(_of_stage(run, "evaluate"))
        for name, seeds in runs.items()
        for seed, run in seeds.items()
    }
    length = max(evaluated.values(), default=0)
    whole = {
        name: {s: run for s, run in seeds.items() if evaluated[name, s] == length}
        for name, seeds in runs.items()
    }
    methods = {k: _entry(v, base) for k, v in whole.items() if length and v}
    return {"base": base, "methods": methods}


def _entry(runs: Mapping[int, Records], base: Mapping[str, float]) -> dict[str, Any]:
    """The summary of one variant; ``runs`` holds its records by seed."""
    lines = [[r["line"] for r in _of_stage(run, "evaluate")] for run in runs.values()]
    domains = [line["domain"] for line in lines[0]]
    metrics = [[line["metrics"] for line in run] for run in lines]
    last, start = [run[-1] for run in metrics], _number(base, "composite")
    by_domain = np.array([[_number(m, "composite") for m in run] for run in metrics])
    spread = by_domain.std(0, ddof=1 if len(runs) > 1 else 0)
    composite = by_domain[:, -1]
    learned = np.array(
        [
            [_number(line["metrics"], f"accuracy/{line['domain']}") for line in run]
            for run in lines
        ]
    )
    final = np.array([[_number(m, f"accuracy/{d}") for d in domains] for m in last])
    shared = [k for k in last[0] if all(k in m for m in last)]
    others = [
        k
        for k in shared
        if k not in (*FINAL_METRICS, "composite", "domain_accuracy")
        and not k.startswith("accuracy/")
    ]
    records = [record for run in runs.values() for record in run]
    blocks = [
        r["line"]["metrics"].get("blocks") or 0 for r in _of_stage(records, "repair")
    ]
    times = [r["timing"].get("seconds_per_step") for r in _of_stage(records, "train")]
    times = [seconds for seconds in times if seconds is not None]

    def named(values: np.ndarray) -> dict[str, float]:
        return dict(zip(domains, values.tolist(), strict=True))

    return {
        "seeds": list(runs),
        "trajectory": {"base": start, **named(by_domain.mean(0))},
        "trajectory_std": named(spread),
        "composite": float(composite.mean()),
        "composite_std": float(spread[-1]),
        "composite_by_seed": composite.tolist(),
        "retention": float(100.0 * composite.mean() / start) if start else None,
        **{
            key: float(np.mean([_number(m, key) for m in last]))
            for key in [*(k for k in FINAL_METRICS if k in shared), *others]
        },
        "domain_accuracy": float(final.mean()),
        "domain_accuracy_learned": float(learned.mean()),
        "domain_accuracy_by_domain": named(learned.mean(0)),
        "repair_blocks": float(np.sum(blocks) / len(runs)),
        "seconds_per_step": float(np.median(times)) if times else None,
    }


def _of_stage(records: Records, stage: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["line"]["stage"] == stage]


def _number(metrics: Mapping[str, Any], key: str) -> float:
    """A metric; NaN if it is missing or null (it was not finite)."""
    value = metrics.get(key)
    return float("nan") if value is None else float(value)
