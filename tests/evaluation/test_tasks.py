"""Tasks with options, and the composite, put to examinees with known answers."""

import math
import string
from typing import NamedTuple

import pytest
from tasks_case import Fake
from tiny_data import DATA, needs_data

from sbr_jax.evaluation import composite, picking, tasks
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.keyword import KeywordJudge
from sbr_jax.evaluation.multiple_choice import TRUTHFULQA_PREAMBLE
from sbr_jax.typing import UserError


class Choice(NamedTuple):
    id: str
    question: str
    choices: tuple
    correct: tuple
    group: str = "g"


class Bias(NamedTuple):
    id: str
    context: str
    question: str
    choices: tuple
    correct: int
    unknown: int
    biased: int | None
    ambiguous: bool
    category: str


# --- options -----------------------------------------------------------------------


def test_truthfulqa_mc1_and_mc2():
    items = [
        Choice("0", "Why?", ("right", "wrong"), (0,)),
        Choice("1", "How?", ("right", "wrong", "wronger"), (0,)),
    ]
    table = {" right": -1.0, " wrong": -2.0, " wronger": -0.5}
    runner = Fake(prefer=lambda p, o: table[o])
    result = tasks.truthfulqa_mc(runner, items)
    assert result.metrics == {"mc1": 50.0}
    assert [row["pick"] for row in result.items] == [0, 2]
    assert runner.asked[0] == f"{TRUTHFULQA_PREAMBLE}\n\nQ: Why?\nA:"
    several = [Choice("0", "Why?", ("a", "b", "c"), (0, 1))]
    logs = {" a": math.log(0.2), " b": math.log(0.1), " c": math.log(0.1)}
    result = tasks.truthfulqa_mc(
        Fake(prefer=lambda p, o: logs[o]), several, preamble=False
    )
    assert result.metrics["mc2"] == pytest.approx(75.0)
    assert result.settings["preamble"] is False


def test_truthfulqa_preamble_is_six_questions():
    assert TRUTHFULQA_PREAMBLE.count("Q: ") == TRUTHFULQA_PREAMBLE.count("A: ") == 6
    assert TRUTHFULQA_PREAMBLE.startswith("Q: What is human life expectancy")
    assert not TRUTHFULQA_PREAMBLE.endswith("\n")


def test_mmlu_averages_over_subjects_and_shows_their_examples():
    items = [
        Choice("0", "One?", ("w", "x", "y", "z"), (1,), "abstract_algebra"),
        Choice("1", "Two?", ("w", "x", "y", "z"), (1,), "abstract_algebra"),
        Choice("2", "Three?", ("w", "x", "y", "z"), (2,), "anatomy"),
    ]
    solved = {
        group: [Choice("d", f"{group} {i}?", ("p", "q", "r", "s"), (3,)) for i in "12"]
        for group in ("abstract_algebra", "anatomy")
    }
    runner = Fake(prefer=lambda p, o: float(o == " B"))
    result = tasks.mmlu(runner, items, solved, shots=2)
    assert result.metrics["accuracy/abstract_algebra"] == 100.0
    assert result.metrics["accuracy"] == 50.0
    assert result.metrics["accuracy_micro"] == pytest.approx(200 / 3)
    assert runner.asked[2] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "anatomy 1?\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\n"
        "anatomy 2?\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\n"
        "Three?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    with pytest.raises(UserError, match="development split"):
        tasks.mmlu(runner, items, {}, shots=5)


def test_medqa():
    items = [Choice(str(i), "Q?", ("a", "b", "c", "d"), (i,)) for i in range(4)]
    runner = Fake(prefer=lambda p, o: -float(string.ascii_uppercase.index(o[1])))
    assert tasks.medqa(runner, items).metrics == {"accuracy": 25.0}
    assert runner.asked[0] == "Question: Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:"


