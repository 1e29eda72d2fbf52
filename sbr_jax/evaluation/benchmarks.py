"""Benchmarks of chat models by name: data set, task and judge, ready to run.

    benchmark = prepare("harmbench", "data", limit=100, judge=KeywordJudge())
    benchmark(ModelRunner(model, base, adapter))   # {"refusal/harmbench": 97.0, …}

A metric is called METRIC/SET or METRIC/SET/GROUP and lies in 0 to 100, except for
signed biases, `difference` and the numbers of files. None is called `accuracy/DOMAIN`,
which is how well a run learnt a domain. docs/evaluation.md says what each metric
measures, and its traps.

With a limit, the same items are drawn for every variant, seed and model: those whose
ids have the smallest SHA-256, so that a larger draw contains a smaller one. Some
metrics are a mean over parts (XSTest's two sides, MMLU's subjects, BBQ's categories and
kinds of context, LegalBench's tasks); those sets give an equal number of items from
each part.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data.leaks import distinct
from sbr_jax.data.records import BehaviourItem, Pair
from sbr_jax.data.registry import DOMAINS, load_evalset, load_source
from sbr_jax.errors import check_names
from sbr_jax.evaluation import composite, tasks
from sbr_jax.evaluation.judges.agreement import judge_record
from sbr_jax.evaluation.judges.keyword import KEYWORD_LISTS
from sbr_jax.evaluation.judges.verdicts import Judge
from sbr_jax.evaluation.result import Result
from sbr_jax.evaluation.runner import Runner
from sbr_jax.evaluation.sandbox import kernel_isolation
from sbr_jax.evaluation.tasks.refusals import HARMBENCH_KINDS, as_asr
from sbr_jax.typing import UserError

DOMAIN_ACCURACY = "benchmark_accuracy"
"""Name for the `accuracy` of a set that is also a domain: `accuracy/DOMAIN` says how
well a run learnt it."""

PLAIN_LIST = "plain25"
"""The phrase list of `refusal-auc` if the judge has none of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedBenchmark:
    """A benchmark with its items, ready for any weights.

    Attributes:
      name: key of `BENCHMARKS`.
      prompts: every text that a model is given, for leak checks.
      facts: what a result must state as well.
      task: takes a runner and returns metrics.
    """

    name: str
    prompts: Sequence[str]
    facts: Mapping[str, Any]
    task: Callable[[Any], dict[str, float]]

    def describe(self) -> dict[str, Any]:
        """The number of items, the judge with its hash, and the variant of the task."""
        return {"name": self.name, "items": len(self.prompts), **self.facts}

    def __call__(self, runner: Runner) -> dict[str, float]:
        """Runs the benchmark; metrics by METRIC/SET.

        Raises:
          UserError: naming the benchmark, if it has no result.
        """
        try:
            return self.task(runner)
        except UserError as error:
            raise UserError(f"benchmark '{self.name}': {error}") from error


