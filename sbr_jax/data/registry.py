"""Public data sets by name: files and layouts, owners and licences, copies on the hub.

:data:`SOURCES` are training and calibration sets, pairs of a prompt and an answer;
:data:`EVALSETS` are evaluation sets, items with the answers that people gave them. They
are read from a folder of files as their owners publish them, or, without a folder, from
the hub. Items keep the file's order, so that a split by position is reproducible. A
file may be compressed.

:data:`DOMAINS` names the benign sources. `beavertails`, `hh_rlhf` and
`safety_tuned_llamas` pair unsafe requests with *safe* answers, for calibration; sets
with the role "harmful" hold harmful answers, for attacks and for defences that unlearn.
Code that reads a set outside :data:`DOMAINS` must not print it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from sbr_jax.data import _bbq, _hub, benchmarks, domains, safety
from sbr_jax.data._hub import Hub, hub_rows
from sbr_jax.data._rows import Row
from sbr_jax.data.readers import any_rows, find, jsonl_rows
from sbr_jax.data.records import BehaviourItem, Item, Pair
from sbr_jax.errors import check_names
from sbr_jax.typing import UserError

T = TypeVar("T")


def same(*names: str) -> dict[str, str]:
    """Splits whose names in files are the same as ours."""
    return {name: name for name in names}


@dataclasses.dataclass(frozen=True)
class DataSet(Generic[T]):
    """A public data set and how it is read."""

    about: str
    """Paper or owner, and licence."""
    files: tuple[str, ...]
    """Paths below the data folder: the first that exists is read, or all by ``layout``.
    SPLIT stands for the split's name in files, NAME for ours, TASK for a task's."""
    item: Callable[[Row], T | None]
    """Turns a row into its pair or item; None leaves the row out."""
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: same("all"))
    """From our names of splits to those in file names; the first is the default."""
    role: str = "domain"
    """``"domain"``, ``"safety"`` (safe answers) or ``"harmful"`` (harmful answers)."""
    read: Callable[[Path], list[Row]] = any_rows
    """Reads one file."""
    layout: Callable[[Path, str, Sequence[str]], list[Row]] | None = None
    """``(folder, split, files) -> rows`` for a set of several files."""
    keep: Callable[[Any, str], bool] | None = None
    """Whether an item belongs to the split, if the rows are those of all splits."""
    hub: Hub | None = None

    def rows(self, folder: Path, split: str) -> list[Row]:
        """The rows of a split from the files below a folder, at least one."""
        theirs = self.splits[split]
        if self.layout is not None:
            return self.layout(folder, theirs, self.files)
        names = [f.replace("SPLIT", theirs).replace("NAME", split) for f in self.files]
        return self.read(find(folder, *names))


_ALPACA = "tatsu-lab/stanford_alpaca; CC BY-NC 4.0"
_CODEALPACA = "sahil280114/codealpaca; CC BY-NC 4.0"
_BEAVERTAILS = "arXiv:2307.04657; CC BY-NC 4.0"
_SAFETY_TUNED = "arXiv:2309.07875; CC BY-NC 4.0"
_MEDQA = "arXiv:2009.13081; MIT"
_MEDQA_FILES = ("medqa/phrases_no_exclude_SPLIT.jsonl",)
_MEDQA_HUB = Hub("GBaker/MedQA-USMLE-4-options", same("test", "train"))
_LEGALBENCH = "arXiv:2308.11462; by task, mostly CC BY 4.0"
_LEGALBENCH_FILES = (
    "legalbench/tasks/TASK/base_prompt.txt",
    "legalbench/tasks/*/train.tsv",
    "legalbench/test/*.tsv",
)
_BEAVERTAILS_PAIRS = DataSet(
    _BEAVERTAILS,
    ("beavertails/round0/SPLIT.jsonl", "beavertails/NAME.jsonl"),
    safety.answered_safely,
    {
        f"{size}_{part}": f"{size}/{part}"
        for size in ("30k", "330k")
        for part in ("train", "test")
    },
    role="safety",
    hub=Hub("PKU-Alignment/BeaverTails"),
)

SOURCES: dict[str, DataSet[Pair]] = {
    "alpaca": DataSet(_ALPACA, ("alpaca/alpaca_5000.json",), domains.instruction),
    "alpaca_full": DataSet(
        _ALPACA,
        ("alpaca/alpaca_data.json",),
        domains.instruction,
        same("train"),
        hub=Hub("tatsu-lab/alpaca"),
    ),
    "codealpaca": DataSet(
        _CODEALPACA,
        ("codealpaca/new_codealpaca.json", "codealpaca/code_alpaca_2k.json"),
        domains.instruction,
        layout=domains.joined_rows,
    ),
    "codealpaca_20k": DataSet(
        _CODEALPACA,
        ("codealpaca/code_alpaca_20k.json",),
        domains.instruction,
        same("train"),
        hub=Hub("sahil2801/CodeAlpaca-20k"),
    ),
    "gsm8k": DataSet(
        "arXiv:2110.14168; MIT",
        ("gsm8k/SPLIT.jsonl",),
        domains.gsm8k,
        same("train", "test"),
        hub=Hub("openai/gsm8k", config="main"),
    ),
    "legalbench": DataSet(
        _LEGALBENCH,
        _LEGALBENCH_FILES,
        domains.legalbench,
        same("train", "test"),
        layout=domains.legalbench_rows,
    ),
    "medmcqa": DataSet(
        "arXiv:2203.14371; Apache-2.0",
        ("medmcqa/SPLIT.json",),
        domains.medmcqa,
        same("dev", "train"),
        read=jsonl_rows,
        hub=Hub(
            "openlifescienceai/medmcqa",
            {"dev": "validation", "train": "train"},
            adapt=_hub.cop_from_one,
        ),
    ),
    "medqa": DataSet(
        _MEDQA,
        _MEDQA_FILES,
        domains.medqa,
        same("test", "train", "dev"),
        hub=_MEDQA_HUB,
    ),
    "beavertails": _BEAVERTAILS_PAIRS,
    "hh_rlhf": DataSet(
        "arXiv:2204.05862; MIT",
        ("hh_rlhf/harmless-base-SPLIT.jsonl", "hh_rlhf/harmless-base/SPLIT.jsonl"),
        safety.first_turn,
        same("test", "train"),
        role="safety",
        hub=Hub("Anthropic/hh-rlhf", data_dir="harmless-base"),
    ),
    "safety_tuned_llamas": DataSet(
        _SAFETY_TUNED,
        ("safety_tuned_llamas/safety_only_data_Instructions.json",),
        domains.instruction,
        role="safety",
    ),
    "beavertails_unsafe": dataclasses.replace(
        _BEAVERTAILS_PAIRS, item=safety.answered_unsafely, role="harmful"
    ),
    "beavertails_unsafe_qa": DataSet(
        _BEAVERTAILS,
        ("beavertails/beavertails_unsafe_qa_525.json",),
        safety.conversation,
        role="harmful",
    ),
    "beavertails_unsafe_test": DataSet(
        _BEAVERTAILS,
        ("beavertails/beavertails_unsafe_test_100.json",),
        safety.conversation,
        role="harmful",
    ),
}

DOMAINS: tuple[str, ...] = tuple(
    name for name, source in SOURCES.items() if source.role == "domain"
)
"""Benign sets, which may serve as a domain to fine-tune on."""

_HARMBENCH: DataSet[Item] = DataSet(
    "arXiv:2402.04249; MIT",
    (
        "harmbench/harmbench_behaviors_text_SPLIT.csv",
        "harmbench/harmbench_targets_text.json",
    ),
    safety.harmbench,
    same("all", "test", "val"),
    layout=safety.harmbench_rows,
)
_JAILBREAKBENCH = "arXiv:2404.01318; MIT"
_XSTEST = "arXiv:2308.01263; CC BY 4.0"
_TRUTHFUL: DataSet[Item] = DataSet(
    "arXiv:2109.07958; Apache-2.0",
    ("truthfulqa/mc_taskSPLIT.json",),
    benchmarks.truthful_task("mc1_targets"),
    {"current": "", "v0": "_v0"},
    hub=Hub(
        "truthfulqa/truthful_qa",
        {"current": "validation"},
        config="multiple_choice",
        adapt=_hub.truthful_targets,
    ),
)


def _of_kind(kind: str) -> Callable[[BehaviourItem, str], bool]:
    return lambda item, split: item.kind == kind


EVALSETS: dict[str, DataSet[Item]] = {
    "harmbench": _HARMBENCH,
    **{
        f"harmbench_{kind}": dataclasses.replace(_HARMBENCH, keep=_of_kind(kind))
        for kind in safety.HARMBENCH_KINDS
    },
    "advbench": DataSet(
        "arXiv:2307.15043; MIT",
        ("advbench/harmful_behaviors.csv",),
        safety.advbench,
        hub=Hub(
            "walledai/AdvBench", {"all": "train"}, adapt=_hub.renamed(goal="prompt")
        ),
    ),
    "jailbreakbench": DataSet(
        _JAILBREAKBENCH,
        (
            "jailbreakbench/SPLIT-behaviors.csv",
            "jailbreakbench/jbb_behaviors_SPLIT.csv",
            "jailbreakbench/jbb_behaviors_harmful_and_benign_200.json",
        ),
        safety.jailbreakbench,
        same("harmful", "benign"),
        layout=safety.jailbreakbench_rows,
        hub=Hub(
            "JailbreakBench/JBB-Behaviors",
            config="behaviors",
            cells={"harmful": {"harmful": True}, "benign": {"harmful": False}},
        ),
    ),
    "jailbreakbench_artifacts": DataSet(
        _JAILBREAKBENCH,
        (
            "jailbreakbench/artifact_*.json",
            # METHOD/TYPE/MODEL.json, as in the artifacts' own repository.
            "jailbreakbench/attack-artifacts/*/*/*.json",
        ),
        safety.artifact,
        layout=safety.artifact_rows,
    ),
    "alpaca_harmless": DataSet(
        _ALPACA,
        ("alpaca/harmless_instructions_SPLIT.json",),
        safety.harmless,
        same("test", "val", "train"),
    ),
    "catqa": DataSet(
        "arXiv:2402.11746; Apache-2.0",
        ("catqa/catqa_english.json",),
        safety.catqa,
        read=safety.catqa_rows,
        hub=Hub("declare-lab/CategoricalHarmfulQA", {"all": "en"}),
    ),
    "xstest": DataSet(
        _XSTEST,
        ("xstest/xstest_prompts.csv",),
        safety.xstest,
        same("all", "safe", "unsafe"),
        keep=lambda item, split: split == "all" or item.harmful == (split == "unsafe"),
        hub=Hub("Paul/XSTest", dict.fromkeys(("all", "safe", "unsafe"), "train")),
    ),
    "beavertails_prompts": DataSet(
        _BEAVERTAILS,
        ("beavertails/beavertails_SPLIT.json",),
        safety.beavertails,
        {"test": "30k_test_prompts", "eval": "eval_prompts_250"},
    ),
    "safety_tuned_questions": DataSet(
        _SAFETY_TUNED,
        ("safety_tuned_llamas/SPLIT.json",),
        safety.question,
        same(
            *("I-MaliciousInstructions", "I-CoNa", "I-Controversial"),
            *("Q-Harm", "I-Alpaca"),
        ),
        read=safety.questions_rows,
    ),
    "xstest_completions": DataSet(
        _XSTEST,
        ("xstest/xstest_v2_completions_SPLIT_labelled.csv",),
        safety.completion,
        same("all", *safety.XSTEST_MODELS),
        layout=safety.completions_rows,
    ),
    "wildguardtest": DataSet(
        "arXiv:2406.18495; gated",
        tuple(f"wildguard/wildguard_test.{end}" for end in ("parquet", "csv", "jsonl")),
        safety.wildguard,
        layout=safety.wildguard_rows,
        hub=Hub("allenai/wildguardmix", {"all": "test"}, config="wildguardtest"),
    ),
    "truthfulqa": dataclasses.replace(
        _TRUTHFUL,
        files=("truthfulqa/TruthfulQASPLIT.csv",),
        item=benchmarks.truthfulqa,
        hub=Hub(
            "truthfulqa/truthful_qa",
            {"current": "validation"},
            config="generation",
            adapt=_hub.truthful_answers,
        ),
    ),
    "truthfulqa_mc1": _TRUTHFUL,
    "truthfulqa_mc2": dataclasses.replace(
        _TRUTHFUL, item=benchmarks.truthful_task("mc2_targets")
    ),
    "mmlu": DataSet(
        "arXiv:2009.03300; MIT",
        ("mmlu/SPLIT/*_SPLIT.csv",),
        benchmarks.mmlu,
        same("test", "val", "dev"),
        layout=benchmarks.mmlu_rows,
        hub=Hub(
            "cais/mmlu",
            {"test": "test", "val": "validation", "dev": "dev"},
            config="all",
            adapt=_hub.lettered,
        ),
    ),
    "medqa": DataSet(
        _MEDQA,
        _MEDQA_FILES,
        benchmarks.medqa,
        same("test", "train", "dev"),
        hub=_MEDQA_HUB,
    ),
    "legalbench": DataSet(
        _LEGALBENCH,
        _LEGALBENCH_FILES,
        benchmarks.legalbench,
        same("test"),
        layout=benchmarks.legalbench_rows,
    ),
    "bbq": DataSet(
        "arXiv:2110.08193; CC BY 4.0",
        ("bbq/SPLIT.jsonl", "bbq/SPLIT.regenerated.jsonl"),
        _bbq.bbq,
        same(*_bbq.SPLITS),
        layout=_bbq.bbq_rows,
        hub=Hub("oskarvanderwal/bbq", {"all": "test"}, config="All"),
    ),
    "humaneval": DataSet(
        "arXiv:2107.03374; MIT",
        ("humaneval/HumanEval.jsonl",),
        benchmarks.humaneval,
        hub=Hub("openai/openai_humaneval", {"all": "test"}),
    ),
    "mtbench": DataSet(
        "arXiv:2306.05685; Apache-2.0",
        ("mtbench/question.jsonl",),
        benchmarks.mtbench,
        hub=Hub(
            "HuggingFaceH4/mt_bench_prompts",
            {"all": "train"},
            adapt=_hub.renamed(question_id="prompt_id", turns="prompt"),
        ),
    ),
}


def load_source(
    name: str, folder: str | Path | None = None, *, split: str | None = None
) -> list[Pair]:
    """Reads a training or calibration set by name.

    Args:
      name: a key of :data:`SOURCES`.
      folder: the data folder that holds one folder per data set; None for the hub.
      split: one of the set's; None for the first.

    Returns:
      The pairs, at least one, in the order of the file.

    Raises:
      UserError: for an unknown name or split, a missing or damaged file, a row unlike
        the published ones, or a hub that cannot be reached.
    """
    check_names("data set", [name], SOURCES)
    return _load(SOURCES[name], name, folder, split)


def load_evalset(
    name: str, folder: str | Path | None = None, *, split: str | None = None
) -> list[Item]:
    """Reads an evaluation set by name.

    Args:
      name: a key of :data:`EVALSETS`.
      folder: as for :func:`load_source`; for ``wildguardtest`` also the file itself.
      split: one of the set's; None for the first.

    Returns:
      The items, at least one, in the order of the file.
    """
    check_names("evaluation set", [name], EVALSETS)
    return _load(EVALSETS[name], name, folder, split)


def _load(
    found: DataSet[T], name: str, folder: str | Path | None, split: str | None
) -> list[T]:
    split = next(iter(found.splits)) if split is None else split
    check_names(f"split of {name}", [split], found.splits)
    if folder is None:
        rows = hub_rows(found.hub, name, split)
    else:
        rows = found.rows(data_folder(folder), split)
    items = [item for item in map(found.item, rows) if item is not None]
    if found.keep is not None:
        items = [item for item in items if found.keep(item, split)]
    if not items:
        raise UserError(
            f"{rows[0].where}: expected at least one item of {name} ({split}), got "
            f"none in {len(rows)} rows: fetch the file again"
        )
    return items


def data_folder(folder: str | Path) -> Path:
    """The data folder, which must exist."""
    folder = Path(folder)
    try:
        there = folder.exists()
    except OSError:  # The name is too long, or the folder may not be entered.
        there = False
    if not there:
        raise UserError(
            f"expected a folder with data sets at {folder}, found none: name another"
        )
    return folder
