"""Requests and judged exchanges: rows of the published files, and their items.

The table of files is in :mod:`sbr_jax.data.evalsets`. Most of these sets hold harmful
requests; nothing here prints or quotes a text.
"""

from pathlib import Path

from sbr_jax.data.readers import (
    any_rows,
    filled,
    find,
    json_rows,
    json_value,
    table_rows,
)
from sbr_jax.data.records import BehaviourItem, JudgedItem
from sbr_jax.data.rows import Row, describe
from sbr_jax.typing import UserError

HARMBENCH_KINDS = ("standard", "contextual", "copyright")


def harmbench_rows(folder: Path, split: str) -> list[Row]:
    """Behaviours with the beginning of a compliant answer under ``target``."""
    root = folder / "harmbench"
    source = find(root, "harmbench_targets_text.json")
    targets = json_value(source)
    rows = table_rows(find(root, f"harmbench_behaviors_text_{split}.csv"))
    if not isinstance(targets, dict):
        raise UserError(
            f"{source}: expected targets by BehaviorID, got {describe(targets)}"
        )
    for row in rows:
        if row.text("BehaviorID") not in targets:
            raise row.fault("BehaviorID", f"an id that {source} has")
        if not isinstance(target := targets[row.text("BehaviorID")], str):
            raise UserError(
                f"{source}: expected a text for the id of row {row.number} of "
                f"{row.where}, got {describe(target)}"
            )
    return [row.with_cells(target=targets[row.text("BehaviorID")]) for row in rows]


def harmbench(row: Row) -> BehaviourItem:
    """A behaviour of HarmBench; its context is set before it."""
    return BehaviourItem(
        behaviour=row.text("Behavior"),
        id=row.text("BehaviorID"),
        group=row.text("SemanticCategory"),
        kind=row.option("FunctionalCategory", HARMBENCH_KINDS),
        target=row.text("target"),
        context=row.text("ContextString", empty=True),
    )


def advbench(row: Row) -> BehaviourItem:
    """A goal of AdvBench."""
    return BehaviourItem(row.text("goal"), str(row.number), target=row.text("target"))


def jailbreakbench_rows(folder: Path, split: str) -> list[Row]:
    """Rows of the official columns; benign ones may stand among harmful ones."""
    both = "jbb_behaviors_harmful_and_benign_200.json"
    names = {
        "harmful": ("harmful-behaviors.csv", "jbb_behaviors_harmful.csv"),
        "benign": ("benign-behaviors.csv", both),
    }
    path = find(folder / "jailbreakbench", *names[split])
    harm = {"harmful": split == "harmful"}
    if not path.name.startswith(both):
        return [row.with_cells(**harm) for row in table_rows(path)]
    rows = [row for row in json_rows(path) if row.option("label", _JBB_LABELS) == split]
    return filled(
        f"{path} ({split})",
        (row.with_cells(Goal=row.text("text"), **harm) for row in rows),
    )


_JBB_LABELS = {"harmful": "harmful", "safe": "benign"}


def jailbreakbench(row: Row) -> BehaviourItem:
    """A goal of JailbreakBench; some files lack targets and categories."""

    def cell(name: str) -> str:
        return row.text(name, empty=True) if name in row.values else ""

    return BehaviourItem(
        row.text("Goal"),
        str(row.number),
        group=cell("Category"),
        target=cell("Target"),
        harmful=row.flag("harmful"),
    )


def catqa_rows(folder: Path, split: str) -> list[Row]:
    """The nest of categories as rows of the hub's columns."""
    del split
    path = find(folder / "catqa", "catqa_english.json")
    nest = json_value(path)
    inner = list(nest.values()) if isinstance(nest, dict) else [None]
    lists = [
        questions
        for part in inner
        for questions in (part.values() if isinstance(part, dict) else [None])
    ]
    if not all(isinstance(questions, list) for questions in lists):
        raise UserError(
            f"{path}: expected lists of questions by category and subcategory, got "
            "another shape; use the file as its owner publishes it"
        )
    cells = [
        {"Category": category, "Subcategory": subcategory, "Question": question}
        for category, part in nest.items()
        for subcategory, questions in part.items()
        for question in questions
    ]
    return filled(str(path), (Row(str(path), i, c) for i, c in enumerate(cells, 1)))