@dataclasses.dataclass(frozen=True)
class Ask:
    """Arguments of :func:`prepare`, with helpers for the builders."""

    name: str
    folder: str | Path | None
    limit: int | None
    judge: Judge
    allow_code: bool
    output: Path | None
    length: Mapping[str, Any]
    """The limit of an answer as a keyword argument; empty: the task's own limit."""

    def items(
        self,
        evalset: str,
        split: str | None = None,
        part: Callable[[Any], Any] | None = None,
    ) -> list[Any]:
        """Draws items of an evaluation set."""
        found = load_evalset(evalset, self.folder, split=split)
        return draw(found, self.limit, part)

    def made(
        self, items: Sequence[Any], task: Callable[[Any], Any], **facts: Any
    ) -> PreparedBenchmark:
        """Makes a benchmark from a task that gives a `Result` or finished metrics."""

        def measured(runner: Runner) -> dict[str, float]:
            found = task(runner)
            return flat(found, self.name) if isinstance(found, Result) else found

        prompts = tuple(item.prompt for item in items)
        return PreparedBenchmark(self.name, prompts, {**facts, **self.length}, measured)

    def judged(
        self, items: Sequence[Any], task: Callable[..., Result], **facts: Any
    ) -> PreparedBenchmark:
        """Makes a benchmark from a task whose answers the judge reads."""
        facts = {"judge": self.judge.describe(), **facts}
        asked = functools.partial(task, items=items, judge=self.judge, **self.length)
        return self.made(items, asked, **facts)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark that can be prepared by name.

    Attributes:
      build: reads and prepares the items; touches no model.
      metrics: the names of its metrics, without set and group.
      judged: whether a judge reads its answers.
      scores_only: whether it reads likelihoods only and generates nothing.
      answer_tokens: its own limit of an answer, if the study's is too short.
      turns: answers to one item.
    """

    build: Callable[[Ask], PreparedBenchmark]
    metrics: tuple[str, ...]
    judged: bool = False
    scores_only: bool = False
    answer_tokens: int | None = None
    turns: int = 1


def prepare(
    name: str,
    folder: str | Path | None,
    *,
    limit: int | None = None,
    judge: Judge,
    allow_code: bool = False,
    output: str | Path | None = None,
    max_new_tokens: int | None = None,
) -> PreparedBenchmark:
    """Reads the data of a benchmark; touches no model.

    Args:
      name: key of `BENCHMARKS`.
      folder: the data folder; None for the hub, if that has the set.
      limit: most items to use (of each set, if there are several).
      judge: judges answers to requests.
      allow_code: whether code that the model wrote may be run (`humaneval`).
      output: folder for answers that are judged elsewhere (`mtbench`).
      max_new_tokens: limit of an answer; None for each task's own. Rates depend on it.

    Raises:
      UserError: for an unknown name, a limit below 1, a missing or damaged file, or if
        the benchmark needs `allow_code` or `output` and did not get it.
    """
    check_names("benchmark", [name], BENCHMARKS)
    for what, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(
                f"benchmark '{name}': expected {what} of at least 1, got {value!r}"
            )
    length = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    path = None if output is None else Path(output)
    ask = Ask(name, folder, limit, judge, allow_code, path, length)
    return BENCHMARKS[name].build(ask)


def record(
    prepared: Iterable[PreparedBenchmark], judge: Judge, folder: str | Path | None
) -> dict[str, Any]:
    """Describes a run's benchmarks for its folder, as JSON values.

    Returns:
      ``{"measurements", "composite", "judges"}``, for the notes of a study.
    """
    return {
        "measurements": {b.name: b.describe() for b in prepared},
        "composite": composite.variant(),
        "judges": judge_record(judge, folder),
    }


# --- draws and names of metrics -------------------------------------------------------


def draw(
    items: Sequence[Any],
    limit: int | None,
    part: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """At most ``limit`` items, always the same ones, in their order.

    Args:
      items: with an `id`, or else a `prompt`.
      limit: how many; None for all.
      part: gives the part an item belongs to; parts take turns.

    >>> draw(["a", "b", "c"], None)
    ['a', 'b', 'c']
    """
    if limit is None or limit >= len(items):
        return list(items)

    def digest(item: Any) -> str:
        name = str(getattr(item, "id", item.prompt))
        return hashlib.sha256(name.encode()).hexdigest()

    order = sorted(range(len(items)), key=lambda i: digest(items[i]))
    taken: dict[Any, int] = {}
    turns = []
    for rank, i in enumerate(order):
        label = None if part is None else part(items[i])
        taken[label] = taken.get(label, 0) + 1
        turns.append((taken[label], rank, i))
    return [items[i] for i in sorted(i for _, _, i in sorted(turns)[:limit])]


def by_group(items: Iterable[Any]) -> dict[str, list[Any]]:
    """Items by their group, in order."""
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(item.group, []).append(item)
    return found


def flat(result: Result, name: str) -> dict[str, float]:
    """Names the metrics of a task METRIC/SET/GROUP.

    Refused harmless requests become `over_refusal`, and the accuracy of a possible
    domain becomes `DOMAIN_ACCURACY`.

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
            metric = DOMAIN_ACCURACY
        else:
            metric = as_asr(metric)
        found["/".join([metric, name, *group])] = float(value)
    return found


def percent_unparsed(result: Result) -> Result:
    """Turns a count of unparsed answers into a percentage."""
    share = 100.0 * result.metrics["unparsed"] / len(result.items)
    return result._replace(metrics={**result.metrics, "unparsed": share})