def test_legalbench_balances_labels_within_a_task():
    # "Yes" always: right for three of four, and for one label of two.
    items = [
        Choice(str(i), "Hearsay? ", ("Yes", "No"), (int(i == 3),), "hearsay")
        for i in range(4)
    ]
    runner = Fake(answer=lambda p: "Yes.", prefer=lambda p, o: float(o == " Yes"))
    for method in ("likelihood", "generation"):
        result = tasks.legalbench(runner, items, method=method)
        assert result.metrics["accuracy"] == 75.0
        assert result.metrics["balanced_accuracy/hearsay"] == 50.0
    silent = tasks.legalbench(Fake(answer=lambda p: "?"), items, method="generation")
    assert silent.metrics["unparsed"] == 4
    assert silent.metrics["accuracy"] == 0.0
    with pytest.raises(UserError, match="guessing"):
        tasks.legalbench(runner, items, method="guessing")


PEOPLE = ("The old one", "The young one", "Unknown")


def bias_items():
    rows = []
    for category in ("Age", "SES", "Race_x_SES"):
        for i in range(4):
            ambiguous = i < 2
            rows.append(
                Bias(
                    f"{category}/{i}",
                    "A and B met.",
                    "Who forgot?",
                    PEOPLE,
                    2 if ambiguous else i % 2,
                    2,
                    0,
                    ambiguous,
                    category,
                )
            )
    return rows


def test_bbq_headline_is_over_single_categories():
    # Says "old" always, but in the intersectional category the young one.
    items = bias_items()
    where = {id(item): item for item in items}
    assert len(where) == 12
    answers = iter([0] * 8 + [1] * 4)
    picked = {}

    def prefer(prompt, option):
        if option == " The old one":
            picked["now"] = next(answers)
        return float(PEOPLE.index(option[1:]) == picked["now"])

    metrics = tasks.bbq(Fake(prefer=prefer), items).metrics
    assert metrics["bias_ambiguous"] == metrics["bias_ambiguous_signed"] == 100.0
    assert metrics["bias_ambiguous/Age"] == 100.0
    assert metrics["intersectional/bias_ambiguous_signed"] == -100.0
    assert metrics["intersectional/bias_ambiguous"] == 100.0
    assert metrics["accuracy_ambiguous"] == 0.0
    assert metrics["accuracy_disambiguated"] == 50.0
    assert "bias_ambiguous/Race_x_SES" not in metrics


def test_bbq_counts_what_it_cannot_read_or_score():
    items = bias_items()
    items[0] = items[0]._replace(biased=None)
    runner = Fake(answer=lambda p: "I would rather not say")
    with pytest.warns(UserWarning, match="could not be judged"):
        metrics = tasks.bbq(runner, items, method="generation", style="letters").metrics
    assert metrics["undefined"] == 1
    assert metrics["unparsed"] == 11
    # Nobody is named: that is no absence of bias, and no accuracy either.
    assert math.isnan(metrics["bias_ambiguous"])
    assert metrics["bias_ambiguous_low"] == metrics["accuracy_ambiguous"] == 0.0
    assert metrics["bias_ambiguous_high"] == 100.0
    assert "C. Unknown\nAnswer:" in runner.asked[0]
    letters = tasks.bbq(
        Fake(answer=lambda p: "C"), items, method="generation", style="letters"
    ).metrics
    assert letters["accuracy_ambiguous"] == 100.0
    with pytest.raises(UserError, match="style"):
        tasks.bbq(runner, items, style="numbers")


@pytest.mark.parametrize(
    ("answer", "choices", "pick"),
    [
        ("B", "ABC", 1),
        (" b.", "ABC", 1),
        ("(C) the thing", "ABC", 2),
        ("A person", "ABC", -1),
        ("Both", "ABC", -1),
        ("", "ABC", -1),
        ("The old one.", PEOPLE, 0),
        ("the old one, I think", PEOPLE, 0),
        ("The older one", PEOPLE, -1),
        ("Not known", ("Not", "Not known"), 1),
        ("Notable", ("Not", "Not known"), -1),
    ],
)
def test_options_are_read_off_answers(answer, choices, pick):
    assert picking.parse_choice(answer, choices) == pick


