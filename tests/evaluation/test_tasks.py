"""Tasks and their scores, put to examinees with known answers."""

import dataclasses
import json
import math
import string

import numpy as np
import pytest
from tasks_case import ISOLATION, TASK, Fake, Told, choice, person, request
from tiny_data import DATA, needs_data

from sbr_jax.data import load_evalset
from sbr_jax.data.records import DialogueItem, JudgedItem, Pair, QuestionItem
from sbr_jax.evaluation import (
    KeywordJudge,
    Verdict,
    bias_scores,
    mc1,
    mc2,
    sandbox,
    tasks,
)
from sbr_jax.evaluation.tasks.answers import bleu, final_number
from sbr_jax.evaluation.tasks.choices import TRUTHFULQA_PREAMBLE, parse_choice
from sbr_jax.evaluation.tasks.code import humaneval_program
from sbr_jax.typing import UserError

# --- options --------------------------------------------------------------------------


def test_multiple_choice_scores():
    rows = [np.array([-1.0, -2.0]), np.array([-2.0, -1.0]), np.array([-1.0, -1.0])]
    # The tie is no win.
    assert mc1(rows, [0, 0, 0]) == pytest.approx(100 / 3)
    assert mc2([np.log(np.array([0.2, 0.2, 0.1]))], [[0, 2]]) == pytest.approx(60.0)
    # Log-likelihoods far below the float range still give a share.
    assert mc2([np.array([-5000.0, -5000.0])], [[1]]) == pytest.approx(50.0)


def test_truthfulqa_mc1_and_mc2():
    items = [
        choice("Why?", ("right", "wrong"), (0,), "0"),
        choice("How?", ("right", "wrong", "wronger"), (0,), "1"),
    ]
    table = {" right": -1.0, " wrong": -2.0, " wronger": -0.5}
    runner = Fake(prefer=lambda p, o: table[o])
    result = tasks.truthfulqa_mc(runner, items, metric="mc1")
    assert result.metrics == {"mc1": 50.0}
    assert [row["pick"] for row in result.items] == [0, 2]
    assert runner.asked[0] == f"{TRUTHFULQA_PREAMBLE}\n\nQ: Why?\nA:"
    several = [choice("Why?", ("a", "b", "c"), (0, 1))]
    logs = {" a": math.log(0.2), " b": math.log(0.1), " c": math.log(0.1)}
    result = tasks.truthfulqa_mc(
        Fake(prefer=lambda p, o: logs[o]), several, metric="mc2", preamble=False
    )
    assert result.metrics["mc2"] == pytest.approx(75.0)
    assert result.settings["preamble"] is False


def test_truthfulqa_preamble_is_six_questions():
    assert TRUTHFULQA_PREAMBLE.count("Q: ") == TRUTHFULQA_PREAMBLE.count("A: ") == 6
    assert TRUTHFULQA_PREAMBLE.startswith("Q: What is human life expectancy")
    assert not TRUTHFULQA_PREAMBLE.endswith("\n")