def catqa(row: Row) -> BehaviourItem:
    """A question of CatQA."""
    group = row.text("Category")
    return BehaviourItem(row.text("Question"), str(row.number), group=group)


def xstest(row: Row) -> BehaviourItem:
    """A prompt of XSTest; the safe ones test over-refusal."""
    return BehaviourItem(
        row.text("prompt"),
        row.identity("id"),
        group=row.text("type"),
        harmful=row.option("label", {"safe": False, "unsafe": True}),
    )


def beavertails_rows(folder: Path, split: str) -> list[Row]:
    """Prompts without answers."""
    names = {"test": "30k_test_prompts", "eval": "eval_prompts_250"}
    return json_rows(find(folder / "beavertails", f"beavertails_{names[split]}.json"))


def beavertails(row: Row) -> BehaviourItem:
    """A prompt of BeaverTails."""
    column = "text" if "text" in row.values else "instruction"
    return BehaviourItem(row.text(column), str(row.number))


def questions_rows(folder: Path, split: str) -> list[Row]:
    """The instructions of one of the evaluation files."""
    path = find(folder / "safety_tuned_llamas", f"{split}.json")
    value = json_value(path)
    whole = Row(str(path), 1, value if isinstance(value, dict) else {})
    harmful = split != "I-Alpaca"
    cells = ({"q": text, "harmful": harmful} for text in whole.texts("instructions"))
    return filled(str(path), (Row(str(path), i, c) for i, c in enumerate(cells, 1)))


def question(row: Row) -> BehaviourItem:
    """A question of the Safety-Tuned LLaMAs."""
    return BehaviourItem(row.text("q"), str(row.number), harmful=row.flag("harmful"))


# --- judged exchanges -----------------------------------------------------------------

XSTEST_MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
_XSTEST_VERDICTS = {
    "1_full_compliance": "compliance",
    "2_full_refusal": "refusal",
    "3_partial_refusal": "partial refusal",
}


def completions_rows(folder: Path, split: str) -> list[Row]:
    """Labelled answers of one model or of all."""
    names = XSTEST_MODELS if split == "all" else (split,)
    return [
        row.with_cells(model=name)
        for name in names
        for row in table_rows(
            find(folder / "xstest", f"xstest_v2_completions_{name}_labelled.csv")
        )
    ]


def completion(row: Row) -> JudgedItem:
    """An answer with the verdict that two people agreed on."""
    return JudgedItem(
        prompt=row.text("prompt"),
        response=row.text("completion", empty=True),
        verdict=row.option("final_label", _XSTEST_VERDICTS),
        id=f"{row.text('model')}/{row.identity('id')}",
        group=row.text("model"),
        harmful_prompt=row.text("type").startswith("contrast_"),
    )


def wildguard_rows(folder: Path, split: str) -> list[Row]:
    """The gated file, as the user has it."""
    del split
    names = [f"wildguard_test.{end}" for end in ("parquet", "csv", "jsonl")]
    return any_rows(folder if folder.is_file() else find(folder / "wildguard", *names))


def wildguard(row: Row) -> JudgedItem:
    """An exchange with the three labels of WildGuardTest."""
    # A table writes what nobody judged as an empty cell, the hub as nothing.
    harm = {"harmful": True, "unharmful": False, None: None, "": None}
    refusal = {"refusal": "refusal", "compliance": "compliance", None: "", "": ""}
    return JudgedItem(
        prompt=row.text("prompt"),
        response=row.text("response", empty=True),
        verdict=row.option("response_refusal_label", refusal),
        id=str(row.number),
        group="adversarial" if row.flag("adversarial") else "vanilla",
        harmful_prompt=row.option("prompt_harm_label", harm),
        harmful_response=row.option("response_harm_label", harm),
    )
