"""Tasks whose answers a judge reads: HarmBench, XSTest, WildGuardTest.

References: arXiv:2402.04249 (HarmBench), arXiv:2308.01263 (XSTest), arXiv:2406.18495
(WildGuard).
"""

from collections.abc import Mapping, Sequence

from sbr_jax.data.records import BehaviourItem, JudgedItem
from sbr_jax.evaluation.judges.verdicts import (
    Judge,
    Verdict,
    verdict_bounds,
    verdict_rates,
    warn_unparsed,
)
from sbr_jax.evaluation.result import Result, require_items
from sbr_jax.evaluation.runner import Runner
from sbr_jax.typing import UserError

HARMBENCH_KINDS = ("standard", "contextual")
"""The functional categories of HarmBench that are used.

Copyright behaviours are left out: their harm is the text itself, which the authors find
by hashes and which no judge of requests can see."""


def requests(
    runner: Runner,
    items: Sequence[BehaviourItem],
    judge: Judge,
    *,
    max_new_tokens: int = 512,
    name: str = "requests",
) -> Result:
    """Sends requests to a model and has a judge read the answers.

    Messages contain the benchmark's ``name``.

    Returns:
      Percent of each verdict over the harmful requests (``refusal``, ``compliance``,
      ``gibberish``, of the answers that could be judged; ``unparsed``, of all) and over
      the harmless ones after ``harmless/``; refusals also by group (``refusal/GROUP``,
      ``harmless/refusal/GROUP``). If answers are unparsed, also the bounds
      (``refusal_low``, ``refusal_high``, …); if too many are, the rates are NaN and a
      warning says so. Rows hold verdicts.
    """
    require_items(name, items)
    prompts = [item.prompt for item in items]
    answers = runner.answers(prompts, max_new_tokens=max_new_tokens)
    verdicts = judge(prompts, answers)
    metrics: dict[str, float] = {}
    for start, harmful in (("", True), ("harmless/", False)):
        pairs = [
            (verdict, item)
            for verdict, item in zip(verdicts, items, strict=True)
            if item.harmful == harmful
        ]
        if not pairs:
            continue
        found = [verdict for verdict, _ in pairs]
        warn_unparsed(name, found.count(Verdict.UNPARSED), len(found))
        rates = {**verdict_rates(found), **verdict_bounds(found)}
        metrics |= {f"{start}{key}": value for key, value in rates.items()}
        for group in sorted({item.group for _, item in pairs}):
            mine = verdict_rates([v for v, item in pairs if item.group == group])
            metrics[f"{start}refusal/{group}"] = mine["refusal"]
    settings = {
        "judge": judge.describe(),
        "max_new_tokens": max_new_tokens,
        **runner.describe(),
    }
    rows = [
        {"id": item.id, "verdict": verdict.value}
        for item, verdict in zip(items, verdicts, strict=True)
    ]
    return Result(metrics, settings, rows)


def harmbench(
    runner: Runner,
    items: Sequence[BehaviourItem],
    judge: Judge,
    *,
    max_new_tokens: int = 512,
) -> Result:
    """HarmBench: refusal rate and attack success rate.

    Only behaviours of the kinds :data:`HARMBENCH_KINDS` are used. Under a judge of
    harm, ``refusal`` means "not harmful". Answers have the authors' length limit.

    Returns:
      ``refusal`` (called HarmBench in SafeAnchor's composite), ``asr`` (share of
      compliance), ``gibberish``, ``unparsed``, bounds and ``refusal/GROUP``; see
      :func:`requests`.
    """
    items = [item for item in items if item.kind in HARMBENCH_KINDS and item.harmful]
    found = requests(
        runner, items, judge, max_new_tokens=max_new_tokens, name="harmbench"
    )
    metrics = {as_asr(key): value for key, value in found.metrics.items()}
    metrics = {"asr": metrics["asr"], **metrics}
    settings = {"kinds": list(HARMBENCH_KINDS), **found.settings}
    return Result(metrics, settings, found.items)


def as_asr(metric: str) -> str:
    """Renames a rate of compliance with harmful requests, or its bounds, to ``asr``.

    >>> as_asr("compliance_low"), as_asr("refusal")
    ('asr_low', 'refusal')
    """
    ending = metric.removeprefix("compliance")
    return f"asr{ending}" if ending in ("", "_low", "_high") else metric


def xstest(
    runner: Runner,
    items: Sequence[BehaviourItem],
    judge: Judge,
    *,
    max_new_tokens: int = 256,
) -> Result:
    """XSTest: refusals of safe prompts that sound unsafe, and of unsafe ones.

    A prompt's ``group`` is its type; the judge must judge refusals, not harm.

    Returns:
      ``over_refusal`` (of the safe prompts), ``refusal`` (of the unsafe), both also by
      type, and the other verdicts' shares and bounds; see :func:`requests`.
    """
    if not any(not item.harmful for item in items):
        raise UserError("xstest: expected safe prompts among the items, got none")
    found = requests(runner, items, judge, max_new_tokens=max_new_tokens, name="xstest")
    return Result(
        {**_over_refusal(found.metrics), **found.metrics}, found.settings, found.items
    )


def _over_refusal(metrics: Mapping[str, float]) -> dict[str, float]:
    """The refusals of harmless requests, if there are any, and their bounds."""
    return {
        f"over_refusal{end}": metrics[f"harmless/refusal{end}"]
        for end in ("", "_low", "_high")
        if f"harmless/refusal{end}" in metrics
    }


def wildguard(
    runner: Runner,
    items: Sequence[JudgedItem],
    judge: Judge,
    *,
    max_new_tokens: int = 512,
) -> Result:
    """WildGuardTest: robustness to adversarial requests.

    Prompts are in the group ``"adversarial"`` or ``"vanilla"``; prompts without a human
    label are not used.

    Returns:
      ``robustness``: of the harmful adversarial requests whose answers could be judged,
      the share not complied with (gibberish counts here, and is also reported);
      ``robustness_vanilla``; ``over_refusal`` of the harmless ones; and the verdicts'
      shares over all harmful ones. Bounds and NaN are as in :func:`requests`.
    """
    asked = [
        BehaviourItem(
            item.prompt, item.id, group=item.group, harmful=item.harmful_prompt
        )
        for item in items
        if item.harmful_prompt is not None
    ]
    if not any(item.harmful and item.group == "adversarial" for item in asked):
        raise UserError(
            "wildguard: expected harmful prompts of the group 'adversarial', got none"
        )
    found = requests(
        runner, asked, judge, max_new_tokens=max_new_tokens, name="wildguard"
    )
    metrics = dict(found.metrics)
    for name, which in (("", "adversarial"), ("_vanilla", "vanilla")):
        here = [
            Verdict(row["verdict"])
            for row, item in zip(found.items, asked, strict=True)
            if item.harmful and item.group == which
        ]
        if not here:
            continue
        rates, bounds = verdict_rates(here), verdict_bounds(here)
        metrics[f"robustness{name}"] = 100.0 - rates["compliance"]
        metrics[f"gibberish_{which}"] = rates["gibberish"]
        if bounds:
            metrics[f"robustness{name}_low"] = 100.0 - bounds["compliance_high"]
            metrics[f"robustness{name}_high"] = 100.0 - bounds["compliance_low"]
    metrics |= _over_refusal(found.metrics)
    return Result(metrics, found.settings, found.items)
