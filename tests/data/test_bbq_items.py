"""BBQ's rows as items: who is stereotyped, and which answer is the biased one.

Of the real set only counts are looked at, never text.
"""

import collections

import pytest
import tiny_data as files
import tiny_rows
from tiny_data import DATA, needs_data

from sbr_jax.data import bbq, load_evalset
from sbr_jax.data.rows import Row
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(tmp_path_factory.mktemp("data"))


def item(**changes):
    return bbq.bbq_item(Row("toy", 1, tiny_rows.bias(**changes)))


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
    info = {
        "ans0": ["somebody", labels[0]],
        "ans1": ["somebody", labels[1]],
        "ans2": ["Unknown", "unknown"],
    }
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
    info = tiny_rows.bias()["answer_info"]
    found = item(answer_info=info | {"ans2": []})
    assert (found.unknown, found.stereotyped) == (2, 0)
    found = item(answer_info=info | {"ans1": []})
    assert (found.unknown, found.stereotyped) == (2, 0)
    # The group's own option without labels: nobody is the stereotyped one.
    assert item(answer_info=info | {"ans0": []}).stereotyped is None


def test_rows_without_one_undecided_option_are_refused():
    info = tiny_rows.bias()["answer_info"]
    for change in ({"ans2": ["both", "both"]}, {"ans1": ["Unknown", "unknown"]}):
        with pytest.raises(UserError, match=r"toy, row 1, .* labelled 'unknown', got"):
            item(answer_info=info | change)
    with pytest.raises(UserError, match="'label': expected the undecided option"):
        item(label=0)
    with pytest.raises(UserError, match="'label': expected one of the two people"):
        item(context_condition="disambig")
    with pytest.raises(UserError, match=r"'label': .* from 0 to 2"):
        item(label=3)
    with pytest.raises(UserError, match="stereotyped_groups"):
        item(additional_metadata={})


def test_regenerated_categories_are_marked(folder):
    marked = {i.category for i in load_evalset("bbq", folder) if i.regenerated}
    files_of = {"SES": True, "Age": False}
    for category, expected in files_of.items():
        items = load_evalset("bbq", folder, split=category)
        assert {i.regenerated for i in items} == {expected}
    assert marked
    count = {
        split: len(load_evalset("bbq", folder, split=split))
        for split in ("all", "single", "intersectional")
    }
    assert count == {"all": 22, "single": 18, "intersectional": 4}


@needs_data
def test_bbq_says_who_is_stereotyped_wherever_its_labels_do():
    items = load_evalset("bbq", DATA)
    assert len(items) == 58492
    made = collections.Counter(i.category for i in items if i.regenerated)
    assert sum(made.values()) == 46536
    assert len(made) == 5
    open_ = collections.Counter(i.category for i in items if i.stereotyped is None)
    assert {name: n for name, n in open_.items() if name in bbq.SINGLE} == {
        "Gender_identity": 20,
        "Race_ethnicity": 16,
    }
    assert all(i.stereotyped != i.unknown and i.biased != i.unknown for i in items)
    # Names are drawn for both sides alike, so neither position is preferred.
    named = [i for i in items if i.stereotyped is not None]
    by_place = collections.Counter(i.stereotyped for i in named)
    assert max(by_place.values()) / len(named) < 0.40