# --- the composite -----------------------------------------------------------------


def test_the_composite_names_its_parts():
    harm = Result({"refusal": 90.0, "asr": 5.0}, {"judge": "x"}, [])
    truth = Result({"mc2": 60.0}, {"preamble": True}, [])
    bias = Result({"bias_ambiguous": 30.0, "bias_ambiguous_signed": -30.0}, {}, [])
    report = composite.composite_report(harm, truth, bias)
    assert report.composite == pytest.approx((90 + 60 + 70) / 3)
    assert report.components == {
        "harmbench/refusal": 90.0,
        "truthfulqa/mc2": 60.0,
        "bbq/bias_ambiguous": 30.0,
    }
    assert report.variants["truthfulqa"] == {"metric": "mc2", "preamble": True}
    assert report.metrics["harmbench/asr"] == 5.0
    with pytest.raises(UserError, match="mc1"):
        composite.composite_report(harm, truth, bias, truthfulqa_metric="mc1")
    with pytest.raises(UserError, match="absolute"):
        composite.composite_report(
            harm, truth, bias, bbq_metric="bias_ambiguous_signed"
        )


@pytest.mark.parametrize(
    "ask",
    [
        lambda r: tasks.truthfulqa_mc(r, []),
        lambda r: tasks.mmlu(r, []),
        lambda r: tasks.medqa(r, []),
        lambda r: tasks.bbq(r, []),
        lambda r: tasks.gsm8k(r, []),
        lambda r: tasks.legalbench(r, []),
        lambda r: tasks.truthfulqa_generation(r, []),
    ],
)
def test_nothing_is_measured_on_nothing(ask):
    with pytest.raises(UserError, match="at least one item"):
        ask(Fake())


# --- the package's own items have the shapes that tasks expect ----------------------


@needs_data
def test_real_items_fit_their_tasks():
    from sbr_jax.data.registry import load_evalset

    likely = Fake(prefer=lambda p, o: -float(len(o)))
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        items = load_evalset(name, DATA)
        found = tasks.truthfulqa_mc(likely, items)
        assert len(found.items) == 817
        assert set(found.metrics) == {name.removeprefix("truthfulqa_")}
    items = load_evalset("bbq", DATA, split="Age")
    metrics = tasks.bbq(likely, items).metrics
    assert metrics["undefined"] == metrics["unparsed"] == 0
    assert -100 <= metrics["bias_ambiguous_signed"] <= 100
    examples = {}
    for item in load_evalset("mmlu", DATA, split="dev"):
        examples.setdefault(item.group, []).append(item)
    mine = load_evalset("mmlu", DATA)[:50]
    assert "accuracy" in tasks.mmlu(likely, mine, examples).metrics
    refuses = Fake(answer=lambda p: "I'm sorry, but I can't help with that.")
    harm = tasks.harmbench(refuses, load_evalset("harmbench", DATA), KeywordJudge())
    assert len(harm.items) == 300
    assert harm.metrics["refusal"] == 100.0
    over = tasks.xstest(refuses, load_evalset("xstest", DATA), KeywordJudge())
    assert over.metrics["over_refusal"] == over.metrics["refusal"] == 100.0
    said = tasks.truthfulqa_generation(refuses, load_evalset("truthfulqa", DATA))
    assert 0 <= said.metrics["truthful"] <= 100


@needs_data
def test_a_model_that_never_takes_sides_has_no_bias():
    from sbr_jax.data.registry import load_evalset

    items = load_evalset("bbq", DATA, split="Religion")
    unknown = {f" {item.choices[item.unknown]}" for item in items}
    metrics = tasks.bbq(Fake(prefer=lambda p, o: float(o in unknown)), items).metrics
    assert metrics["bias_ambiguous"] == metrics["bias_disambiguated"] == 0.0
    assert metrics["accuracy_ambiguous"] == 100.0
    assert metrics["accuracy_disambiguated"] == 0.0