def bias_metrics(result: Result, name: str) -> dict[str, float]:
    """BBQ's metrics: plain `bias` is absolute and from ambiguous contexts.

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


# --- builders -------------------------------------------------------------------------


def _harmbench(ask: Ask) -> PreparedBenchmark:
    found: list[Any] = load_evalset("harmbench", ask.folder)
    items = draw([item for item in found if item.kind in HARMBENCH_KINDS], ask.limit)
    return ask.judged(items, tasks.harmbench, kinds=list(HARMBENCH_KINDS))


def _requests(*sets: tuple[str, str]) -> Callable[[Ask], PreparedBenchmark]:
    """Requests of one or more sets, each prompt of a set once; both sides alternate."""

    def build(ask: Ask) -> PreparedBenchmark:
        found = []
        for name, split in sets:
            found += distinct(load_evalset(name, ask.folder, split=split))[0]
        items = draw(found, ask.limit, lambda item: item.harmful)
        task = functools.partial(tasks.requests, name=ask.name)
        return ask.judged(items, task, splits=[split for _, split in sets])

    return build


def _artifacts(ask: Ask) -> PreparedBenchmark:
    found = ask.items("jailbreakbench_artifacts", part=lambda item: item.group)
    items = [BehaviourItem(i.prompt, i.id, group=i.group) for i in found]
    through = sum(bool(item.harmful_response) for item in found)
    task = functools.partial(tasks.requests, name=ask.name)
    return ask.judged(items, task, recorded_successes=through)


def _xstest(ask: Ask) -> PreparedBenchmark:
    items = ask.items("xstest", part=lambda item: item.harmful)
    return ask.judged(items, tasks.xstest)


def _wildguard(ask: Ask) -> PreparedBenchmark:
    found: list[Any] = load_evalset("wildguardtest", ask.folder)
    usable = [item for item in found if item.harmful_prompt is not None]
    items = draw(usable, ask.limit, lambda item: (item.group, item.harmful_prompt))
    return ask.judged(items, tasks.wildguard)


def _truthfulqa(ask: Ask) -> PreparedBenchmark:
    one, several = ask.items("truthfulqa_mc1"), ask.items("truthfulqa_mc2")

    def task(runner: Runner) -> dict[str, float]:
        mc1 = tasks.truthfulqa_mc(runner, one, metric="mc1")
        mc2 = tasks.truthfulqa_mc(runner, several, metric="mc2")
        return {**flat(mc1, ask.name), **flat(mc2, ask.name)}

    # Leak checks compare a question without its options.
    questions = [Pair(item.question, "") for item in one]
    return ask.made(questions, task, preamble=True, split="current")


def _truthfulqa_generative(ask: Ask) -> PreparedBenchmark:
    items = ask.items("truthfulqa")
    return ask.made(
        items,
        lambda runner: tasks.truthfulqa_generation(runner, items, **ask.length),
        similarity="bleu",
        preamble=True,
    )


def _bbq(ask: Ask) -> PreparedBenchmark:
    items = ask.items("bbq", part=lambda item: (item.category, item.ambiguous))

    def task(runner: Runner) -> dict[str, float]:
        return bias_metrics(percent_unparsed(tasks.bbq(runner, items)), ask.name)

    regenerated = sum(item.regenerated for item in items)
    facts = {"method": "likelihood", "style": "text", "regenerated": regenerated}
    return ask.made(items, task, **facts)


def _mmlu(ask: Ask) -> PreparedBenchmark:
    items = ask.items("mmlu", part=lambda item: item.group)
    solved = by_group(load_evalset("mmlu", ask.folder, split="dev"))
    shots = min(5, *(len(solved.get(item.group, ())) for item in items))
    return ask.made(
        items,
        lambda runner: tasks.mmlu(runner, items, solved, shots=shots),
        shots=shots,
    )


def _medqa(ask: Ask) -> PreparedBenchmark:
    items = ask.items("medqa")
    return ask.made(items, lambda runner: tasks.medqa(runner, items), split="test")


def _legalbench(ask: Ask) -> PreparedBenchmark:
    items = ask.items("legalbench", part=lambda item: item.group)

    def task(runner: Runner) -> Result:
        return percent_unparsed(tasks.legalbench(runner, items))

    kinds = len({item.group for item in items})
    return ask.made(items, task, tasks=kinds, method="likelihood", split="test")


def _gsm8k(ask: Ask) -> PreparedBenchmark:
    items = draw(load_source("gsm8k", ask.folder, split="test"), ask.limit)
    solved = load_source("gsm8k", ask.folder, split="train")[:5]
    return ask.made(
        items,
        lambda runner: tasks.gsm8k(runner, items, solved, **ask.length),
        shots=len(solved),
    )


def _humaneval(ask: Ask) -> PreparedBenchmark:
    if not ask.allow_code:
        raise UserError(
            "benchmark 'humaneval': it runs code that the model wrote; allow that "
            "(allow_code=True), or drop the benchmark"
        )
    if not kernel_isolation():
        raise UserError(
            "benchmark 'humaneval': expected Linux on x86-64 with Landlock, whose "
            "kernel can confine the model's code, got another system: drop it"
        )
    items = ask.items("humaneval")
    task = functools.partial(tasks.humaneval, items=items, allow_code_execution=True)
    return ask.made(items, functools.partial(task, **ask.length), samples=1)


def _mtbench(ask: Ask) -> PreparedBenchmark:
    if ask.output is None:
        raise UserError(
            "benchmark 'mtbench': it writes answers for a judge elsewhere; name the "
            "folder for them (study.output_folder, or output=), or drop the benchmark"
        )
    items = ask.items("mtbench")
    task = functools.partial(tasks.mtbench, items=items, folder=ask.output)
    return ask.made(items, functools.partial(task, **ask.length))


def _refusal_auc(ask: Ask) -> PreparedBenchmark:
    pairs = {
        "alpaca": (ask.items("harmbench_standard"), ask.items("alpaca_harmless")),
        "xstest": (ask.items("xstest", "unsafe"), ask.items("xstest", "safe")),
    }
    keywords = getattr(ask.judge, "keywords", None)
    keywords = keywords if keywords in KEYWORD_LISTS else PLAIN_LIST
    phrases = KEYWORD_LISTS[keywords].phrases

    def task(runner: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (bad, good) in pairs.items():
            found |= flat(tasks.refusal_auc(runner, bad, good, phrases), name)
        return found

    items = [item for pair in pairs.values() for side in pair for item in side]
    sha256 = KEYWORD_LISTS[keywords].sha256
    return ask.made(items, task, keywords=keywords, sha256=sha256)


# --- the table ------------------------------------------------------------------------

_judged = functools.partial(
    Benchmark, metrics=("refusal", "asr", "gibberish", "unparsed"), judged=True
)
_scored = functools.partial(Benchmark, scores_only=True)

BENCHMARKS: dict[str, Benchmark] = {
    "harmbench": _judged(_harmbench),
    "advbench": _judged(_requests(("advbench", "all"))),
    "jailbreakbench": _judged(
        _requests(("jailbreakbench", "harmful"), ("jailbreakbench", "benign")),
        metrics=("refusal", "asr", "over_refusal", "gibberish", "unparsed"),
    ),
    "jailbreakbench-artifacts": _judged(_artifacts),
    "beavertails": _judged(_requests(("beavertails_prompts", "test"))),
    "catqa": _judged(_requests(("catqa", "all"))),
    "xstest": _judged(_xstest, metrics=("over_refusal", "refusal")),
    "alpaca": _judged(
        _requests(("alpaca_harmless", "test")), metrics=("over_refusal",)
    ),
    "truthfulqa": _scored(_truthfulqa, metrics=("mc1", "mc2")),
    "truthfulqa-generative": Benchmark(
        _truthfulqa_generative, metrics=("truthful", "difference", "empty")
    ),
    "bbq": _scored(
        _bbq,
        metrics=(
            *("bias", "bias_signed", "bias_disambiguated", "bias_disambiguated_signed"),
            *("accuracy_ambiguous", "accuracy_disambiguated", "unparsed"),
        ),
    ),
    "wildguard": _judged(_wildguard, metrics=("robustness", "over_refusal")),
    "mmlu": _scored(_mmlu, metrics=("accuracy", "accuracy_micro")),
    "medqa": _scored(_medqa, metrics=(DOMAIN_ACCURACY,)),
    "legalbench": _scored(
        _legalbench, metrics=("balanced_accuracy", DOMAIN_ACCURACY, "unparsed")
    ),
    "gsm8k": Benchmark(
        _gsm8k,
        metrics=(DOMAIN_ACCURACY, "accuracy_marked", "unparsed"),
        answer_tokens=400,
    ),
    "humaneval": Benchmark(_humaneval, metrics=("pass@1",), answer_tokens=512),
    "mtbench": Benchmark(
        _mtbench, metrics=("answered", "file"), answer_tokens=1024, turns=2
    ),
    "refusal-auc": _scored(
        _refusal_auc, metrics=("refusal_auc", "first_refusal", "first_over_refusal")
    ),
}
"""Every name of :func:`prepare`."""
