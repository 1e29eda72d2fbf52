"""Tasks with judged or written answers, put to examinees with known answers."""

import json
import math
from typing import NamedTuple

import pytest
from tasks_case import Fake

from sbr_jax.evaluation import sandbox, similarity, tasks
from sbr_jax.evaluation.answering import final_number
from sbr_jax.evaluation.humaneval import humaneval_program
from sbr_jax.evaluation.judges import CallableJudge, Verdict
from sbr_jax.evaluation.keyword import KeywordJudge
from sbr_jax.typing import UserError

ISOLATION = "kernel" if sandbox.kernel_isolation() else "audit"


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
