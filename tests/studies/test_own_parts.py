"""Parts of a user's files are disjoint, and only what is needed is asked for."""

import itertools
import re
import warnings

import pytest
import tiny_chat
from own_case import as_lines, messages

from sbr_jax import models
from sbr_jax.data.harmless import HARMLESS as PACKAGED
from sbr_jax.data.leaks import normalised
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.methods.needs import BENIGN, HARMFUL, SAFE
from sbr_jax.studies import own
from sbr_jax.studies.options import OwnOptions
from sbr_jax.studies.own.refusals import write_refusals
from sbr_jax.typing import UserError

MODEL = models.make_model(tiny_chat.CONFIG, None, tiny_chat.tokenizer())
SMALL = {"measured": 6, "probe": 5, "calibration": 7, "max_new_tokens": 8}


def rows(count, start=0):
    return [
        messages(f"w{i % 60} n{i}", f"w{i % 7}") for i in range(start, start + count)
    ]


def made(train, *more, **options):
    return made_of([train], *more, **options)


def made_of(files, harmful, needed, monitored, safe=None, evaluation=(), **options):
    chosen = OwnOptions(**{**SMALL, **options})
    given = own.read_given(files, list(evaluation), safe, harmful, chosen)
    judge = KeywordJudge()
    return own.make_parts(given, chosen, frozenset(needed), monitored, MODEL, judge)


def told(pattern, act):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = act()
    return made, [str(w.message) for w in found if re.search(pattern, str(w.message))]


HARM = [f"zebra n{i}" for i in range(40)]
CASES = list(itertools.product([set(), {SAFE}, {HARMFUL}, {SAFE, HARMFUL}], [0, 1]))


