"""lm-eval on the weights of a run: `experiments.run PRESET … --harness [TASK ...]`.

After the run, or on a finished folder, the start model and the deployed weights of
every variant and seed go through EleutherAI's harness (the extra `eval`). It reads the
items of the data folder and fetches nothing. With a limit, the items are those that
`evaluation.benchmarks` draws. Chat models are asked in their template, others in plain
text: compare like with like. `WORKDIR/harness.json` gets one entry per variant and seed
as soon as it is measured; the same command continues after an interruption.
"""

import contextlib
import hashlib
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbr_jax import errors
from sbr_jax.data.registry import load_evalset
from sbr_jax.evaluation import harness_tasks
from sbr_jax.evaluation.benchmarks import by_group, draw
from sbr_jax.evaluation.tasks.bias import item_scores
from sbr_jax.programs.job import Job
from sbr_jax.training.deployed import deployments
from sbr_jax.typing import UserError

FILE = "harness.json"


class Task(NamedTuple):
    """One task name of `--harness`: its items, and the harness's tasks over them."""

    items: Sequence[Any]
    tasks: Sequence[Mapping[str, Any]]


class Source(NamedTuple):
    """Where the items of a task name come from, and how tasks are made from them.

    Attributes:
        evalset: the data set.
        make: makes the harness's tasks from its items and the data folder.
        part: label of an item's part; draws take from the parts in turn.
    """

    evalset: str
    make: Callable[[Any, Path], list[dict[str, Any]]]
    part: Callable[[Any], Any] | None = None


def _mmlu(items: Any, folder: Path) -> list[dict[str, Any]]:
    solved = by_group(load_evalset("mmlu", folder, split="dev"))
    subjects = by_group(items).items()
    return [harness_tasks.mmlu_task(i, solved.get(n, [])[:5]) for n, i in subjects]


def _truthfulqa(name: str) -> Source:
    return Source(
        name, lambda items, _: [harness_tasks.truthfulqa_task(items, name=name)]
    )


TASKS = {
    "truthfulqa_mc1": _truthfulqa("truthfulqa_mc1"),
    "truthfulqa_mc2": _truthfulqa("truthfulqa_mc2"),
    "bbq": Source(
        "bbq",
        lambda items, _: [harness_tasks.bbq_task(items)],
        lambda item: (item.category, item.ambiguous),
    ),
    "mmlu": Source("mmlu", _mmlu, lambda item: item.group),
    "medqa_4options": Source(
        "medqa", lambda items, _: [harness_tasks.medqa_task(items)]
    ),
}


def check(tasks: Sequence[str], job: Job) -> None:
    """Refuses what `--harness` cannot do, before anything is read.

    An empty ``tasks`` stands for all tasks.
    """
    errors.check_names("task of --harness", tasks, TASKS)
    if job.sources.data is None:
        raise UserError(
            "--harness: expected a folder with the tasks' data sets, got none: add "
            "--data FOLDER (a preset without that option has no such data)"
        )


def read(job: Job, names: Sequence[str], limit: int | None) -> dict[str, Task]:
    """Reads the items of the named tasks.

    Empty ``names`` stand for all tasks. Without a limit the study's own limit holds.

    Raises:
        UserError: if lm-eval is missing, files are missing or damaged, or the folder's
            `harness.json` is about other tasks or items.
    """
    harness_tasks.import_harness()
    folder = Path(job.sources.data or "")
    limit = limit or getattr(job.study, "limit", None)
    found = {}
    for name in names or TASKS:
        source = TASKS[name]
        items = draw(load_evalset(source.evalset, folder), limit, source.part)
        found[name] = Task(items, source.make(items, folder))
    _entries(job, found)
    return found


def evaluate(job: Job, study: Any, tasks: Mapping[str, Task]) -> Path:
    """Puts the start model and every variant's final weights through the harness.

    Returns:
        `harness.json`.
    """
    from sbr_jax.evaluation.harness import evaluate_with_harness
    from sbr_jax.evaluation.runner import ModelRunner
    from sbr_jax.evaluation.scorer import Budget
    from sbr_jax.training.records import plain_numbers, write_record

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = job.workdir / FILE
    chat = bool(study.model.tokenizer.chat_template)
    budget = Budget(tokens=job.config.hardware.score_tokens)
    entries = _entries(job, tasks)
    done = {(entry["method"], entry["seed"]) for entry in entries}
    for variant, seed, weights in deployments(
        job.workdir, study, job.config, job.methods, job.seeds, job.domains, done
    ):
        if not job.quiet:
            print(f"harness  {variant}  seed {seed}", file=sys.stderr, flush=True)
        runner = ModelRunner(study.model, *weights, too_long="left", budget=budget)
        # lm-eval cannot switch off its progress bars, one or two for each task and
        # variant. Errors are raised, not printed, so nothing is lost.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                found = evaluate_with_harness(
                    runner,
                    [dict(task) for wanted in tasks.values() for task in wanted.tasks],
                    apply_chat_template=chat,
                    system_instruction=getattr(job.study, "system", None),
                )
            except UserError as error:
                where = f"--harness, {variant}, seed {seed}"
                raise UserError(f"{where}: {error}") from error
        metrics: dict[str, float] = {}
        for name, wanted in tasks.items():
            results = [found[task["task"]] for task in wanted.tasks]
            accuracies = [result.metrics["acc,none"] for result in results]
            metrics[name] = 100.0 * float(np.mean(accuracies))
            if name == "bbq":
                picks = [item["pick"] for item in results[0].items]
                metrics |= bias_of(wanted.items, picks)
        numbers = plain_numbers(metrics)
        entries.append({"method": variant, "seed": seed, "metrics": numbers})
        whole = {"of": _identity(job, tasks), "results": entries}
        write_record(path, whole, indent=1)
    return path


def bias_of(items: Sequence[Any], picks: Sequence[int]) -> dict[str, float]:
    """The absolute bias in ambiguous contexts by category, if there are any."""
    used = [
        (pick, item)
        for pick, item in zip(picks, items, strict=True)
        if item.ambiguous and item.biased is not None and "_x_" not in item.category
    ]
    return {"bbq_bias": item_scores(used, ambiguous=True).absolute} if used else {}


def _identity(job: Job, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Run, version and items that all entries of one `harness.json` share."""
    from sbr_jax.training.run_folder import RunFolder

    def digest(items: Sequence[Any]) -> str:
        return hashlib.sha256("\n".join(i.id for i in items).encode()).hexdigest()[:12]

    return {
        "run": RunFolder(job.workdir).run,
        "lm_eval": harness_tasks.import_harness().__version__,
        "items": {name: len(task.items) for name, task in tasks.items()},
        "ids": {name: digest(task.items) for name, task in tasks.items()},
        "system": getattr(job.study, "system", None),
    }


def _entries(job: Job, tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """The entries of an existing `harness.json`."""
    from sbr_jax.training.records import read_json

    path = job.workdir / FILE
    if not path.exists():
        return []
    whole = read_json(path, sealed=True)
    if whole.get("of") != _identity(job, tasks):
        raise UserError(
            f"{path} holds other tasks, items or weights: ask for the same "
            "again, or move that file away"
        )
    return list(whole["results"])
