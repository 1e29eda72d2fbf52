"""Turns rows of safety sets into pairs, requests and judged exchanges.

The tables of sets are in :mod:`sbr_jax.data.registry`. Most of these sets hold harmful
requests; nothing here prints or quotes a text.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data._rows import Row, describe
from sbr_jax.data.domains import filled_pair
from sbr_jax.data.readers import (
    any_rows,
    filled,
    find,
    find_all,
    json_rows,
    json_value,
    rows_of,
    table_rows,
)
from sbr_jax.data.records import BehaviourItem, JudgedItem, Pair
from sbr_jax.typing import UserError

# --- pairs ----------------------------------------------------------------------------


def answered_safely(row: Row) -> Pair | None:
    """BeaverTails: answers with the verdict "safe" only."""
    return _beavertails_pair(row) if row.flag("is_safe") else None


def answered_unsafely(row: Row) -> Pair | None:
    """BeaverTails: answers with the verdict "unsafe" only."""
    return None if row.flag("is_safe") else _beavertails_pair(row)


def _beavertails_pair(row: Row) -> Pair | None:
    return filled_pair(row.text("prompt"), row.text("response", empty=True))


def first_turn(row: Row) -> Pair | None:
    """The first request of the chosen dialogue and its answer."""
    turns = re.split(r"\n\n(Human|Assistant): ?", row.text("chosen"))
    if turns[1:4:2] != ["Human", "Assistant"]:
        raise row.fault("chosen", "a dialogue of Human and Assistant")
    return filled_pair(turns[2], turns[4])


def conversation(row: Row) -> Pair:
    """One request and one answer."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    cells = [turn if isinstance(turn, dict) else {} for turn in turns]
    texts = [t for cell in cells if isinstance(t := cell.get("content"), str)]
    roles = [cell.get("role") for cell in cells]
    if roles != ["user", "assistant"] or len(texts) != 2:
        raise row.fault("conversations", "one message of a user and one answer")
    return Pair(texts[0].strip(), texts[1].strip())


# --- requests -------------------------------------------------------------------------

HARMBENCH_KINDS = ("standard", "contextual", "copyright")


def harmbench_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """Behaviours with the beginning of a compliant answer under ``target``."""
    table, source = (find(folder, name.replace("SPLIT", split)) for name in files)
    targets, rows = json_value(source), table_rows(table)
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
    """A behaviour of HarmBench, after its context if it has one."""
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


def jailbreakbench_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """Rows with the official columns; benign and harmful ones may be mixed."""
    official, renamed, both = files
    other = renamed if split == "harmful" else both
    path = find(folder, *(n.replace("SPLIT", split) for n in (official, other)))
    harm = {"harmful": split == "harmful"}
    if not path.name.startswith(Path(both).name):
        return [row.with_cells(**harm) for row in table_rows(path)]
    labels = {"harmful": "harmful", "safe": "benign"}
    rows = [row for row in json_rows(path) if row.option("label", labels) == split]
    return filled(
        f"{path} ({split})",
        (row.with_cells(Goal=row.text("text"), **harm) for row in rows),
    )


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


def catqa_rows(path: Path) -> list[Row]:
    """The nested categories as rows with the hub's columns."""
    nest = json_value(path)
    parts = list(nest.values()) if isinstance(nest, dict) else [None]
    nested = all(
        isinstance(part, dict) and all(isinstance(q, list) for q in part.values())
        for part in parts
    )
    if not nested:
        raise UserError(
            f"{path}: expected lists of questions by category and subcategory, got "
            "another shape; use the file as its owner publishes it"
        )
    cells = [
        {"Category": category, "Question": question}
        for category, part in nest.items()
        for questions in part.values()
        for question in questions
    ]
    return rows_of(path, cells)


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


def beavertails(row: Row) -> BehaviourItem:
    """A prompt of BeaverTails."""
    column = "text" if "text" in row.values else "instruction"
    return BehaviourItem(row.text(column), str(row.number))