@pytest.mark.parametrize(("needed", "monitored"), CASES)
@pytest.mark.parametrize("safe", [None, rows(9, start=500)])
def test_no_prompt_is_in_two_parts(needed, monitored, safe):
    if safe is not None:
        safe = [*safe, messages(HARM[0], "I cannot"), messages(HARM[1], "I cannot")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That the answers hold no refusal.
        found = made(rows(40), HARM, needed, bool(monitored), safe)
    parts = [found.calibrate, found.probe, found.measured]
    texts = [normalised(text) for part in parts for text in part]
    assert len(set(texts)) == len(texts)
    assert bool(found.probe) == bool(monitored)
    assert 0 < len(found.measured) <= SMALL["measured"]
    assert ("prompts" in found.sets) == (HARMFUL in needed)
    wanted = SAFE in needed or bool(monitored)
    assert ("calibration" in found.sets) == (wanted and safe is not None)
    assert bool(found.calibrate) == (wanted and safe is None)
    assert set(found.leaks.values()) <= {0}


@pytest.mark.parametrize("count", [19, 20, 57, 400])
def test_what_is_held_back_is_not_learnt(count):
    train = [*rows(count), *rows(2)]  # Two prompts stand twice.
    found = made(train, None, set(), False, held_out=30)
    tests, learnt = found.sets["test examples"], found.sets["train examples"]
    if len(train) < 20:
        assert found.record["held back"] == {"examples": 0}
        return
    assert found.record["held back"] == {"examples": min(len(train) // 10, 30)}
    seen = {tuple(row) for row in learnt.tokens}
    assert not seen & {tuple(row) for row in tests.tokens}
    assert len(learnt) + len(tests) in range(len(train) - 2, len(train) + 1)


BIG = rows(60)
FILES = {
    "the same": ([BIG, BIG], {"examples": 6, "examples-2": 6}),
    "shuffled": ([BIG, BIG[::-1]], {"examples": 6, "examples-2": 6}),
    "a small part": ([BIG, BIG[:5]], {"examples": 6, "examples-2": 0}),
    "most of it small": ([BIG, BIG[:19], BIG[19:38], BIG[38:57]], {"examples": 3}),
    "half of it": ([BIG, rows(60, start=30)], {"examples": 6, "examples-2": 6}),
    "another": ([BIG, rows(60, start=500)], {"examples": 6, "examples-2": 6}),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_one_file_holds_back_no_file_learns(kind):
    files, expected = FILES[kind]
    found, warned = told("left out, because another file", lambda: plain(files))
    held = found.record["held back"]
    assert expected.items() <= held.items()
    learnt = [f"train {name}" for name in held]
    seen = {tuple(row) for name in learnt for row in found.sets[name].tokens}
    back = [found.sets[f"test {name}"].tokens for name in held if held[name]]
    assert not seen & {tuple(row) for tokens in back for row in tokens}
    others = found.record["held back in others"]
    assert len(warned) == len(others)
    assert sum(others.values()) == sum(map(len, files)) - sum(held.values()) - sum(
        len(found.sets[name]) for name in learnt
    )
    assert bool(others) == (kind in ("shuffled", "half of it"))


def plain(files, **options):
    return made_of(files, None, set(), False, **options)


@pytest.mark.parametrize(
    ("different", "times", "said"),
    [
        (1, 60, "1 different example (of 60) is few"),
        (2, 30, "2 different examples (of 60) are few"),
        (1, 1, "1 example is few"),
        (49, 1, "49 examples are few"),
        (50, 2, None),
    ],
)
def test_rows_that_stand_twice_are_counted_once(different, times, said):
    found = plain([rows(different) * times], held_out=1, evaluation=[rows(3, 900)])
    data = found.sets["train examples"]
    assert len(data) == different * times
    count = found.record["different"]["examples"]
    _, warned = told("", lambda: own.parts.warn_sizes("my", data, 1.0, count))
    assert [text.partition(";")[0] for text in warned] == (
        [f"examples my: {said}"] if said else []
    )


@pytest.mark.parametrize("different", [1, 2, 3, 30])
def test_repeated_rows_are_held_back_or_measured_once(different):
    found = plain([rows(different) * (60 // different)])
    expected = min(60 // 10, different // 2)
    assert found.record["held back"] == {"examples": expected}
    assert len(found.sets["test examples"]) == max(expected, 1)


@pytest.mark.parametrize(("learnt_in", "count"), [(0, 1), (1, 2)])
def test_given_rows_are_compared_with_all_that_is_learnt(learnt_in, count):
    files = [rows(60, start=100 * i) for i in range(2)]
    new = [rows(9, start=900 + 100 * i) for i in range(count)]
    evaluation = [files[learnt_in][:3] + new[0], *new[1:]]
    _, warned = told(
        "evaluation: 3 of 12 prompts are also in",
        lambda: plain(files, evaluation=evaluation),
    )
    assert len(warned) == 1


@pytest.mark.parametrize("count", [4, 31])
def test_rows_that_are_given_are_all_measured_on(count):
    found = plain([rows(60)], evaluation=[rows(count, start=900)], held_out=3)
    assert len(found.sets["test examples"]) == count


def test_rows_given_to_measure_on_are_told_where_they_are_learnt():
    with pytest.warns(UserWarning, match="evaluation: 3 of 5 prompts are also in"):
        made(rows(60), None, set(), False, evaluation=[rows(3) + rows(2, start=900)])


@pytest.mark.parametrize(
    ("context", "length", "way"),
    [
        (96, 4, "raise study.max_length"),
        (6, 4, "raise study.max_length"),
        (4, 512, "shorten the prompts: the model reads no more"),
        (4, 4, "shorten the prompts: the model reads no more"),
    ],
)
def test_the_advice_for_long_rows_is_one_that_helps(context, length, way):
    config = tiny_chat.changed(context=context)
    small = models.make_model(config, None, tiny_chat.tokenizer())
    chosen = OwnOptions(**{**SMALL, "max_length": length})
    given = own.read_given([rows(3)], [rows(1, 900)], None, None, chosen)
    expected = f"row 1: expected prompts with room .* {min(context, length)} tokens"
    with pytest.raises(UserError, match=f"{expected}, got 3 prompts without .*{way}$"):
        own.make_parts(given, chosen, frozenset(), False, small, KeywordJudge())


def test_harmful_prompts_that_are_learnt_measure_nothing():
    train = [*rows(60), messages(HARM[0].upper(), "w1")]
    harmful = [*HARM, "zebra n40"]  # Of 40 that are left, a quarter is measured.
    with pytest.warns(UserWarning, match="^harmful: 1 prompt is also learnt"):
        found = made(train, harmful, set(), False, measured=100)
    assert found.record["harmful left out"] == 1
    assert len(found.measured) == (len(harmful) - 1) // 4
    assert HARM[0] not in found.measured


@pytest.mark.parametrize(("count", "measured"), [(8, 100), (39, 6), (40, 100)])
def test_every_method_is_measured_with_the_same_prompts(count, measured):
    harmful = [f"zebra n{i}" for i in range(count)]
    safe = [None, rows(2, start=500)]
    found = set()
    for (needed, monitored), given in itertools.product(CASES, safe):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = made(
                BIG[:2], harmful, needed, bool(monitored), given, measured=measured
            )
        found.add(tuple(parts.measured))
    (prompts,) = found
    assert len(prompts) == min(count // 4, measured)


@pytest.mark.parametrize(
    ("count", "measured", "warns"),
    [(1, 100, 1), (39, 100, 1), (40, 100, 0), (39, 9, 0), (8, 2, 0), (8, 3, 1)],
)
def test_few_measured_prompts_are_told(count, measured, warns):
    harmful = [f"zebra n{i}" for i in range(count)]
    _, warned = told(
        rf"refusal is measured on {max(count // 4, 1)} prompts?,",
        lambda: made(BIG[:2], harmful, set(), False, measured=measured),
    )
    assert len(warned) == warns


@pytest.mark.parametrize("needed", [set(), {SAFE, HARMFUL}])
def test_parts_of_which_nothing_is_left_are_refused(needed):
    train = [*rows(60), *(messages(text.upper(), "w1") for text in HARM)]
    with pytest.raises(UserError, match=r"^harmful: .* got 40 that are"):
        made(train, HARM, needed, bool(needed), held_out=1)


HARMLESS = [f"koala n{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("place", "count", "benign"),
    [
        ("last answer", 0, set()),
        ("last answer", 3, {BENIGN}),
        ("first answer", 3, set()),
        ("eval", 3, set()),
        ("harmful", 3, {BENIGN}),
        ("harmful", 12, set()),
    ],
)
def test_harmless_prompts_of_other_parts_are_left_out(place, count, benign, tmp_path):
    path = tmp_path / "harmless.txt"
    path.write_text("\n".join(HARMLESS))
    same = [text.upper() for text in HARMLESS[:count]]
    turns = ["w1", "w2", "w3"] if place == "first answer" else ["w1"]
    more = [messages(text, *turns) for text in same]
    evaluation = [rows(5, start=900) + more] if place == "eval" else []
    train = [*rows(60), *(more if place.endswith("answer") else [])]
    harmful = HARM + (same if place == "harmful" else [])

    def act():
        return made(
            train, harmful, benign, False, None, evaluation, harmless_file=str(path)
        )

    if count == len(HARMLESS):
        with pytest.raises(UserError, match=r"study.harmless_file: .* got 12 that are"):
            act()
        return
    found, warned = told("study.harmless_file: 3 prompts are also learnt", act)
    assert len(warned) == bool(count)
    assert found.record["harmless left out"] == count
    assert sorted([*found.harmless, *found.control]) == sorted(HARMLESS[count:])
    assert bool(found.control) == bool(benign)


def test_prompts_of_the_package_that_are_learnt_are_left_out():
    train = [*rows(60), *(messages(text, "w1") for text in PACKAGED[:7])]
    found, warned = told(
        "^harmless prompts: 7", lambda: made(train, None, set(), False, held_out=1)
    )
    assert len(found.harmless) == len(PACKAGED) - 7
    assert len(warned) == 1


@pytest.mark.parametrize(("option", "more"), [("safety", 0), ("study.pairs_file", 4)])
def test_exchanges_with_measured_prompts_are_left_out(option, more, tmp_path):
    exchanges = [*(messages(text, "I cannot") for text in HARM), *rows(more, 500)]
    path = tmp_path / "more.jsonl"
    path.write_text(as_lines(exchanges))
    safe = str(path) if option == "safety" else None
    pairs = None if safe else str(path)
    found, warned = told(
        f"{option}: 16 exchanges left out: the prompt monitors or",
        lambda: made(
            *(BIG, HARM, {SAFE}, True, safe), pairs_file=pairs, measured=9, probe=7
        ),
    )
    name = "calibration" if safe else "pairs"
    kept = len(HARM) + more - 16
    assert len(found.sets[name]) == (min(kept, SMALL["calibration"]) if safe else kept)
    assert len(warned) == 1


def test_exchanges_of_which_none_is_left_are_refused():
    safe = [messages(text, "I cannot") for text in made(BIG, HARM, {SAFE}, 0).measured]
    with pytest.raises(UserError, match=r"^safety: .* got 6 that are: give others"):
        made(BIG, HARM, {SAFE}, False, safe)


def test_exchanges_that_refuse_nothing_are_left_out_where_asked():
    safe = [messages(f"zebra x{i}", ("I cannot", "Yes.")[i % 2]) for i in range(10)]
    found, warned = told(
        "^safety: 5 of 10 answers hold no refusal and are left out",
        lambda: made(BIG, HARM, {SAFE}, False, safe, calibration_refusals=True),
    )
    assert len(found.sets["calibration"]) == 5
    assert len(warned) == 1
    with pytest.raises(UserError, match=r"leave out study\.calibration_refusals"):
        made(BIG, HARM, {SAFE}, False, safe[1::2], calibration_refusals=True)


AS_FILES = {
    "list": lambda texts: texts,
    "generator": lambda texts: iter(texts),
    "txt": lambda texts: "\n\n".join(texts),
    "jsonl": lambda texts: as_lines({"prompt": text} for text in texts),
    "csv": lambda texts: "\n".join(["prompt", *texts]),
}


@pytest.mark.parametrize(
    ("ending", "times"), [("list", 1), *((ending, 3) for ending in AS_FILES)]
)
def test_prompts_that_stand_twice_are_told(ending, times, tmp_path):
    source = AS_FILES[ending]([*HARM[1:], *[HARM[0]] * times])
    if isinstance(source, str):
        path = tmp_path / f"harmful.{ending}"
        path.write_text(source)
        source = path
    given, warned = told(
        "^harmful: 2 of 42 prompts repeat another",
        lambda: own.read_given([rows(2)], [], None, source, OwnOptions()),
    )
    assert sorted(given.harmful) == sorted(HARM)
    assert len(warned) == (times > 1)


# --- the model's own refusals ---------------------------------------------------------


def answers(refused):
    """A model that refuses the first so many prompts."""

    def write(prompts):
        return [
            "I cannot help. And" if i < refused else "Take the bus."
            for i in range(len(prompts))
        ]

    return write


def written(refused, folder=None, mark="model"):
    return write_refusals(HARM, answers(refused), KeywordJudge(), folder, mark)


def test_what_is_no_refusal_is_dropped_and_counted():
    found = written(25)
    assert (len(found.kept), found.asked) == (25, 40)
    assert {pair.answer for pair in found.kept} == {"I cannot help."}
    assert [pair.prompt for pair in found.kept] == HARM[:25]


def test_a_model_that_refuses_little_is_told_what_to_do():
    with pytest.warns(UserWarning, match="refuses 9 of 40 .*less than half.*align"):
        assert len(written(9).kept) == 9
    with pytest.raises(UserError, match=r"refuses 0 of 40 .*align"):
        written(0)


def test_refusals_are_written_once_for_a_model(tmp_path):
    assert len(written(30, tmp_path).kept) == 30
    assert len(written(25, tmp_path).kept) == 30
    assert len(written(25, tmp_path, mark="another").kept) == 25


def test_system_messages_of_an_option_stand_before_every_example():
    plain, told = (
        made(rows(60), None, set(), False, system=system).sets["train examples"]
        for system in (None, "w59")
    )
    word = tiny_chat.tokenizer().convert_tokens_to_ids("w59")
    assert (told.tokens == word).any(axis=1).all()
    assert not (plain.tokens == word).any(axis=1).all()
