"""BBQ's rows as items: who is stereotyped, and which answer is the biased one.

Of the real set only counts are looked at, never text.
"""

import collections

import pytest
import tiny_data as files
import tiny_rows
from tiny_data import DATA, needs_data

from sbr_jax.data import _bbq, load_evalset
from sbr_jax.data._rows import Row
from sbr_jax.typing import UserError

INFO = tiny_rows.bias()["answer_info"]


def item(**changes):
    return _bbq.bbq(Row("toy", 1, tiny_rows.bias(**changes)))


def test_the_biased_answer_turns_with_the_question():
    assert (item().stereotyped, item().biased, item().unknown) == (0, 0, 2)
    other = item(question_polarity="nonneg")
    assert (other.stereotyped, other.biased) == (0, 1)
    assert item().ambiguous
    assert not item(context_condition="disambig", label=0).ambiguous


@pytest.mark.parametrize(
    ("labels", "groups", "expected"),
    [
        (("lowSES", "highSES"), ["low SES"], 0),
        (("nonDisabled", "disabled"), ["disabled", "D/deaf"], 1),
        (("F-Black", "M-Asian"), ["Black", "African American"], 0),
        (("man", "woman"), ["F"], 1),
        (("trans_F", "nonTrans_M"), ["trans", "Transgender women"], 0),
        (("nonTrans", "trans"), ["trans"], 1),
        (("F-Black", "M-Black"), ["Black"], None),
        (("girl", "woman"), ["F"], None),
        (("x", "y"), ["z"], None),
    ],
)
def test_the_stereotyped_option_is_the_only_one_of_the_group(labels, groups, expected):
    info = {f"ans{i}": ["somebody", label] for i, label in enumerate(labels)}
    info["ans2"] = ["Unknown", "unknown"]
    found = item(answer_info=info, additional_metadata={"stereotyped_groups": groups})
    assert found.stereotyped == expected
    assert (found.biased is None) == (expected is None)


def test_nationalities_are_matched_by_the_options_words():
    info = {
        "ans0": ["Unknown", "unknown"],
        "ans1": ["Malian", "Africa"],
        "ans2": ["French", "Europe"],
    }
    groups = {"stereotyped_groups": ["Nigerian", "Malian"]}
    found = item(answer_info=info, additional_metadata=groups, label=0)
    assert (found.unknown, found.stereotyped) == (0, 1)


def test_an_empty_answer_info_is_survived():
    for name in ("ans2", "ans1"):
        found = item(answer_info=INFO | {name: []})
        assert (found.unknown, found.stereotyped) == (2, 0)
    # The group's own option without labels: nobody is the stereotyped one.
    assert item(answer_info=INFO | {"ans0": []}).stereotyped is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"answer_info": INFO | {"ans2": ["both", "both"]}},
            r"labelled 'unknown', got",
        ),
        (
            {"answer_info": INFO | {"ans1": ["?", "unknown"]}},
            r"labelled 'unknown', got",
        ),
        ({"label": 0}, "'label': expected the undecided option"),
        ({"context_condition": "disambig"}, "'label': expected one of the two people"),
        ({"label": 3}, r"'label': .* from 0 to 2"),
        ({"additional_metadata": {}}, "stereotyped_groups"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(changes, said):
    with pytest.raises(UserError, match=f"toy, row 1, .*{said}"):
        item(**changes)


def test_regenerated_categories_are_marked(tmp_path):
    files.evalsets(tmp_path)
    for category, expected in {"SES": True, "Age": False}.items():
        items = load_evalset("bbq", tmp_path, split=category)
        assert {i.regenerated for i in items} == {expected}
    for split, count in {"all": 22, "single": 18, "intersectional": 4}.items():
        assert len(load_evalset("bbq", tmp_path, split=split)) == count


@pytest.mark.thorough
@needs_data
def test_bbq_says_who_is_stereotyped_wherever_its_labels_do():
    items = load_evalset("bbq", DATA)
    assert len(items) == 58492
    made = collections.Counter(i.category for i in items if i.regenerated)
    assert sum(made.values()) == 46536
    assert len(made) == 5
    open_ = collections.Counter(i.category for i in items if i.stereotyped is None)
    assert {name: n for name, n in open_.items() if name in _bbq.SINGLE} == {
        "Gender_identity": 20,
        "Race_ethnicity": 16,
    }
    assert all(i.stereotyped != i.unknown and i.biased != i.unknown for i in items)
    # Names are drawn for both sides alike, so neither position is preferred.
    named = [i for i in items if i.stereotyped is not None]
    by_place = collections.Counter(i.stereotyped for i in named)
    assert max(by_place.values()) / len(named) < 0.40
