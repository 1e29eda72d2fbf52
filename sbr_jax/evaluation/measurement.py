"""What a measurement is, how its items are drawn and how its metrics are called."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data.registry import DOMAINS, load_evalset
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.refusals import as_asr
from sbr_jax.typing import UserError

BENCHMARK = "benchmark_accuracy"
"""What `accuracy` is called of a set that is a domain too: `accuracy/DOMAIN` says how
well a run learnt it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """One measurement, ready to be run on any weights.

    Attributes:
        name: key of `sbr_jax.evaluation.measures.MEASURES`.
        prompts: every text that is put to a model, for leak checks.
        facts: what a result must say besides.
        task: from a runner to metrics.
    """

    name: str
    prompts: Sequence[str]
    facts: Mapping[str, Any]
    task: Callable[[Any], dict[str, float]]

    def describe(self) -> dict[str, Any]:
        """What a result records: items, judge with its hash, variant of the task."""
        return {"name": self.name, "items": len(self.prompts), **self.facts}

    def __call__(self, runner: Any) -> dict[str, float]:
        """The metrics of a runner, by METRIC/SET.

        Raises:
            UserError: naming the measurement, of which there is no result.
        """
        try:
            return self.task(runner)
        except UserError as error:
            raise UserError(f"measurement '{self.name}': {error}") from error


@dataclasses.dataclass(frozen=True)
class Ask:
    """What `prepare` was asked for."""

    name: str
    folder: str | Path | None
    limit: int | None
    judge: Judge
    allow_code: bool
    output: Path | None
    length: Mapping[str, int]
    """The limit of an answer as a keyword argument, or nothing for the task's own."""

    def made(self, items: Sequence[Any], task: Callable[[Any], Any], **facts: Any):
        """The measurement; `task` gives a `Result` or finished metrics."""

        def measured(runner: Any) -> dict[str, float]:
            found = task(runner)
            return flat(found, self.name) if isinstance(found, Result) else found

        prompts = tuple(item.prompt for item in items)
        return Measurement(self.name, prompts, {**facts, **self.length}, measured)

    def judged(self, items: Sequence[Any], task: Callable[..., Result], **facts: Any):
        """The measurement of a task whose answers the judge looks at."""
        judge = self.judge.describe()
        return self.made(
            items,
            lambda runner: task(runner, items, self.judge, **self.length),
            judge=judge,
            **facts,
        )

    def items(self, evalset: str, split: str | None = None, **options: Any):
        """A draw of an evaluation set."""
        return draw(
            load_evalset(evalset, self.folder, split=split), self.limit, **options
        )


def draw(
    items: Sequence[Any],
    limit: int | None,
    part: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """At most so many items, always the same ones, in their order.

    Args:
        items: with an `id`, or else a `prompt`.
        limit: how many; None for all.
        part: label of the part an item belongs to; parts take turns.

    >>> draw(["a", "b", "c"], None)
    ['a', 'b', 'c']
    """
    if limit is None or limit >= len(items):
        return list(items)

    def digest(item: Any) -> str:
        return hashlib.sha256(
            str(getattr(item, "id", item.prompt)).encode()
        ).hexdigest()

    order = sorted(range(len(items)), key=lambda i: digest(items[i]))
    taken: dict[Any, int] = {}
    turns = []
    for rank, i in enumerate(order):
        label = None if part is None else part(items[i])
        taken[label] = taken.get(label, 0) + 1
        turns.append((taken[label], rank, i))
    return [items[i] for i in sorted(i for _, _, i in sorted(turns)[:limit])]


def flat(result: Result, name: str) -> dict[str, float]:
    """The metrics of a task by METRIC/SET/GROUP.

    Harmless requests that are refused are `over_refusal`, and the accuracy of a
    possible domain is `BENCHMARK`.

    >>> flat(Result({"compliance": 4.0, "harmless/refusal/x": 1.0}, {}, []), "s")
    {'asr/s': 4.0, 'over_refusal/s/x': 1.0}
    >>> flat(Result({"accuracy": 4.0}, {}, []), "gsm8k")
    {'benchmark_accuracy/gsm8k': 4.0}
    """
    found = {}
    for key, value in result.metrics.items():
        harmless = key.startswith("harmless/")
        metric, *group = key.removeprefix("harmless/").split("/", 1)
        if harmless:
            start = "over_" if metric.startswith("refusal") else "harmless_"
            metric = f"{start}{metric}"
        elif metric == "accuracy" and name in DOMAINS:
            metric = BENCHMARK
        else:
            metric = as_asr(metric)
        found["/".join([metric, name, *group])] = float(value)
    return found


def percent_unparsed(result: Result) -> Result:
    """A count of unparsed answers as a percentage."""
    share = 100.0 * result.metrics["unparsed"] / len(result.items)
    return result._replace(metrics={**result.metrics, "unparsed": share})


def bias_metrics(result: Result, name: str) -> dict[str, float]:
    """BBQ's metrics: `bias` is absolute and in ambiguous contexts, unless it says so.

    >>> found = bias_metrics(Result({"bias_ambiguous/Age": -4.0}, {}, []), "bbq")
    >>> found == {"bias_signed/bbq/Age": -4.0, "bias/bbq/Age": 4.0}
    True
    """
    found = {}
    for key, value in result.metrics.items():
        intersectional = key.startswith("intersectional/")
        metric, *group = key.removeprefix("intersectional/").split("/", 1)
        if metric == "undefined":
            continue
        signed = metric.removesuffix("_signed").replace("bias_ambiguous", "bias")
        where = "/".join([f"{name}-intersectional" if intersectional else name, *group])
        if metric.startswith("bias") and (group or metric.endswith("_signed")):
            found[f"{signed}_signed/{where}"] = float(value)
            if group:
                found[f"{signed}/{where}"] = abs(float(value))
        else:
            found[f"{signed}/{where}"] = float(value)
    return found
