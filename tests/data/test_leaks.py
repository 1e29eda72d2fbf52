"""The leak check: against a slow twin, by its guarantee, and on the real sets."""

import random
import string

import numpy as np
import pytest
from tiny_data import DATA, needs_data

from sbr_jax.data import (
    Pair,
    Record,
    TokenDataset,
    leaks,
    load_evalset,
    load_source,
)
from sbr_jax.data.records import BehaviourItem, ChoiceItem
from sbr_jax.typing import UserError


def twin(a, b):
    """How many distinct prompts of b stand in a, letter by letter."""

    def plain(text):
        letters = [c for c in text.lower() if c not in string.punctuation]
        return "".join(letters).split()

    found = []
    for text in b:
        words = plain(text)
        if any(plain(other) == words for other in a) and words not in found:
            found.append(words)
    return len(found)


def texts(seed, count=60):
    rng = random.Random(seed)
    marks = ["", " ", ", ", "!", "?  ", " - ", "_", "\t", "'"]
    return [
        "".join(
            rng.choice("aAbB") + rng.choice(marks) for _ in range(rng.randint(1, 4))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_a_slow_twin(seed):
    a, b = texts(2 * seed), texts(2 * seed + 1)
    count = leaks.shared({"a": a, "b": b})["a/b"]
    assert count == twin(a, b) > 0
    assert count > len(set(a) & set(b))  # exact comparison misses some


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_shares_nothing_and_keeps_its_order(seed):
    a, b, c = (texts(3 * seed + i, 30) for i in range(3))
    kept, dropped = leaks.without(a, b, c)
    assert dropped == len(a) - len(kept) > 0
    assert leaks.refuse_leaks(leaks.shared({"a": kept, "b": b + c})) == {"a/b": 0}
    rest = iter(a)
    assert all(text in rest for text in kept)
    assert leaks.without(a) == (a, 0)
    once, again = leaks.distinct(a)
    assert len(once) == len({leaks.normalised(text) for text in a})
    assert again == len(a) - len(once)


def test_what_differs_by_a_word_is_no_leak():
    sets = {"a": ["May I go?"], "b": ["May I not go?"], "c": ["MAY I, GO"]}
    assert leaks.shared(sets) == {"a/b": 0, "a/c": 1, "b/c": 0}
    assert leaks.shared({"a": ["???"], "b": ["!!!"]}) == {"a/b": 0}
    assert leaks.normalised("Straße — déjà_vu") == "straße déjàvu"


FORMS = {
    "full width": "\uff2d\uff41\uff59 \uff29 \uff47\uff4f\uff1f",
    "full-width blanks": "May\u3000I\u3000go?",
    "no-break blanks": "May\u00a0I\u202fgo",
    "mathematical letters": "\U0001d40c\U0001d41a\U0001d432 I go",
    "circled": "\u24c2\u24d0\u24e8 \u24be \u24d6\u24de",
    "zero width": "M\u200bay\u00ad I g\u2060o",
    "byte-order mark": "\ufeffMay I go?",
    "marks": "\u201cMay\u201d I\u2026 go\u203d",
    "line ends": "may\r\ni\rgo",
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_the_same_letters_are_no_other_prompt(form):
    assert leaks.normalised(FORMS[form]) == "may i go"
    assert leaks.shared({"a": ["May I go?"], "b": [FORMS[form]]}) == {"a/b": 1}
    assert leaks.without([FORMS[form]], ["May I go?"]) == ([], 1)
    assert leaks.distinct(["May I go?", FORMS[form]]) == (["May I go?"], 1)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("d\u00e9j\u00e0", "de\u0301ja\u0300"),
        ("\ufb01ne", "fine"),
        ("\uff11\uff12", "12"),
        ("\ud55c", "\u1112\u1161\u11ab"),
        ("\uff76\uff9e", "\u30ac"),
        ("\uff01\uff1f", "!?"),
    ],
)
def test_composed_and_compatible_forms_agree(a, b):
    assert leaks.normalised(a) == leaks.normalised(b)


def test_normalising_twice_is_normalising_once():
    rng = random.Random(0)
    ranges = ((32, 127), (0xA0, 0x24F), (0x300, 0x36F), (0x1100, 0x11FF))
    ranges = (*ranges, (0xFF00, 0xFFEF))
    for _ in range(300):
        marks = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(8)]
        once = leaks.normalised("".join(marks))
        assert leaks.normalised(once) == once


