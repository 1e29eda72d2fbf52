"""Task dicts of EleutherAI's evaluation harness made of our items (extra ``eval``).

The questions are worded as in the harness's own tasks; the caller provides the data.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data.records import LETTERS, BiasItem, ChoiceItem
from sbr_jax.evaluation.result import require_items
from sbr_jax.evaluation.tasks.choices import mmlu_head, truthfulqa_prompt
from sbr_jax.typing import UserError


def import_harness() -> Any:
    """Imports the library ``lm_eval``."""
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            "harness: expected lm-eval to be installed, it is not; "
            "pip install 'sbr_jax[eval]'"
        ) from error


def _choice_task(
    name: str,
    rows: list[dict[str, Any]],
    process_results: Callable[[Any, Any], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """A task dict over rows of ``prompt``, ``choices`` and ``target``."""
    import_harness()
    require_items(name, rows)
    # Installed with lm-eval.
    datasets = importlib.import_module("datasets")
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    task = {
        "task": name,
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "target",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        ],
    }
    return task | ({"process_results": process_results} if process_results else {})


def truthfulqa_task(
    items: Sequence[ChoiceItem], *, name: str = "truthfulqa_mc1"
) -> dict[str, Any]:
    """TruthfulQA as a harness task: MC1, or MC2 if items have several right options.

    Args:
      items: the questions; MC1's have their right option first.
      name: the task's name; if it ends with ``mc2`` the task is MC2 however many
        options are right.

    Returns:
      A task dict; its metric is ``acc``.
    """
    rows = [
        {
            "prompt": truthfulqa_prompt(item.question, True),
            "choices": list(item.choices),
            "target": int(item.correct[0]),
            "labels": [int(i in item.correct) for i in range(len(item.choices))],
        }
        for item in items
    ]
    several = name.endswith("mc2") or any(len(item.correct) > 1 for item in items)
    return _choice_task(name, rows, _share_of_true if several else None)


def _share_of_true(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    log_p = np.array([log_likelihood for log_likelihood, _ in results])
    p = np.exp(log_p - log_p.max())
    return {"acc": float(p[np.array(doc["labels"]) == 1].sum() / p.sum())}


def bbq_task(items: Sequence[BiasItem]) -> dict[str, Any]:
    """BBQ's three options as a harness task; score the picks with ``bias_scores``.

    The harness's own task crashes on an item whose answers lack their group, and adds
    nine more wordings of "unknown" to the options; this one compares just the three.
    """
    rows = [
        {
            "prompt": f"{item.context}\n\nQ: {item.question}\nA:",
            "choices": list(item.choices),
            "target": int(item.correct),
        }
        for item in items
    ]
    return _choice_task("bbq", rows)


def mmlu_task(
    items: Sequence[ChoiceItem], examples: Sequence[ChoiceItem] = ()
) -> dict[str, Any]:
    """One subject of MMLU as a harness task.

    Solved examples come first, in order.

    Returns:
      A task dict, named ``mmlu_SUBJECT``.

    Raises:
      UserError: if the items are of several subjects.
    """
    require_items("mmlu", items)
    subjects = sorted({item.group for item in items})
    if len(subjects) > 1:
        raise UserError(
            f"mmlu_task: expected one subject, got {', '.join(subjects[:5])}; make one "
            "task of each"
        )
    head = mmlu_head(subjects[0], examples)
    return _choice_task(f"mmlu_{subjects[0]}", _letter_rows(items, head))


def medqa_task(items: Sequence[ChoiceItem]) -> dict[str, Any]:
    """MedQA as a harness task."""
    return _choice_task("medqa_4options", _letter_rows(items, "Question: "))


def _letter_rows(items: Sequence[ChoiceItem], head: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt": head + item.prompt,
            "choices": list(LETTERS[: len(item.choices)]),
            "target": int(item.correct[0]),
        }
        for item in items
    ]