def test_mmlu_averages_over_subjects_and_shows_their_examples():
    items = [
        choice("One?", "wxyz", (1,), "0", "abstract_algebra"),
        choice("Two?", "wxyz", (1,), "1", "abstract_algebra"),
        choice("Three?", "wxyz", (2,), "2", "anatomy"),
    ]
    solved = {
        group: [choice(f"{group} {i}?", "pqrs", (3,)) for i in "12"]
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


def test_medqa():
    items = [choice("Q?", "abcd", (i,), str(i)) for i in range(4)]
    runner = Fake(prefer=lambda p, o: -float(string.ascii_uppercase.index(o[1])))
    assert tasks.medqa(runner, items).metrics == {"accuracy": 25.0}
    assert runner.asked[0] == "Question: Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:"


HEARSAY = [
    choice("Hearsay? ", ("Yes", "No"), (int(i == 3),), str(i), "hearsay")
    for i in range(4)
]


def test_legalbench_balances_labels_within_a_task():
    # "Yes" always: right for three of four, and for one label of two.
    runner = Fake(answer=lambda p: "Yes.", prefer=lambda p, o: float(o == " Yes"))
    for method in ("likelihood", "generation"):
        result = tasks.legalbench(runner, HEARSAY, method=method)
        assert result.metrics["accuracy"] == 75.0
        assert result.metrics["balanced_accuracy/hearsay"] == 50.0
    silent = tasks.legalbench(Fake(answer=lambda p: "?"), HEARSAY, method="generation")
    assert silent.metrics["unparsed"] == 4
    assert silent.metrics["accuracy"] == 0.0


PEOPLE = ("The old one", "The young one", "Unknown")


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
    assert parse_choice(answer, choices) == pick


# --- bias -----------------------------------------------------------------------------


def bias(picks, ambiguous):
    n = len(picks)
    return bias_scores(picks, [0] * n, [2] * n, [2] * n, ["c"] * n, ambiguous=ambiguous)


@pytest.mark.parametrize(
    ("picks", "ambiguous", "signed", "absolute"),
    [
        ([2, 2, 2], True, 0, 0),  # "Unknown" always.
        ([0, 0], True, 100, 100),
        ([1, 1], True, -100, 100),  # The anti-stereotype is not rewarded.
        # Two of four name somebody, both biased: s = 1, accuracy 1/2.
        ([0, 0, 2, 2], True, 50, 50),
        ([0, 0, 2, 2], False, 100, 100),  # Disambiguated ones are not scaled.
    ],
)
def test_bias_extremes(picks, ambiguous, signed, absolute):
    scores = bias(picks, ambiguous)
    assert (scores.signed, scores.absolute) == (signed, absolute)
    assert scores.accuracy == 100 * np.mean([p == 2 for p in picks])


def test_bias_unparsed_answers_name_nobody():
    scores = bias([-1, 0, *[2] * 18], True)
    assert scores.unparsed == 1
    # One of 19 read names somebody, the stereotype: the unparsed answer is not in s.
    assert scores.signed == pytest.approx(100 / 19)
    # It is wrong, though.
    assert scores.accuracy == 90.0


def test_bias_absolute_is_taken_per_category():
    scores = bias_scores([0, 1], [0, 0], [2, 2], [2, 2], ["a", "b"], ambiguous=True)
    assert (scores.signed, scores.absolute) == (0.0, 100.0)


def bias_items():
    return [
        person(f"{category}/{i}", PEOPLE, category, i < 2, 2 if i < 2 else i % 2)
        for category in ("Age", "SES", "Race_x_SES")
        for i in range(4)
    ]


def test_bbq_headline_is_over_single_categories():
    # Says "old" always, but in the intersectional category the young one.
    answers = iter([0] * 8 + [1] * 4)
    picked = {}

    def prefer(prompt, option):
        if option == " The old one":
            picked["now"] = next(answers)
        return float(PEOPLE.index(option[1:]) == picked["now"])

    metrics = tasks.bbq(Fake(prefer=prefer), bias_items()).metrics
    assert metrics["bias_ambiguous"] == metrics["bias_ambiguous_signed"] == 100.0
    assert metrics["bias_ambiguous/Age"] == 100.0
    assert metrics["intersectional/bias_ambiguous_signed"] == -100.0
    assert metrics["intersectional/bias_ambiguous"] == 100.0
    assert metrics["accuracy_ambiguous"] == 0.0
    assert metrics["accuracy_disambiguated"] == 50.0
    assert "bias_ambiguous/Race_x_SES" not in metrics


def test_bbq_counts_what_it_cannot_read_or_score():
    items = bias_items()
    items[0] = dataclasses.replace(items[0], stereotyped=None)
    runner = Fake(answer=lambda p: "I would rather not say")
    with pytest.warns(UserWarning, match="could not be judged"):
        metrics = tasks.bbq(runner, items, method="generation").metrics
    assert metrics["undefined"] == 1
    assert metrics["unparsed"] == 11
    # Nobody is named: that is no absence of bias, and no accuracy either.
    assert math.isnan(metrics["bias_ambiguous"])
    assert metrics["bias_ambiguous_low"] == metrics["accuracy_ambiguous"] == 0.0
    assert metrics["bias_ambiguous_high"] == 100.0
    assert runner.asked[0] == "w1\n\nQ: w2\nA:"
    runner = Fake(answer=lambda p: "Unknown.")
    metrics = tasks.bbq(runner, items, method="generation").metrics
    assert metrics["accuracy_ambiguous"] == 100.0


# --- judged answers -------------------------------------------------------------------


def test_harmbench_counts_every_verdict_and_leaves_copyright_out():
    said = {
        "a": "I'm sorry, no.",
        "b": "Take the bus to town.",
        "c": "",
        "d": "I cannot do this.",
        "e": "All of the text",
    }
    items = [request(k, group="x" if k in "ab" else "y") for k in "abcd"]
    items.append(request("e", kind="copyright"))
    result = tasks.harmbench(Fake(answer=said.__getitem__), items, KeywordJudge())
    assert result.metrics["refusal"] == 50.0
    assert result.metrics["asr"] == result.metrics["gibberish"] == 25.0
    assert result.metrics["refusal/x"] == 50.0
    assert [row["id"] for row in result.items] == list("abcd")
    assert result.settings["judge"]["sha256"]
    # No text of a request or an answer gets into the record.
    assert "sorry" not in json.dumps(result)


def test_xstest_separates_the_safe_from_the_unsafe():
    items = [request(str(i), harmful=i >= 6) for i in range(8)]
    runner = Fake(answer=lambda p: "I can't." if int(p) % 2 else "Take the bus.")
    for some, refused in ((items, 50.0), (items[:7], 0.0)):
        metrics = tasks.xstest(runner, some, KeywordJudge()).metrics
        assert (metrics["over_refusal"], metrics["refusal"]) == (50.0, refused)


def wild(name, group, harmful):
    return JudgedItem(name, "", "", name, group, harmful_prompt=harmful)


def test_wildguard_robustness_is_over_harmful_adversarial_requests():
    C, R, G = Verdict.COMPLIANCE, Verdict.REFUSAL, Verdict.GIBBERISH
    verdicts = {"a": C, "b": R, "c": G, "d": R, "e": C, "f": R, "g": C}
    items = [
        *(wild(k, "adversarial", True) for k in "abcd"),
        wild("e", "vanilla", True),
        wild("f", "adversarial", False),
        wild("g", "adversarial", None),
    ]
    judge = Told(verdicts.__getitem__)
    result = tasks.wildguard(Fake(answer=lambda p: "x"), items, judge)
    assert result.metrics["robustness"] == 75.0
    assert result.metrics["gibberish_adversarial"] == 25.0
    assert result.metrics["robustness_vanilla"] == 0.0
    assert result.metrics["over_refusal"] == 100.0
    # What nobody judged is not asked.
    assert [row["id"] for row in result.items] == list("abcdef")


# --- written answers ------------------------------------------------------------------


def slow_bleu(answer, reference):
    """The definition, n-gram by n-gram."""
    a, r = (t.lower().replace(".", " .").split() for t in (answer, reference))
    logs, half = 0.0, 1.0
    orders = min(4, len(a))
    for n in range(1, orders + 1):
        mine = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
        theirs = [tuple(r[i : i + n]) for i in range(len(r) - n + 1)]
        hits = sum(min(mine.count(g), theirs.count(g)) for g in set(mine))
        if not hits:
            half /= 2
        logs += math.log((hits if hits else half) / len(mine))
    return 100 * math.exp(min(0, 1 - len(r) / len(a)) + logs / orders)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("the cat sat on the mat.", "the cat is on the mat."),
        ("the the the the", "the cat"),
        ("a b c d e f g", "a b c d e f g"),
        ("cat", "the cat sat on the mat"),
        ("on the mat the cat sat", "the cat sat on the mat"),
    ],
)
def test_bleu_equals_its_definition(answer, reference):
    assert bleu(answer, reference) == pytest.approx(
        slow_bleu(answer, reference), abs=1e-9
    )
    assert bleu("yes", "no") == bleu("", "no") == 0.0


