"""The same rows from the Hugging Face hub, where no folder is given.

:data:`HUB` names, for every set that can be had there, the repository, the
configuration, its names of our splits, and what turns its rows into rows of the
original file. Sets that are missing (HarmBench, LegalBench, the Safety-Tuned LLaMAs)
have no copy there with the same rows: they need a folder. Some repositories want their
terms accepted first (AdvBench, WildGuardTest) and look like a missing set before that.
Copies may be of another date than the owner's files: TruthfulQA's is of 2022, MMLU's
validation set has 1,531 questions, and BBQ's is the official draw.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sbr_jax.data.readers import filled
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where a set lies on the hub."""

    path: str
    splits: Mapping[str, str]
    """Our name of a split to the hub's."""
    config: str | None = None
    data_dir: str | None = None
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """From the hub's columns to those of the original file."""
    cells: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What a row gets besides, by our name of the split."""


def _renamed(**names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Renames columns: new name = old name."""

    def adapt(row):
        return row | {new: row[old] for new, old in names.items() if old in row}

    return adapt


def _listed(value: Any) -> list[Any]:
    # A text would be taken for a list of its letters.
    if not isinstance(value, list):
        raise TypeError
    return value


def _cop_from_one(row):
    # The hub's copy of MedMCQA counts the right option from 0, the release from 1.
    return row | {"cop": row["cop"] + 1} if type(row.get("cop")) is int else row


def _targets(row):
    """TruthfulQA's options as the mapping from option to 0 or 1 of the file."""

    def mapping(cell):
        choices, labels = _listed(cell["choices"]), _listed(cell["labels"])
        if len(set(choices)) < len(choices):
            raise ValueError
        return dict(zip(choices, labels, strict=True))

    names = ("mc1_targets", "mc2_targets")
    return row | {name: mapping(row[name]) for name in names if name in row}


def _generation(row):
    """TruthfulQA's answers as the semicolon-separated cells of the file."""
    return {
        "Category": row["category"],
        "Question": row["question"],
        "Best Answer": row["best_answer"],
        "Correct Answers": "; ".join(_listed(row["correct_answers"])),
        "Incorrect Answers": "; ".join(_listed(row["incorrect_answers"])),
    }


def _lettered(row):
    """MMLU's list of options and position as the cells of the file."""
    cells = dict(zip("ABCD", _listed(row["choices"]), strict=True))
    if type(row["answer"]) is not int:
        raise TypeError
    return row | cells | {"answer": dict(enumerate("ABCD"))[row["answer"]]}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_BEAVERTAILS = Hub(
    "PKU-Alignment/BeaverTails",
    _same("30k_train", "30k_test", "330k_train", "330k_test"),
)
_TRUTHFUL = Hub(
    "truthfulqa/truthful_qa",
    {"current": "validation"},
    config="multiple_choice",
    adapt=_targets,
)

HUB: dict[str, Hub] = {
    "advbench": Hub(
        "walledai/AdvBench", {"all": "train"}, adapt=_renamed(goal="prompt")
    ),
    "alpaca_full": Hub("tatsu-lab/alpaca", _same("train")),
    "bbq": Hub("oskarvanderwal/bbq", {"all": "test"}, config="All"),
    "beavertails": _BEAVERTAILS,
    "beavertails_unsafe": _BEAVERTAILS,
    "catqa": Hub("declare-lab/CategoricalHarmfulQA", {"all": "en"}),
    "codealpaca_20k": Hub("sahil2801/CodeAlpaca-20k", _same("train")),
    "gsm8k": Hub("openai/gsm8k", _same("train", "test"), config="main"),
    "hh_rlhf": Hub(
        "Anthropic/hh-rlhf", _same("test", "train"), data_dir="harmless-base"
    ),
    "humaneval": Hub("openai/openai_humaneval", {"all": "test"}),
    "jailbreakbench": Hub(
        "JailbreakBench/JBB-Behaviors",
        _same("harmful", "benign"),
        config="behaviors",
        cells={"harmful": {"harmful": True}, "benign": {"harmful": False}},
    ),
    "medmcqa": Hub(
        "openlifescienceai/medmcqa",
        {"dev": "validation", "train": "train"},
        adapt=_cop_from_one,
    ),
    "medqa": Hub("GBaker/MedQA-USMLE-4-options", _same("test", "train")),
    "mmlu": Hub(
        "cais/mmlu",
        {"test": "test", "val": "validation", "dev": "dev"},
        config="all",
        adapt=_lettered,
    ),
    "mtbench": Hub(
        "HuggingFaceH4/mt_bench_prompts",
        {"all": "train"},
        adapt=_renamed(question_id="prompt_id", turns="prompt", references="reference"),
    ),
    "truthfulqa": dataclasses.replace(
        _TRUTHFUL, config="generation", adapt=_generation
    ),
    "truthfulqa_mc1": _TRUTHFUL,
    "truthfulqa_mc2": _TRUTHFUL,
    "wildguardtest": Hub(
        "allenai/wildguardmix", {"all": "test"}, config="wildguardtest"
    ),
    "xstest": Hub("Paul/XSTest", {"all": "train", "safe": "train", "unsafe": "train"}),
}


def hub_rows(name: str, split: str) -> list[Row]:
    """The rows of one split of a set on the hub, as those of its original file.

    Args:
      name: of the set.
      split: our name of the split.

    Returns:
      At least one row.

    Raises:
      UserError: if the set or split is not on the hub, ``datasets`` is missing, the hub
        cannot be reached, or the copy has other columns than its card says.
    """
    hub = HUB.get(name)
    if hub is None or split not in hub.splits:
        raise UserError(
            f"expected a folder with '{name}' (split {split}), got none, and the hub "
            "has no copy of it: name the data folder with --data"
        )
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"expected the package 'datasets' to fetch '{name}', found none: install "
            "sbr_jax[eval], or name a data folder with --data"
        ) from error
    try:
        data = datasets.load_dataset(
            hub.path, hub.config, data_dir=hub.data_dir, split=hub.splits[split]
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"expected to fetch {hub.path} from the hub, got {type(error).__name__}: "
            "check the network and whether its terms must be accepted, or name a data "
            "folder with --data"
        ) from error
    where = f"{hub.path} ({hub.splits[split]})"
    cells = hub.cells.get(split, {})
    rows = (_adapted(hub, where, i, {**row, **cells}) for i, row in enumerate(data, 1))
    return filled(where, rows)


def _adapted(hub: Hub, where: str, number: int, values: dict[str, Any]) -> Row:
    row = Row.read(where, number, values)
    if hub.adapt is None:
        return row
    try:
        return row._replace(values=hub.adapt(dict(row.values)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}, row {number}: expected the columns of its card, got "
            f"{', '.join(map(repr, row.values))} with other contents: name a data "
            "folder with --data"
        ) from error
