"""Measurements of chat models by name: data set, task and judge, ready to be run.

    measurement = prepare("harmbench", "data", limit=100, judge=KeywordJudge())
    measurement(ModelRunner(model, base, adapter))   # {"refusal/harmbench": 97.0, …}

A metric is called METRIC/SET or METRIC/SET/GROUP and lies in 0 to 100, but for signed
biases, `difference` and the numbers of files; none is called `accuracy/DOMAIN`, which
is how well a run learnt a domain. What each measures, and its traps:
docs/evaluation.md.

With a limit, the same items are drawn whatever the row, seed or model: those whose ids
have the smallest SHA-256, so that a smaller draw is part of a larger one. Sets whose
metric is a mean over parts (XSTest's two sides, MMLU's subjects, BBQ's categories and
kinds of context, LegalBench's tasks) give an equal number of items from each part.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbr_jax.data.registry import known, load_evalset
from sbr_jax.evaluation.agreement import HUMAN_VERDICTS, measure_agreement
from sbr_jax.evaluation.composite import composite_report
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.measurement import Ask, Measurement
from sbr_jax.evaluation.measuring import BUILDERS
from sbr_jax.typing import UserError

MEASURES: dict[str, str] = {
    "harmbench": "refusal and ASR on HarmBench, copyright left out",
    "advbench": "refusal and ASR on AdvBench",
    "jailbreakbench": "refusal and ASR on JailbreakBench, over-refusal on its twins",
    "jailbreakbench-artifacts": "ASR of recorded GCG and PAIR prompts",
    "beavertails": "refusal and ASR on BeaverTails prompts",
    "catqa": "refusal and ASR on CatQA, in the place of HEx-PHI",
    "xstest": "over-refusal on safe prompts, refusal on unsafe ones",
    "alpaca": "over-refusal on held-out harmless instructions",
    "truthfulqa": "MC1 and MC2",
    "truthfulqa-generative": "written answers, by likeness to the references",
    "bbq": "absolute and signed bias by category, accuracy",
    "wildguard": "robustness to adversarial requests (a file of your own)",
    "mmlu": "accuracy by letter, five examples in front",
    "medqa": "accuracy by letter",
    "legalbench": "balanced accuracy by label",
    "gsm8k": "exact match, five examples in front",
    "humaneval": "pass@1 (runs the model's code, if allowed)",
    "mtbench": "answers written out for a judge elsewhere",
    "refusal-auc": "area under the ROC of first-token refusal",
}
"""Every name of `prepare`, with one line about it."""

HEADLINES = {
    "refusal": "refusal/harmbench",
    "asr": "asr/harmbench",
    "over_refusal": "over_refusal/xstest",
    "general": "accuracy/mmlu",
}
"""Columns of the main table, and the metrics that they show."""


def prepare(
    name: str,
    folder: str | Path | None,
    *,
    limit: int | None = None,
    judge: Judge,
    allow_code: bool = False,
    output: str | Path | None = None,
    max_new_tokens: int | None = None,
) -> Measurement:
    """Reads what a measurement needs; touches no model.

    Args:
      name: key of `MEASURES`.
      folder: the data folder; None for the hub, where that has the set.
      limit: at most so many items (of each set, where there are several).
      judge: of answers to requests.
      allow_code: whether code that the model wrote may be run (`humaneval`).
      output: folder for answers that are judged elsewhere (`mtbench`).
      max_new_tokens: limit of an answer; None for each task's own. Rates depend on it.

    Returns:
      The measurement.

    Raises:
      UserError: an unknown name, a limit that is no number from 1, a file that is
        missing or damaged, and what `allow_code` and `output` are needed for.
    """
    known("measurement", name, MEASURES)
    for what, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(
                f"measurement '{name}': expected {what} of at least 1, got {value!r}"
            )
    length = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    path = None if output is None else Path(output)
    return BUILDERS[name](Ask(name, folder, limit, judge, allow_code, path, length))


def composite(
    metrics: Mapping[str, float], *, truthful: str = "mc2", bias: str = "ambiguous"
) -> dict[str, float]:
    """The headlines of the main table and, where it can be had, composite safety.

    Eq. 8 of arXiv:2604.17691, ``S = (refusal + truthful + (100 − bias)) / 3``, of
    HarmBench's refusal rate, a TruthfulQA score and an absolute bias on BBQ. The paper
    names no variants; ours stand in `record`. What was not measured is left out, and so
    is what is no number because its answers could not be judged.

    Args:
      metrics: of measurements, by METRIC/SET.
      truthful: ``"mc1"`` or ``"mc2"``, or ``"truthful"`` of written answers.
      bias: ``"ambiguous"`` or ``"disambiguated"``.

    Returns:
      ``composite`` and its components ``refusal``, ``truthful`` and ``bias``, and the
      other columns of the main table.

    Raises:
      UserError: for an unknown variant.

    >>> parts = {"refusal/harmbench": 90.0, "mc2/truthfulqa": 60.0, "bias/bbq": 30.0}
    >>> round(composite(parts)["composite"], 2)
    73.33
    >>> composite({"refusal/harmbench": 90.0})
    {'refusal': 90.0}
    """
    names = {**HEADLINES, **variant(truthful, bias)}
    found = {
        key: metrics[name]
        for key, name in names.items()
        if math.isfinite(metrics.get(name, math.nan))
    }
    if not {"refusal", "truthful", "bias"} <= set(found):
        return found
    report = composite_report(
        Result({"refusal": found["refusal"]}, {}, []),
        Result({truthful: found["truthful"]}, {}, []),
        Result({f"bias_{bias}": found["bias"]}, {}, []),
        truthfulqa_metric=truthful,
        bbq_metric=f"bias_{bias}",
    )
    return {"composite": report.composite, **found}


def variant(truthful: str = "mc2", bias: str = "ambiguous") -> dict[str, str]:
    """The metrics that a composite is made of.

    Raises:
      UserError: for an unknown variant.

    >>> variant()["bias"]
    'bias/bbq'
    """
    sets = {
        "mc1": "mc1/truthfulqa",
        "mc2": "mc2/truthfulqa",
        "truthful": "truthful/truthfulqa-generative",
    }
    biases = {"ambiguous": "bias/bbq", "disambiguated": "bias_disambiguated/bbq"}
    known("TruthfulQA score", truthful, sets)
    known("BBQ condition", bias, biases)
    return {
        "refusal": HEADLINES["refusal"],
        "truthful": sets[truthful],
        "bias": biases[bias],
    }


def judge_record(judge: Judge, folder: str | Path | None) -> dict[str, Any]:
    """What a judge is, and how far it agrees with people where that can be measured.

    People have labelled the answers of five models to XSTest (2,250). Agreement is with
    them, in percent, partial refusals left out.

    Args:
      judge: any.
      folder: the data folder.

    Returns:
      ``{name: {"settings", "agreement" or None, "note"}}``, JSON values: a judge of
      harm is not compared, for it answers another question, nor is any judge where
      the labelled files are absent.
    """
    settings = judge.describe()
    keys = ("judge", "name", "keywords")
    name = " ".join(str(settings[key]) for key in keys if settings.get(key))
    entry: dict[str, Any] = {"settings": settings, "agreement": None, "note": ""}
    labelled = folder and any(
        (Path(folder) / "xstest").glob("xstest_v2_completions_*_labelled.csv*")
    )
    if "refusal_means" in settings:
        entry["note"] = "judges harm, XSTest's people judged refusal"
    elif not labelled:
        entry["note"] = "XSTest's labelled answers are not in the data folder"
    else:
        items = load_evalset("xstest_completions", folder)
        verdicts = judge([i.prompt for i in items], [i.response for i in items])
        found = measure_agreement(
            verdicts,
            [HUMAN_VERDICTS[item.verdict] for item in items],
            [item.group for item in items],
        )
        entry["agreement"] = {
            "accuracy": round(found.accuracy, 2),
            "kappa": round(found.kappa, 4),
            "count": found.count,
            "partial": found.partial,
            "partial_refused": round(found.partial_refused, 2),
            "undecided": round(found.undecided, 2),
            "by_model": {k: round(v, 2) for k, v in sorted(found.by_group.items())},
        }
    return {name: entry}


def record(
    measurements: Iterable[Measurement], judge: Judge, folder: str | Path | None
) -> dict[str, Any]:
    """What a run's folder must say about its measurements, as JSON values.

    Args:
      measurements: of the study.
      judge: of their answers.
      folder: the data folder.

    Returns:
      ``{"measurements", "composite", "judges"}``, for the notes of a study.
    """
    return {
        "measurements": {m.name: m.describe() for m in measurements},
        "composite": variant(),
        "judges": judge_record(judge, folder),
    }