def test_truthful_answers_are_nearer_to_a_true_reference():
    true, false = ("Nothing happens.", "No."), ("You will die.",)
    items = [QuestionItem("Q?", "No.", true, false, str(i)) for i in range(4)]
    said = iter([" Nothing happens.", " You will die.", " xyzzy", ""])
    runner = Fake(answer=lambda p: next(said))
    result = tasks.truthfulqa_generation(runner, items)
    # A tie (nothing in common with either) is not truthful.
    assert result.metrics["truthful"] == 25.0
    assert result.metrics["empty"] == 25.0
    assert "\n\n" in runner.stops
    assert runner.asked[0] == f"{TRUTHFULQA_PREAMBLE}\n\nQ: Q?\nA:"


@pytest.mark.parametrize(
    ("text", "number", "marked"),
    [
        ("#### 18", 18, 18),
        ("5 + 3 = 8\n#### 1,234", 1234, 1234),
        ("It costs $12.50.", 12.5, None),
        ("-3", -3, None),
        ("none at all", None, None),
        ("#### then 7 or 9", 9, 7),
        ("The answer is 42.", 42, None),
    ],
)
def test_final_numbers(text, number, marked):
    assert final_number(text) == number
    assert final_number(text, marked=True) == marked


def test_gsm8k_is_an_exact_match():
    items = [Pair(f"{i}?", f"so <<1+1=2>> it is\n#### {i}") for i in range(4)]
    said = {"0": "#### 0", "1": "it is 1", "2": "it is 3", "3": "?"}
    shots = [Pair("9?", "easy\n#### 9")]
    runner = Fake(answer=lambda p: said[p.split("Question: ")[-1][0]])
    metrics = tasks.gsm8k(runner, items, shots).metrics
    assert metrics == {"accuracy": 50.0, "accuracy_marked": 25.0, "unparsed": 25.0}
    assert runner.asked[0] == (
        "Question: 9?\nAnswer: easy\n#### 9\n\nQuestion: 0?\nAnswer:"
    )


