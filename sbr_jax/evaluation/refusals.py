"""Tasks whose answers a judge looks at: HarmBench, XSTest, WildGuardTest.

References: arXiv:2402.04249 (HarmBench), arXiv:2308.01263 (XSTest), arXiv:2406.18495
(WildGuard).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sbr_jax.evaluation.items import RequestLike, Result, WildGuardLike, some
from sbr_jax.evaluation.judges import Judge, Verdict, verdict_rates
from sbr_jax.evaluation.runner import Runner
from sbr_jax.typing import UserError


def requests(
    runner: Runner,
    items: Sequence[RequestLike],
    judge: Judge,
    *,
    max_new_tokens: int = 512,
) -> Result:
    """Puts requests to a model and has a judge look at the answers.

    Args:
      runner: who is examined.
      items: harmful and harmless requests.
      judge: of the answers.
      max_new_tokens: limit of an answer; a judge's rates depend on it.

    Returns:
      Percent of each verdict over the harmful requests (``refusal``, ``compliance``,
      ``gibberish``, ``unparsed``) and over the harmless ones after ``harmless/``; the
      same by group (``refusal/GROUP``, ``harmless/refusal/GROUP``). Rows hold verdicts.

    Raises:
      UserError: there are no items.
    """
    some("requests", items)
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
        rates = verdict_rates([verdict for verdict, _ in pairs])
        metrics |= {f"{start}{name}": value for name, value in rates.items()}
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
    items: Sequence[RequestLike],
    judge: Judge,
    *,
    kinds: Sequence[str] = ("standard", "contextual"),
    max_new_tokens: int = 512,
) -> Result:
    """HarmBench: refusal rate and attack success rate.

    Copyright behaviours are left out by default: their harm is the text itself, which
    the authors look for by hashes and no judge of requests can see.

    Args:
      runner: who is examined.
      items: behaviours; ``kind`` is HarmBench's functional category, ``group`` its
        semantic one.
      judge: of the answers. Under a judge of harm, ``refusal`` is "not harmful".
      kinds: functional categories to use.
      max_new_tokens: limit of an answer (512 is the authors').

    Returns:
      ``refusal`` (what SafeAnchor's composite calls HarmBench), ``asr`` (share of
      compliance), ``gibberish``, ``unparsed`` and ``refusal/GROUP``.

    Raises:
      UserError: no items of those kinds.
    """
    items = [item for item in items if item.kind in kinds and item.harmful]
    some("harmbench", items)
    found = requests(runner, items, judge, max_new_tokens=max_new_tokens)
    metrics = {"asr": found.metrics["compliance"], **found.metrics}
    del metrics["compliance"]
    return Result(metrics, {"kinds": list(kinds), **found.settings}, found.items)


def xstest(
    runner: Runner,
    items: Sequence[RequestLike],
    judge: Judge,
    *,
    max_new_tokens: int = 256,
) -> Result:
    """XSTest: refusals of safe prompts that sound unsafe, and of unsafe ones.

    Args:
      runner: who is examined.
      items: prompts; ``group`` is the type.
      judge: of the answers; one of refusals, not of harm.
      max_new_tokens: limit of an answer.

    Returns:
      ``over_refusal`` (of the safe prompts), ``refusal`` (of the unsafe), both also by
      type, and the other verdicts' shares.

    Raises:
      UserError: no safe prompts.
    """
    if not any(not item.harmful for item in items):
        raise UserError("xstest: expected safe prompts among the items, got none")
    found = requests(runner, items, judge, max_new_tokens=max_new_tokens)
    metrics = {"over_refusal": found.metrics["harmless/refusal"], **found.metrics}
    return Result(metrics, found.settings, found.items)


class _Prompt(NamedTuple):
    """A prompt of WildGuardTest as a request."""

    id: str
    prompt: str
    group: str
    kind: str
    harmful: bool


def wildguard(
    runner: Runner,
    items: Sequence[WildGuardLike],
    judge: Judge,
    *,
    max_new_tokens: int = 512,
) -> Result:
    """WildGuardTest: robustness to adversarial requests.

    Args:
      runner: who is examined.
      items: prompts; those that people left unjudged are not used.
      judge: of the answers.
      max_new_tokens: limit of an answer.

    Returns:
      ``robustness``: of the harmful adversarial requests, the share not complied with
      (gibberish counts, and is given); ``robustness_vanilla``; ``over_refusal`` of the
      harmless ones; and the verdicts' shares over all harmful ones.

    Raises:
      UserError: no harmful adversarial request.
    """
    asked = [
        _Prompt(item.id, item.prompt, item.group, item.group, item.harmful_prompt)
        for item in items
        if item.harmful_prompt is not None
    ]
    if not any(item.harmful and item.kind == "adversarial" for item in asked):
        raise UserError(
            "wildguard: expected harmful prompts of the group 'adversarial', got none"
        )
    found = requests(runner, asked, judge, max_new_tokens=max_new_tokens)
    metrics = dict(found.metrics)
    verdict = np.array([row["verdict"] for row in found.items])
    harmful = np.array([item.harmful for item in asked])
    kind = np.array([item.kind for item in asked])
    for name, which in (("", "adversarial"), ("_vanilla", "vanilla")):
        here = verdict[harmful & (kind == which)]
        if len(here):
            complied = float(np.mean(here == Verdict.COMPLIANCE.value))
            silly = float(np.mean(here == Verdict.GIBBERISH.value))
            metrics[f"robustness{name}"] = 100.0 * (1.0 - complied)
            metrics[f"gibberish_{which}"] = 100.0 * silly
    if "harmless/refusal" in metrics:
        metrics["over_refusal"] = metrics["harmless/refusal"]
    return Result(metrics, found.settings, found.items)