def test_pairs_items_and_messages_are_compared_by_their_prompts():
    choice = ChoiceItem("May I?", ("yes", "no"), (0,), "1")
    turn = {"role": "user", "content": "may i"}
    sets = {
        "text": ["May I?"],
        "pair": [Pair("may I", "No.")],
        "record": [Record("MAY I?!", "No.")],
        "messages": [Record((turn,), "No.", system="Be kind.")],
        "item": [BehaviourItem("may i...", "1")],
        "choice": [choice],
    }
    counts = leaks.shared(sets)
    others = {pair: n for pair, n in counts.items() if "choice" in pair}
    assert set(others.values()) == {0}  # its options belong to its prompt
    assert {n for pair, n in counts.items() if pair not in others} == {1}
    with pytest.raises(UserError, match="expected texts, pairs, items or records"):
        leaks.shared({"a": [7], "b": []})


def test_leaks_are_refused_with_counts_and_never_quoted():
    sets = {"train": ["A secret.", "x"], "dev": ["y"], "test": ["a secret", "X!"]}
    with pytest.raises(
        UserError, match=r"train and test share 2 prompts: drop"
    ) as error:
        leaks.refuse_leaks(leaks.shared(sets))
    assert "secret" not in str(error.value)
    assert "dev" not in str(error.value)
    assert leaks.refuse_leaks(leaks.shared({"a": ["x"], "b": []})) == {"a/b": 0}
    with pytest.raises(UserError, match="without '/'"):
        leaks.shared({"a/b": []})


def test_encoded_sets_are_compared_by_the_tokens_of_their_prompts():
    tokens = np.array([[1, 2, 5], [3, 4, 5]])
    data = TokenDataset(tokens, np.array([[0, 0, 1], [0, 1, 1]]))
    asked = [[1, 2], [3], [3]]
    assert leaks.shared_prompts({"a": data, "b": asked}) == {"a/b": 2}
    assert leaks.shared_prompts({"a": data, "b": tokens}) == {"a/b": 0}
    counts = leaks.shared_prompts({"a": data, "b": asked, "c": [[3]]})
    with pytest.raises(UserError, match="a and b share 2 prompts, a and c share 1"):
        leaks.refuse_leaks(counts)


# --- the real sets --------------------------------------------------------------------


@needs_data
def test_overlaps_of_the_real_sets_are_those_on_record():
    sets = {
        "advbench": load_evalset("advbench", DATA),
        "jailbreakbench": load_evalset("jailbreakbench", DATA),
        # Without contexts, which the other set does not have.
        "harmbench": [item.behaviour for item in load_evalset("harmbench", DATA)],
        "prompts": load_evalset("beavertails_prompts", DATA),
        "unsafe": load_source("beavertails_unsafe_qa", DATA),
        "unsafe_test": load_source("beavertails_unsafe_test", DATA),
        "hh_rlhf": load_source("hh_rlhf", DATA),
    }
    found = {pair: n for pair, n in leaks.shared(sets).items() if n}
    assert found == {
        "advbench/jailbreakbench": 11,
        "jailbreakbench/harmbench": 9,
        # One more than where typographic quotation marks count as letters.
        "prompts/unsafe": 143,
        "prompts/unsafe_test": 44,
        # One of the 399 first turns in both has no answer, so it is no pair.
        "prompts/hh_rlhf": 398,
        "unsafe/unsafe_test": 20,
        "unsafe/hh_rlhf": 79,
        "unsafe_test/hh_rlhf": 16,
    }


@needs_data
def test_the_default_calibration_set_is_in_no_test_set():
    safe = load_source("safety_tuned_llamas", DATA)
    names = ("harmbench", "advbench", "jailbreakbench", "catqa", "xstest", "truthfulqa")
    tests = {name: load_evalset(name, DATA) for name in names}
    counts = {name: leaks.shared({"safe": safe, name: s}) for name, s in tests.items()}
    assert {n for count in counts.values() for n in count.values()} == {0}


@needs_data
def test_some_validation_rows_of_mmlu_stand_in_its_test():
    test, val = (load_evalset("mmlu", DATA, split=split) for split in ("test", "val"))
    assert leaks.shared({"val": val, "test": test}) == {"val/test": 29}
    kept, dropped = leaks.without(val, test)
    assert (len(kept), dropped) == (1513, 29)