def questions_rows(path: Path) -> list[Row]:
    """The instructions of one evaluation file of the Safety-Tuned LLaMAs."""
    value = json_value(path)
    whole = Row(str(path), 1, value if isinstance(value, dict) else {})
    harmful = not path.name.startswith("I-Alpaca.")
    texts = whole.texts("instructions")
    return rows_of(path, ({"q": text, "harmful": harmful} for text in texts))


def question(row: Row) -> BehaviourItem:
    """A question of the Safety-Tuned LLaMAs."""
    return BehaviourItem(row.text("q"), str(row.number), harmful=row.flag("harmful"))


def harmless(row: Row) -> BehaviourItem:
    """An instruction that nobody should refuse."""
    text = row.text("instruction").strip()
    return BehaviourItem(text, str(row.number), harmful=False)


# --- judged exchanges -----------------------------------------------------------------


def artifact_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The submitted prompts of every attack on every model.

    If an attack found no prompt for a behaviour, the row is left out.
    """
    paths = [path for pattern in files for path in find_all(folder, pattern)]
    if not paths:
        raise UserError(
            f"expected recorded attacks {' or '.join(files)} in {folder}, found none: "
            "put JailbreakBench's artifacts there, or drop the measurement"
        )
    rows = (row for path in paths for row in _submitted(path))
    return filled(f"{folder / 'jailbreakbench'} (recorded attacks)", rows)


def _submitted(path: Path) -> Iterator[Row]:
    value = json_value(path)
    whole = Row(str(path), 0, value if isinstance(value, dict) else {})
    about, attempts = whole.get("parameters"), whole.get("jailbreaks")
    if not isinstance(about, dict) or not isinstance(attempts, list):
        raise UserError(
            f"{path}: expected an object of parameters and a list of jailbreaks, got "
            "another shape; use the file as its owner publishes it"
        )
    for row in rows_of(path, attempts):
        row = row._replace(values={**about, **row.values})
        if row.get("prompt") is not None:
            yield row


def artifact(row: Row) -> JudgedItem:
    """An attack's prompt, the model it was made for, and whether it succeeded."""
    group = f"{row.text('method')}/{row.text('model')}"
    return JudgedItem(
        prompt=row.text("prompt"),
        response=row.text("response", empty=True),
        verdict="",
        id=f"{group}/{row.identity('index')}",
        group=group,
        harmful_prompt=True,
        harmful_response=row.flag("jailbroken"),
    )


XSTEST_MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")


def completions_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """Labelled answers of one model or of all."""
    return [
        row.with_cells(model=name)
        for name in (XSTEST_MODELS if split == "all" else (split,))
        for row in table_rows(find(folder, files[0].replace("SPLIT", name)))
    ]


def completion(row: Row) -> JudgedItem:
    """An answer with the verdict that two people agreed on."""
    verdicts = {
        "1_full_compliance": "compliance",
        "2_full_refusal": "refusal",
        "3_partial_refusal": "partial refusal",
    }
    return JudgedItem(
        prompt=row.text("prompt"),
        response=row.text("completion", empty=True),
        verdict=row.option("final_label", verdicts),
        id=f"{row.text('model')}/{row.identity('id')}",
        group=row.text("model"),
        harmful_prompt=row.text("type").startswith("contrast_"),
    )


def wildguard_rows(folder: Path, split: str, files: Sequence[str]) -> list[Row]:
    """The gated file: in the folder, or given in place of the folder."""
    return any_rows(folder if folder.is_file() else find(folder, *files))


def wildguard(row: Row) -> JudgedItem:
    """An exchange with the three labels of WildGuardTest."""
    # For labels that nobody gave, a table has an empty cell and the hub has None.
    harm: dict[Any, Any] = {"harmful": True, "unharmful": False, None: None, "": None}
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
