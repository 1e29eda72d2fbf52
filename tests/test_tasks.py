"""Tasks, put to examinees whose answers are known beforehand."""

import json
import math
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sbr_jax.evaluation import composite, picking, sandbox, similarity, tasks
from sbr_jax.evaluation.answering import final_number
from sbr_jax.evaluation.humaneval import humaneval_program
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.judges import CallableJudge, Verdict
from sbr_jax.evaluation.keyword import KeywordJudge
from sbr_jax.evaluation.multiple_choice import TRUTHFULQA_PREAMBLE
from sbr_jax.typing import UserError

ISOLATION = "kernel" if sandbox.kernel_isolation() else "audit"


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


class Asked(NamedTuple):
    id: str
    prompt: str
    group: str = "g"
    kind: str = "standard"
    harmful: bool = True


class Wild(NamedTuple):
    id: str
    prompt: str
    group: str
    harmful_prompt: bool | None


class Question(NamedTuple):
    id: str
    prompt: str
    correct: tuple
    incorrect: tuple


class Exchange(NamedTuple):
    prompt: str
    answer: str


class Code(NamedTuple):
    id: str
    prompt: str
    entry_point: str
    test: str


class Dialogue(NamedTuple):
    id: str
    turns: tuple
    group: str = ""


class Fake:
    """Answers by a function of the prompt; remembers what it was asked."""

    def __init__(self, answer=None, prefer=None):
        self.answer, self.prefer, self.asked, self.stops = answer, prefer, [], ()

    def log_likelihoods(self, prompts, options):
        self.asked += list(prompts)
        return [
            np.array([self.prefer(p, o) for o in row], np.float64)
            for p, row in zip(prompts, options, strict=True)
        ]

    def answers(self, prompts, *, max_new_tokens, stop=(), temperature=0.0, key=None):
        self.asked += [json.loads(json.dumps(p)) for p in prompts]
        self.stops = stop
        return [self.answer(p) for p in prompts]

    def describe(self):
        return {"chat": False}


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
    metrics = tasks.bbq(runner, items, method="generation", style="letters").metrics
    assert metrics["undefined"] == 1
    assert metrics["unparsed"] == 11
    # Nobody is named: no bias, and no accuracy either.
    assert metrics["bias_ambiguous"] == metrics["accuracy_ambiguous"] == 0.0
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


# --- judged answers ----------------------------------------------------------------


def test_harmbench_counts_every_verdict_and_leaves_copyright_out():
    said = {
        "a": "I'm sorry, no.",
        "b": "Take the bus to town.",
        "c": "",
        "d": "I cannot do this.",
        "e": "All of the text",
    }
    items = [Asked(k, k, group="x" if k in "ab" else "y") for k in "abcd"]
    items.append(Asked("e", "e", kind="copyright"))
    result = tasks.harmbench(Fake(answer=said.__getitem__), items, KeywordJudge())
    assert result.metrics["refusal"] == 50.0
    assert result.metrics["asr"] == result.metrics["gibberish"] == 25.0
    assert result.metrics["refusal/x"] == 50.0
    assert [row["id"] for row in result.items] == list("abcd")
    assert result.settings["judge"]["sha256"]
    # No text of a request or an answer gets into the record.
    assert "sorry" not in json.dumps(result)
    with pytest.raises(UserError, match="at least one"):
        tasks.harmbench(Fake(), items, KeywordJudge(), kinds=("other",))


def test_xstest_separates_the_safe_from_the_unsafe():
    items = [Asked(str(i), str(i), harmful=i >= 6) for i in range(8)]
    runner = Fake(answer=lambda p: "I can't." if int(p) % 2 else "Take the bus.")
    metrics = tasks.xstest(runner, items, KeywordJudge()).metrics
    assert metrics["over_refusal"] == 50.0
    assert metrics["refusal"] == 50.0
    metrics = tasks.xstest(runner, items[:7], KeywordJudge()).metrics
    assert metrics["over_refusal"] == 50.0
    assert metrics["refusal"] == 0.0
    with pytest.raises(UserError, match="safe prompts"):
        tasks.xstest(runner, items[6:], KeywordJudge())


def test_wildguard_robustness_is_over_harmful_adversarial_requests():
    C, R, G = Verdict.COMPLIANCE, Verdict.REFUSAL, Verdict.GIBBERISH
    verdicts = {"a": C, "b": R, "c": G, "d": R, "e": C, "f": R, "g": C}
    items = [
        *(Wild(k, k, "adversarial", True) for k in "abcd"),
        Wild("e", "e", "vanilla", True),
        Wild("f", "f", "adversarial", False),
        Wild("g", "g", "adversarial", None),
    ]
    judge = CallableJudge("table", lambda prompt, answer: verdicts[prompt])
    result = tasks.wildguard(Fake(answer=lambda p: "x"), items, judge)
    assert result.metrics["robustness"] == 75.0
    assert result.metrics["gibberish_adversarial"] == 25.0
    assert result.metrics["robustness_vanilla"] == 0.0
    assert result.metrics["over_refusal"] == 100.0
    # What nobody judged is not asked.
    assert [row["id"] for row in result.items] == list("abcdef")
    with pytest.raises(UserError, match="adversarial"):
        tasks.wildguard(Fake(answer=lambda p: "x"), items[4:5], judge)


# --- written answers ---------------------------------------------------------------


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
    assert similarity.bleu(answer, reference) == pytest.approx(
        slow_bleu(answer, reference), abs=1e-9
    )


def test_bleu_and_rouge_know_equal_from_different():
    for alike in (similarity.bleu, similarity.rouge1):
        assert alike("Nothing happens.", "nothing happens.") == pytest.approx(100.0)
        assert alike("yes", "no") == alike("", "no") == 0.0