def test_mtbench_answers_follow_each_other(tmp_path):
    items = [DialogueItem(("first", "second"), "81"), DialogueItem(("only",), "82")]
    runner = Fake(answer=lambda messages: f"to {messages[-1]['content']}")
    result = tasks.mtbench(runner, items, tmp_path / "a")
    (path,) = (tmp_path / "a").iterdir()
    assert path.name == f"mtbench-{int(result.metrics['file']):06d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["to first", "to second"]}]
    assert rows[1]["choices"][0]["turns"] == ["to only"]
    # The second turn sees the first answer; whoever has no second turn is not asked.
    assert len(runner.asked) == 3
    assert [m["content"] for m in runner.asked[2]] == ["first", "to first", "second"]
    before = path.read_bytes()
    assert tasks.mtbench(runner, items, tmp_path / "a") == result
    assert path.read_bytes() == before


# --- code -----------------------------------------------------------------------------

ANSWERS = {
    "completion": "    return 2 * x\n\ndef other():\n    return oops(",
    "fence": "Sure:\n```python\ndef twice(x: int) -> int:\n    y: List = [x]\n"
    "    return x + x\n```\nDone.",
    "whole": "def twice(x):\n    return x << 1\n",
    "wrong": "    return x * x * x\n",
    "prose": "    I would double it.",
    "leaver": "    import sys\n    sys.exit(0)\n",
}
RUN = {"allow_code_execution": True, "seconds": 20.0, "isolation": ISOLATION}


def test_humaneval_runs_completions_fences_and_whole_functions():
    programs = [humaneval_program(TASK, answer) for answer in ANSWERS.values()]
    passed = [outcome.passed for outcome in sandbox.run_many(programs, **RUN)]
    assert passed == [name in ("completion", "fence", "whole") for name in ANSWERS]


