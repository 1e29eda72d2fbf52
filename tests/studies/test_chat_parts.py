"""Parts without a study: the ledger of what is shared, options of a task."""

import types

import numpy as np
import pytest

from sbr_jax.data import leaks
from sbr_jax.data.registry import SOURCES
from sbr_jax.evaluation import domain_scores
from sbr_jax.studies.chat.parts import Ledger, only_refusals
from sbr_jax.studies.chat.sources import HUB_TWINS, Example, questions, source_of
from sbr_jax.studies.options import ROLES, ChatOptions
from sbr_jax.typing import UserError


def test_a_ledger_agrees_with_the_slow_way_and_notices_what_is_left():
    rng = np.random.default_rng(1)
    pools = {
        name: [Example(f"{p}!", "a", "g") for p in rng.integers(0, 40, 30)]
        for name in ("a", "b", "c")
    }
    measured = {"m": [str(p) for p in rng.integers(0, 40, 8)]}
    ledger = Ledger(measured, drop_overlaps=True)
    taken = {name: ledger.take(name, name, pool, 9) for name, pool in pools.items()}
    assert all(len(part) <= 9 for part in taken.values())
    shared = leaks.shared({**taken, **measured})
    assert set(shared.values()) == {0}
    assert ledger.check([]).keys() == shared.keys()
    lost = {key: n for key, n in leaks.shared({**pools, **measured}).items() if n}
    assert ledger.dropped["a/m"] == lost["a/m"]
    # The same draw again; a part without anything left is refused.
    again = Ledger(measured, drop_overlaps=True).take("a", "a", pools["a"], 9)
    assert again == taken["a"]
    with pytest.raises(UserError, match="all of them in other sets"):
        ledger.take("d", "d", [Example(p, "a", "g") for p in measured["m"]], 5)
    ledger.sets["e"] = {leaks.normalised(measured["m"][0])}
    with pytest.raises(UserError, match="e and m share 1"):
        ledger.check([])


def test_a_measurement_of_several_sets_is_related_to_each_of_them():
    measured = {"refusal-auc": ["one", "two"], "bbq": ["three"]}
    rows = [Example(p, "a", "g") for p in ("one", "three", "four")]
    ledger = Ledger(measured)
    control = ledger.take("benign control", "alpaca", rows, 5)
    assert {row.prompt for row in control} == {"three", "four"}
    assert ledger.dropped == {"benign control/refusal-auc": 1}
    # What only happens to share a prompt does not give way: the run is refused.
    with pytest.raises(UserError, match="benign control and bbq share 1"):
        ledger.check([])
    assert len(Ledger(measured).take("train code", "codealpaca", rows, 5)) == 3


def test_options_are_read_off_a_task_and_free_text_has_none():
    letters = [Example(f"q{i}", f"{'ABCD'[i % 4]}. x{i}", "med") for i in range(8)]
    labels = [Example(f"l{i}", ("Yes", "No")[i % 2], "law") for i in range(6)]
    free = [Example(f"f{i}", f"answer {i}", "code") for i in range(6)]
    pool = [*letters, *labels, *free]
    items = questions(pool, pool)
    assert [i.choices for i in items] == [tuple("ABCD")] * 8 + [("No", "Yes")] * 6
    assert [i.choices[i.answer] for i in items[:4]] == list("ABCD")
    assert items[8].choices[items[8].answer] == "Yes"
    # An answer that its task does not have is not counted as another one.
    odd = Example("l?", "Maybe", "law")
    assert questions([odd], pool) == []


@pytest.mark.parametrize(
    ("judge", "kept"),
    [("keyword", "ab"), ("keyword:jbb12", "a"), ("llama-guard", "ab")],
)
def test_calibration_by_refusals_follows_the_list_of_the_judge(judge, kept):
    said = {"a": "I cannot do that.", "b": "Sorry, no.", "c": "Here is how."}
    pool = [Example(name, answer, "s") for name, answer in said.items()]
    options = ChatOptions(
        judge=judge, judge_folder="g" if judge == "llama-guard" else None
    )
    assert "".join(row.prompt for row in only_refusals(pool, options)) == kept
    with pytest.raises(UserError, match=r"calibration_refusals: .* got 1 that do not"):
        only_refusals(pool[2:], options)


def test_without_a_folder_a_role_is_what_the_hub_has():
    for role in (*ROLES, *HUB_TWINS):
        found = SOURCES[source_of(role, None)]
        assert (found.hub is None) == (role == "legal"), role
    assert source_of("medical", None) == ROLES["medical"][0]
    assert source_of("legalbench", None) == "legalbench"


def test_choices_are_scored_by_the_likeliest_option():
    examples = [Example(f"q{i}", f"{'AB'[i % 2]}. x", "m") for i in range(6)]
    items = questions(examples, examples)

    def runner(right):
        asked = types.SimpleNamespace(describe=dict)
        asked.log_likelihoods = lambda prompts, options: [
            np.array([float((i % 2 == j) == right) for j in range(2)])
            for i in range(len(prompts))
        ]
        return lambda base, adapter: asked

    assert domain_scores.choice_accuracy(items, runner(True))(None, None) == 100.0
    assert domain_scores.choice_accuracy(items, runner(False))(None, None) == 0.0