@pytest.mark.parametrize("name", ["bleu", "rouge1"])
def test_truthful_answers_are_nearer_to_a_true_reference(name):
    items = [
        Question(str(i), "Q?", ("Nothing happens.", "No."), ("You will die.",))
        for i in range(4)
    ]
    said = iter([" Nothing happens.", " You will die.", " xyzzy", ""])
    runner = Fake(answer=lambda p: next(said))
    result = tasks.truthfulqa_generation(runner, items, similarity=name)
    # A tie (nothing in common with either) is not truthful.
    assert result.metrics["truthful"] == 25.0
    assert result.metrics["empty"] == 25.0
    assert "\n\n" in runner.stops
    with pytest.raises(UserError, match="rouge1"):
        tasks.truthfulqa_generation(runner, items, similarity="guess")


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
    items = [Exchange(f"{i}?", f"so <<1+1=2>> it is\n#### {i}") for i in range(4)]
    said = {"0": "#### 0", "1": "it is 1", "2": "it is 3", "3": "?"}
    shots = [Exchange("9?", "easy\n#### 9")]
    runner = Fake(answer=lambda p: said[p.split("Question: ")[-1][0]])
    metrics = tasks.gsm8k(runner, items, shots).metrics
    assert metrics == {"accuracy": 50.0, "accuracy_marked": 25.0, "unparsed": 25.0}
    assert runner.asked[0] == (
        "Question: 9?\nAnswer: easy\n#### 9\n\nQuestion: 0?\nAnswer:"
    )
    with pytest.raises(UserError, match="item 0"):
        tasks.gsm8k(runner, [Exchange("?", "seven")])


PROMPT = 'from typing import List\n\n\ndef twice(x: int) -> int:\n    """2x."""\n'
CHECK = (
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0"
)
TASK = Code("t/0", PROMPT, "twice", CHECK)
ANSWERS = {
    "completion": "    return 2 * x\n\ndef other():\n    return oops(",
    "fence": "Sure:\n```python\ndef twice(x: int) -> int:\n    y: List = [x]\n"
    "    return x + x\n```\nDone.",
    "whole": "def twice(x):\n    return x << 1\n",
    "wrong": "    return x * x * x\n",
    "prose": "    I would double it.",
    "leaver": "    import sys\n    sys.exit(0)\n",
}


def test_humaneval_runs_completions_fences_and_whole_functions():
    outcomes = sandbox.run_many(
        [humaneval_program(TASK, answer) for answer in ANSWERS.values()],
        allow_code_execution=True,
        seconds=20.0,
        isolation=ISOLATION,
    )
    passed = dict(zip(ANSWERS, (o.passed for o in outcomes), strict=True))
    assert {name for name, ok in passed.items() if ok} == {
        "completion",
        "fence",
        "whole",
    }


def test_humaneval_scores_pass_at_k():
    import jax

    items = [TASK, TASK._replace(id="t/1")]
    said = iter([ANSWERS["wrong"], ANSWERS["whole"], ANSWERS["wrong"], "    return 5"])
    result = tasks.humaneval(
        Fake(answer=lambda p: next(said)),
        items,
        allow_code_execution=True,
        samples=2,
        k=(1, 2),
        temperature=0.8,
        key=jax.random.key(0),
        seconds=20.0,
        isolation=ISOLATION,
    )
    assert result.metrics == {"pass@1": 25.0, "pass@2": 50.0, "failed": 75.0}
    assert [row["passed"] for row in result.items] == [1, 0]


def test_humaneval_runs_nothing_unless_allowed(monkeypatch):
    def never(*_, **__):
        raise AssertionError("something ran")

    monkeypatch.setattr("sbr_jax.evaluation.humaneval.run_many", never)
    asked = Fake(answer=never)
    with pytest.raises(UserError, match="allow_code_execution"):
        tasks.humaneval(asked, [TASK])
    with pytest.raises(UserError, match="k <= 1"):
        tasks.humaneval(asked, [TASK], allow_code_execution=True, k=(2,))
    with pytest.raises(UserError, match="greedy"):
        tasks.humaneval(asked, [TASK], allow_code_execution=True, samples=2)


def test_mtbench_answers_follow_each_other(tmp_path):
    items = [Dialogue("81", ("first", "second")), Dialogue("82", ("only",))]
    runner = Fake(answer=lambda messages: f"to {messages[-1]['content']}")
    path = tasks.write_mtbench(runner, items, tmp_path / "a" / "m.jsonl", model_id="m")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["to first", "to second"]}]
    assert rows[1]["choices"][0]["turns"] == ["to only"]
    # The second turn sees the first answer; whoever has no second turn is not asked.
    assert len(runner.asked) == 3
    assert [m["content"] for m in runner.asked[2]] == ["first", "to first", "second"]
    again = tasks.write_mtbench(runner, items, tmp_path / "b.jsonl", model_id="m")
    assert again.read_bytes() == path.read_bytes()


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

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside us")
def test_real_items_fit_their_tasks():
    from sbr_jax.data.evalsets import load_evalset

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


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside us")
def test_a_model_that_never_takes_sides_has_no_bias():
    from sbr_jax.data.evalsets import load_evalset

    items = load_evalset("bbq", DATA, split="Religion")
    unknown = {f" {item.choices[item.unknown]}" for item in items}
    metrics = tasks.bbq(Fake(prefer=lambda p, o: float(o in unknown)), items).metrics
    assert metrics["bias_ambiguous"] == metrics["bias_disambiguated"] == 0.0
    assert metrics["accuracy_ambiguous"] == 100.0
    assert metrics["accuracy_disambiguated"] == 0.0