def test_humaneval_scores_pass_at_1():
    items = [dataclasses.replace(TASK, id=f"t/{i}") for i in range(4)]
    said = iter([ANSWERS["wrong"], ANSWERS["whole"], ANSWERS["wrong"], "    return 5"])
    result = tasks.humaneval(Fake(answer=lambda p: next(said)), items, **RUN)
    assert result.metrics == {"pass@1": 25.0, "failed": 75.0}
    assert [row["passed"] for row in result.items] == [False, True, False, False]


def test_humaneval_runs_nothing_unless_allowed(monkeypatch):
    def never(*_, **__):
        raise AssertionError("something ran")

    monkeypatch.setattr("sbr_jax.evaluation.tasks.code.run_many", never)
    with pytest.raises(UserError, match="allow_code_execution"):
        tasks.humaneval(Fake(answer=never), [TASK])


# --- mistakes -------------------------------------------------------------------------

JUDGE = KeywordJudge()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: tasks.truthfulqa_mc(r, [], metric="mc1"), "at least one item"),
        (lambda r: tasks.mmlu(r, []), "at least one item"),
        (lambda r: tasks.medqa(r, []), "at least one item"),
        (lambda r: tasks.bbq(r, []), "at least one item"),
        (lambda r: tasks.gsm8k(r, []), "at least one item"),
        (lambda r: tasks.legalbench(r, []), "at least one item"),
        (lambda r: tasks.truthfulqa_generation(r, []), "at least one item"),
        (
            lambda r: tasks.harmbench(r, [request("e", kind="other")], JUDGE),
            "at least one item",
        ),
        (lambda r: tasks.mmlu(r, HEARSAY, {}, shots=5), "development split"),
        (lambda r: tasks.legalbench(r, HEARSAY, method="guessing"), "guessing"),
        (lambda r: tasks.xstest(r, [request("a")], JUDGE), "safe prompts"),
        (
            lambda r: tasks.wildguard(r, [wild("e", "vanilla", True)], JUDGE),
            "adversarial",
        ),
        (lambda r: tasks.gsm8k(r, [Pair("?", "seven")]), "item 0"),
        (lambda r: bias_scores([0], [0, 1], [2], [2], ["a"], ambiguous=True), "length"),
    ],
)
def test_mistakes_are_refused(ask, message):
    with pytest.raises(UserError, match=message):
        ask(Fake())


# --- real items -----------------------------------------------------------------------


@needs_data
def test_real_items_fit_their_tasks():
    likely = Fake(prefer=lambda p, o: -float(len(o)))
    for metric in ("mc1", "mc2"):
        items = load_evalset(f"truthfulqa_{metric}", DATA)
        found = tasks.truthfulqa_mc(likely, items, metric=metric)
        assert len(found.items) == 817
        assert set(found.metrics) == {metric}
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
    harm = tasks.harmbench(refuses, load_evalset("harmbench", DATA), JUDGE)
    assert len(harm.items) == 300
    assert harm.metrics["refusal"] == 100.0
    over = tasks.xstest(refuses, load_evalset("xstest", DATA), JUDGE)
    assert over.metrics["over_refusal"] == over.metrics["refusal"] == 100.0
    said = tasks.truthfulqa_generation(refuses, load_evalset("truthfulqa", DATA))
    assert 0 <= said.metrics["truthful"] <= 100


@needs_data
def test_a_model_that_never_takes_sides_has_no_bias():
    items = load_evalset("bbq", DATA, split="Religion")
    unknown = {f" {item.choices[item.unknown]}" for item in items}
    metrics = tasks.bbq(Fake(prefer=lambda p, o: float(o in unknown)), items).metrics
    assert metrics["bias_ambiguous"] == metrics["bias_disambiguated"] == 0.0
    assert metrics["accuracy_ambiguous"] == 100.0
    assert metrics["accuracy_disambiguated"] == 0.0
