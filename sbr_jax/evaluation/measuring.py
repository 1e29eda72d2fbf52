"""How each measurement of `measures` is made: set, task, metric names.

A builder takes what was asked for, reads and draws the items, and returns a
`Measurement`; nothing touches a model before that is called. The tasks are those of
:mod:`sbr_jax.evaluation.tasks`.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sbr_jax.data.leaks import distinct
from sbr_jax.data.registry import load_evalset, load_source
from sbr_jax.evaluation import tasks
from sbr_jax.evaluation.first_token import refusal_auc
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.keyword import KEYWORD_LISTS
from sbr_jax.evaluation.measurement import (
    Ask,
    Measurement,
    bias_metrics,
    draw,
    flat,
    percent_unparsed,
)
from sbr_jax.evaluation.sandbox import kernel_isolation
from sbr_jax.typing import UserError

PLAIN_LIST = "plain25"
"""The phrases of `refusal-auc` under a judge that has no list of its own."""


def _harmbench(ask: Ask) -> Measurement:
    kinds = ("standard", "contextual")
    found = load_evalset("harmbench", ask.folder)
    items = draw([item for item in found if item.kind in kinds], ask.limit)
    return ask.judged(items, tasks.harmbench, kinds=list(kinds))


def _requests(*sets: tuple[str, str]) -> Callable[[Ask], Measurement]:
    """Requests of one or more sets, each prompt of a set once; both sides in turns."""

    def build(ask: Ask) -> Measurement:
        found = []
        for name, split in sets:
            found += distinct(load_evalset(name, ask.folder, split=split))[0]
        items = draw(found, ask.limit, lambda item: item.harmful)
        task = functools.partial(tasks.requests, name=ask.name)
        return ask.judged(items, task, splits=[split for _, split in sets])

    return build


class _Attack(NamedTuple):
    """A recorded attack as a request."""

    id: str
    prompt: str
    group: str
    kind: str = ""
    harmful: bool = True


def _artifacts(ask: Ask) -> Measurement:
    found = ask.items("jailbreakbench_artifacts", part=lambda item: item.group)
    items = [_Attack(item.id, item.prompt, item.group) for item in found]
    through = sum(bool(item.harmful_response) for item in found)
    task = functools.partial(tasks.requests, name=ask.name)
    return ask.judged(items, task, recorded_successes=through)


def _xstest(ask: Ask) -> Measurement:
    items = ask.items("xstest", part=lambda item: item.harmful)
    return ask.judged(items, tasks.xstest)


def _wildguard(ask: Ask) -> Measurement:
    found = load_evalset("wildguardtest", ask.folder)
    usable = [item for item in found if item.harmful_prompt is not None]
    items = draw(usable, ask.limit, lambda item: (item.group, item.harmful_prompt))
    return ask.judged(items, tasks.wildguard)


def _truthfulqa(ask: Ask) -> Measurement:
    sets = {metric: ask.items(f"truthfulqa_{metric}") for metric in ("mc1", "mc2")}

    def task(runner: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric, items in sets.items():
            result = tasks.truthfulqa_mc(runner, items, metric=metric)
            found |= flat(result, ask.name)
        return found

    questions = [_Asked(item.question) for item in sets["mc1"]]
    return ask.made(questions, task, preamble=True, split="current")


class _Asked(NamedTuple):
    """A question without its options: what leak checks compare."""

    prompt: str


def _truthfulqa_generative(ask: Ask) -> Measurement:
    items = ask.items("truthfulqa")
    return ask.made(
        items,
        lambda runner: tasks.truthfulqa_generation(runner, items, **ask.length),
        similarity="bleu",
        preamble=True,
    )


def _bbq(ask: Ask) -> Measurement:
    items = ask.items("bbq", part=lambda item: (item.category, item.ambiguous))

    def task(runner: Any) -> dict[str, float]:
        return bias_metrics(percent_unparsed(tasks.bbq(runner, items)), ask.name)

    regenerated = sum(item.regenerated for item in items)
    facts = {"method": "likelihood", "style": "text", "regenerated": regenerated}
    return ask.made(items, task, **facts)


def _mmlu(ask: Ask) -> Measurement:
    items = ask.items("mmlu", part=lambda item: item.group)
    solved: dict[str, list[Any]] = {}
    for item in load_evalset("mmlu", ask.folder, split="dev"):
        solved.setdefault(item.group, []).append(item)
    shots = min(5, *(len(solved.get(item.group, ())) for item in items))
    task = lambda runner: tasks.mmlu(runner, items, solved, shots=shots)  # noqa: E731
    return ask.made(items, task, shots=shots)


def _medqa(ask: Ask) -> Measurement:
    items = ask.items("medqa")
    return ask.made(items, lambda runner: tasks.medqa(runner, items), split="test")


def _legalbench(ask: Ask) -> Measurement:
    items = ask.items("legalbench", part=lambda item: item.group)

    def task(runner: Any) -> Result:
        return percent_unparsed(tasks.legalbench(runner, items))

    kinds = len({item.group for item in items})
    return ask.made(items, task, tasks=kinds, method="likelihood", split="test")


def _gsm8k(ask: Ask) -> Measurement:
    items = draw(load_source("gsm8k", ask.folder, split="test"), ask.limit)
    solved = load_source("gsm8k", ask.folder, split="train")[:5]
    return ask.made(
        items,
        lambda runner: tasks.gsm8k(runner, items, solved, **ask.length),
        shots=len(solved),
    )


def _humaneval(ask: Ask) -> Measurement:
    if not ask.allow_code:
        raise UserError(
            "measurement 'humaneval': it runs code that the model wrote; allow that "
            "(allow_code=True), or drop the measurement"
        )
    if not kernel_isolation():
        raise UserError(
            "measurement 'humaneval': expected Linux on x86-64 with Landlock, whose "
            "kernel can confine the model's code, got another system: drop it"
        )
    items = ask.items("humaneval")
    return ask.made(
        items,
        lambda runner: tasks.humaneval(
            runner, items, allow_code_execution=True, **ask.length
        ),
        samples=1,
    )


def _mtbench(ask: Ask) -> Measurement:
    if ask.output is None:
        raise UserError(
            "measurement 'mtbench': it writes answers for a judge elsewhere; name the "
            "folder for them (study.output_folder, or output=), or drop the measurement"
        )
    folder, items = Path(ask.output), ask.items("mtbench")

    def task(runner: Any) -> dict[str, float]:
        path = folder / ".mtbench.jsonl"
        tasks.write_mtbench(runner, items, path, model_id="model", **ask.length)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        path.unlink()
        turns = [turn for row in rows for turn in row["choices"][0]["turns"]]
        # Named by its content: the caller does not say which weights these are, and a
        # run that is continued must not write the same answers under another name.
        number = int(hashlib.sha256("\0".join(turns).encode()).hexdigest(), 16) % 10**6
        name = f"mtbench-{number:06d}"
        lines = [json.dumps({**r, "model_id": name}, ensure_ascii=False) for r in rows]
        text = "\n".join(lines) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        answered = 100.0 * sum(bool(turn.strip()) for turn in turns) / len(turns)
        return {"answered/mtbench": answered, "file/mtbench": float(number)}

    return ask.made(items, task)


def _refusal_auc(ask: Ask) -> Measurement:
    harmful = ask.items("harmbench_standard")
    harmless = ask.items("alpaca_harmless")
    pairs = {
        "alpaca": (harmful, harmless),
        "xstest": tuple(ask.items("xstest", split=side) for side in ("unsafe", "safe")),
    }
    keywords = getattr(ask.judge, "keywords", None)
    keywords = keywords if keywords in KEYWORD_LISTS else PLAIN_LIST
    phrases = KEYWORD_LISTS[keywords].phrases

    def task(runner: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (bad, good) in pairs.items():
            found |= flat(refusal_auc(runner, bad, good, phrases), name)
        return found

    items = [item for pair in pairs.values() for side in pair for item in side]
    sha256 = KEYWORD_LISTS[keywords].sha256
    return ask.made(items, task, keywords=keywords, sha256=sha256)


BUILDERS: dict[str, Callable[[Ask], Measurement]] = {
    "harmbench": _harmbench,
    "advbench": _requests(("advbench", "all")),
    "jailbreakbench": _requests(
        ("jailbreakbench", "harmful"), ("jailbreakbench", "benign")
    ),
    "jailbreakbench-artifacts": _artifacts,
    "beavertails": _requests(("beavertails_prompts", "test")),
    "catqa": _requests(("catqa", "all")),
    "xstest": _xstest,
    "alpaca": _requests(("alpaca_harmless", "test")),
    "truthfulqa": _truthfulqa,
    "truthfulqa-generative": _truthfulqa_generative,
    "bbq": _bbq,
    "wildguard": _wildguard,
    "mmlu": _mmlu,
    "medqa": _medqa,
    "legalbench": _legalbench,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mtbench": _mtbench,
    "refusal-auc": _refusal_auc,
}
