"""Evaluation sets by name: items with the answers that people gave them.

Read from a folder of files as their owners publish them, or, without a folder, from the
hub (:mod:`sbr_jax.data.hub`). Items come in the order of the file.

| name | items | splits (first: default) | files below the data folder |
|---|---|---|---|
| `harmbench`, `harmbench_KIND` | behaviours | all, test, val | \
`harmbench/harmbench_behaviors_text_SPLIT.csv`, `harmbench_targets_text.json` |
| `advbench` | behaviours | all | `advbench/harmful_behaviors.csv` |
| `jailbreakbench` | behaviours | harmful, benign | \
`jailbreakbench/{harmful,benign}-behaviors.csv` or `jbb_behaviors_*` |
| `jailbreakbench_artifacts` | judged | all | `jailbreakbench/artifact_*.json` or \
`attack-artifacts/METHOD/TYPE/MODEL.json` |
| `alpaca_harmless` | behaviours | test, val, train | \
`alpaca/harmless_instructions_SPLIT.json` |
| `catqa` | behaviours | all | `catqa/catqa_english.json` |
| `xstest` | behaviours | all, safe, unsafe | `xstest/xstest_prompts.csv` |
| `beavertails_prompts` | behaviours | test, eval | \
`beavertails/beavertails_30k_test_prompts.json`, `beavertails_eval_prompts_250.json` |
| `safety_tuned_questions` | behaviours | I-MaliciousInstructions, … | \
`safety_tuned_llamas/SPLIT.json` |
| `xstest_completions` | judged | all, or one model | \
`xstest/xstest_v2_completions_MODEL_labelled.csv` |
| `wildguardtest` | judged | all | a file of your own, or \
`wildguard/wildguard_test.{parquet,csv,jsonl}` |
| `truthfulqa` | questions | current, v0 | `truthfulqa/TruthfulQA.csv` |
| `truthfulqa_mc1`, `truthfulqa_mc2` | choices | current, v0 | \
`truthfulqa/mc_task.json` |
| `mmlu` | choices | test, val, dev | `mmlu/SPLIT/SUBJECT_SPLIT.csv` |
| `medqa` | choices | test, train, dev | `medqa/phrases_no_exclude_SPLIT.jsonl` |
| `legalbench` | choices | test | `legalbench/test/TASK.tsv`, \
`legalbench/tasks/TASK/base_prompt.txt` |
| `bbq` | bias | all, single, intersectional, or one category | `bbq/CATEGORY.jsonl` |
| `humaneval` | code | all | `humaneval/HumanEval.jsonl` |
| `mtbench` | dialogues | all | `mtbench/question.jsonl` |

Several sets hold harmful requests: whoever reads them must not print them.

References: arXiv:2402.04249 (HarmBench), arXiv:2307.15043 (AdvBench), arXiv:2404.01318
(JailbreakBench), arXiv:2402.11746 (CatQA), arXiv:2308.01263 (XSTest), arXiv:2307.04657
(BeaverTails), arXiv:2309.07875 (Safety-Tuned LLaMAs), arXiv:2406.18495 (WildGuard),
arXiv:2109.07958 (TruthfulQA), arXiv:2009.03300 (MMLU), arXiv:2009.13081 (MedQA),
arXiv:2308.11462 (LegalBench), arXiv:2110.08193 (BBQ), arXiv:2107.03374 (HumanEval),
arXiv:2306.05685 (MT-Bench).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sbr_jax.data import artifacts, bbq, behaviours, choices, questions
from sbr_jax.data.hub import hub_rows
from sbr_jax.data.readers import any_rows, find
from sbr_jax.data.records import Item
from sbr_jax.data.rows import Row
from sbr_jax.data.sources import data_folder, known
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """How a set is read: rows of a split, and the item that a row holds."""

    rows: Callable[[Path, str], list[Row]]
    item: Callable[[Row], Item]
    splits: tuple[str, ...] = ("all",)
    """The first is the default."""
    keep: Callable[[Item, str], bool] | None = None
    """Whether an item belongs to the split, where the rows are those of all."""


def _is_kind(kind: str) -> Callable[[Item, str], bool]:
    return lambda item, split: item.kind == kind


def _file(name: str) -> Callable[[Path, str], list[Row]]:
    return lambda folder, split: any_rows(find(folder, name))


_TRUTHFUL_SPLITS = ("current", "v0")
_HARMBENCH_SPLITS = ("all", "test", "val")

EVALSETS: dict[str, EvalSet] = {
    "harmbench": EvalSet(
        behaviours.harmbench_rows, behaviours.harmbench, _HARMBENCH_SPLITS
    ),
    **{
        f"harmbench_{kind}": EvalSet(
            behaviours.harmbench_rows,
            behaviours.harmbench,
            _HARMBENCH_SPLITS,
            keep=_is_kind(kind),
        )
        for kind in behaviours.HARMBENCH_KINDS
    },
    "advbench": EvalSet(_file("advbench/harmful_behaviors.csv"), behaviours.advbench),
    "jailbreakbench": EvalSet(
        behaviours.jailbreakbench_rows, behaviours.jailbreakbench, ("harmful", "benign")
    ),
    "jailbreakbench_artifacts": EvalSet(artifacts.artifact_rows, artifacts.artifact),
    "alpaca_harmless": EvalSet(
        artifacts.harmless_rows, artifacts.harmless, ("test", "val", "train")
    ),
    "catqa": EvalSet(behaviours.catqa_rows, behaviours.catqa),
    "xstest": EvalSet(
        _file("xstest/xstest_prompts.csv"),
        behaviours.xstest,
        ("all", "safe", "unsafe"),
        keep=lambda item, split: split == "all" or item.harmful == (split == "unsafe"),
    ),
    "beavertails_prompts": EvalSet(
        behaviours.beavertails_rows, behaviours.beavertails, ("test", "eval")
    ),
    "safety_tuned_questions": EvalSet(
        behaviours.questions_rows,
        behaviours.question,
        ("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "Q-Harm", "I-Alpaca"),
    ),
    "xstest_completions": EvalSet(
        behaviours.completions_rows,
        behaviours.completion,
        ("all", *behaviours.XSTEST_MODELS),
    ),
    "wildguardtest": EvalSet(behaviours.wildguard_rows, behaviours.wildguard),
    "truthfulqa": EvalSet(
        questions.truthfulqa_rows, questions.truthfulqa, _TRUTHFUL_SPLITS
    ),
    "truthfulqa_mc1": EvalSet(
        questions.truthful_task_rows,
        questions.truthful_task("mc1_targets"),
        _TRUTHFUL_SPLITS,
    ),
    "truthfulqa_mc2": EvalSet(
        questions.truthful_task_rows,
        questions.truthful_task("mc2_targets"),
        _TRUTHFUL_SPLITS,
    ),
    "mmlu": EvalSet(questions.mmlu_rows, questions.mmlu, ("test", "val", "dev")),
    "medqa": EvalSet(choices.medqa_rows, choices.medqa, ("test", "train", "dev")),
    "legalbench": EvalSet(choices.legalbench_rows, choices.legalbench, ("test",)),
    "bbq": EvalSet(bbq.bbq_rows, bbq.bbq_item, bbq.SPLITS),
    "humaneval": EvalSet(questions.humaneval_rows, questions.humaneval),
    "mtbench": EvalSet(questions.mtbench_rows, questions.mtbench),
}


def load_evalset(
    name: str, folder: str | Path | None = None, *, split: str | None = None
) -> list[Item]:
    """Reads an evaluation set by name.

    Args:
      name: a key of :data:`EVALSETS`.
      folder: the data folder that holds one folder per data set (for
        ``wildguardtest`` also the file itself); None for the hub.
      split: one of the set's; None for its first.

    Returns:
      The items, at least one, in the order of the file.

    Raises:
      UserError: for an unknown name or split, a missing or damaged file, a row that is
        not as published, and a hub that cannot be reached.
    """
    known("evaluation set", name, EVALSETS)
    evalset = EVALSETS[name]
    split = evalset.splits[0] if split is None else split
    known(f"split of {name}", split, evalset.splits)
    rows = (
        hub_rows(name, split)
        if folder is None
        else evalset.rows(data_folder(folder), split)
    )
    items = [evalset.item(row) for row in rows]
    if evalset.keep is not None:
        items = [item for item in items if evalset.keep(item, split)]
    if not items:
        raise UserError(
            f"{rows[0].where}: expected items of {name} ({split}), got none in "
            f"{len(rows)} rows: fetch the file again"
        )
    return items


__all__ = ["EVALSETS", "EvalSet", "load_evalset"]
