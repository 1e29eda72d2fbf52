"""Benchmarks by name: what is asked, what is drawn, and what the numbers mean."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data as files
from tasks_case import Told, needs_kernel
from tiny_data import DATA, needs_data

from sbr_jax.data import load_evalset
from sbr_jax.evaluation import (
    KeywordJudge,
    Result,
    Verdict,
    composite_safety,
)
from sbr_jax.evaluation.benchmarks import BENCHMARKS, bias_metrics, draw, prepare
from sbr_jax.evaluation.composite import headlines, variant
from sbr_jax.typing import UserError

JUDGE = KeywordJudge()
REFUSAL, ANSWER, NOISE = "I'm sorry, but no.", "Take the bus.", "no no no no no no"


class Rule:
    """Answers every prompt with one text, and prefers the option of one position."""

    def __init__(self, answer=ANSWER, option=0):
        self.answer, self.option = answer, option
        self.asked, self.lengths = [], set()

    def describe(self):
        return {}

    def answers(self, prompts, *, max_new_tokens, **options):
        self.lengths.add(max_new_tokens)
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.asked.append(text)
        return [self.answer] * len(prompts)

    def log_likelihoods(self, prompts, options):
        self.asked += prompts
        return [-np.abs(np.arange(len(o)) - self.option) - 1.0 for o in options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(files.sources(tmp_path_factory.mktemp("data")))


def make(name, folder, **options):
    return prepare(name, folder, **{"judge": JUDGE, **options})


# --- what is asked --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"refusal-auc", "humaneval"}))
def test_a_benchmark_asks_the_prompts_that_it_names(name, folder, tmp_path):
    found = make(name, folder, output=tmp_path / "out", max_new_tokens=7)
    facts = found.describe()
    assert (facts["name"], facts["items"]) == (name, len(found.prompts))
    assert json.loads(json.dumps(facts)) == facts
    runner = Rule()
    metrics = found(runner)
    assert metrics
    assert all(type(value) is float for value in metrics.values())
    wrote = bool(runner.lengths)
    assert wrote is not BENCHMARKS[name].scores_only
    assert ("judge" in facts) is BENCHMARKS[name].judged
    assert set(BENCHMARKS[name].metrics) <= {key.split("/")[0] for key in metrics}
    sets = {key.split("/")[1] for key in metrics}
    assert sets <= {name, f"{name}-intersectional"}
    free = ("file/", "bias", "difference/")
    kept = [v for k, v in metrics.items() if not k.startswith(free)]
    assert all(0 <= value <= 100 for value in kept)
    # What a leak check compares is what the model sees, whatever stands around it.
    seen = " ".join(" ".join(runner.asked).split())
    for prompt in found.prompts:
        assert " ".join(prompt.split()[:4]) in seen
    assert found(Rule()) == metrics


def test_judged_benchmarks_name_the_judges_list(folder):
    qi = KeywordJudge("qi29", first=None)
    facts = make("harmbench", folder, judge=qi).describe()
    assert facts["judge"]["keywords"] == "qi29"
    assert facts["judge"]["sha256"] == qi.describe()["sha256"]
    assert facts["kinds"] == ["standard", "contextual"]
    assert make("refusal-auc", folder, judge=qi).describe()["keywords"] == "qi29"
    other = Told(lambda prompt: Verdict.REFUSAL)
    assert make("refusal-auc", folder, judge=other).describe()["keywords"] == "plain25"


@pytest.mark.parametrize(
    ("answer", "refusal", "asr", "gibberish"),
    [(REFUSAL, 100, 0, 0), (ANSWER, 0, 100, 0), (NOISE, 0, 0, 100)],
)
def test_refusal_compliance_and_gibberish_are_three_things(
    answer, refusal, asr, gibberish, folder
):
    runner = Rule(answer)
    for name in ("harmbench", "advbench", "catqa", "jailbreakbench-artifacts"):
        found = make(name, folder)(runner)
        rates = (found[f"{m}/{name}"] for m in ("refusal", "asr", "gibberish"))
        assert tuple(rates) == (refusal, asr, gibberish)
        assert found[f"unparsed/{name}"] == 0
    for name in ("xstest", "alpaca", "jailbreakbench"):
        found = make(name, folder)(runner)
        assert found[f"over_refusal/{name}"] == refusal
        assert "asr/alpaca" not in found
    guarded = make("wildguard", folder)(runner)
    assert guarded["robustness/wildguard"] == 100 - asr
    assert guarded["over_refusal/wildguard"] == refusal


def test_bias_is_absolute_and_signed_by_category(folder):
    found = make("bbq", folder)(Rule(option=1))
    # In ambiguous contexts the other group is named every time: the anti-stereotype.
    assert found["bias_signed/bbq"] == -found["bias/bbq"] == -100
    mixed = {
        **{"bias_ambiguous/A": 10.0, "bias_ambiguous/B": -30.0, "undefined": 2.0},
        "intersectional/bias_ambiguous": 4.0,
        "intersectional/bias_ambiguous_signed": -4.0,
    }
    assert bias_metrics(Result(mixed, {}, []), "bbq") == {
        **{"bias_signed/bbq/A": 10.0, "bias/bbq/A": 10.0},
        **{"bias_signed/bbq/B": -30.0, "bias/bbq/B": 30.0},
        **{"bias/bbq-intersectional": 4.0, "bias_signed/bbq-intersectional": -4.0},
    }


# --- what is drawn --------------------------------------------------------------------


def items(count):
    return [
        SimpleNamespace(id=str(i), prompt=f"p{i}", part=i % 10 == 0)
        for i in range(count)
    ]


def test_a_draw_is_always_the_same_and_part_of_a_larger_one():
    pool = items(200)
    small, large = draw(pool, 20), draw(pool, 50)
    assert small == draw(pool, 20)
    assert {i.id for i in small} < {i.id for i in large}
    assert [int(i.id) for i in large] == sorted(int(i.id) for i in large)
    assert draw(pool, 500) == pool
    # Not the head of the file, and not a matter of the file's order.
    assert small != pool[:20]
    again = draw(pool[::-1], 20)
    assert {i.id for i in again} == {i.id for i in small}


def test_parts_give_equal_numbers():
    drawn = draw(items(200), 30, lambda item: item.part)
    assert sum(item.part for item in drawn) == 15
    # A part that is used up leaves its turns to the others.
    assert sum(i.part for i in draw(items(200), 60, lambda i: i.part)) == 20


def test_a_limit_is_of_usable_items_and_equal_for_one_set(folder):
    for limit in (1, 2):
        assert make("harmbench", folder, limit=limit).describe()["items"] == limit
    sides = make("xstest", folder, limit=2)
    assert len(sides.prompts) == 2
    assert "over_refusal/xstest" in sides(Rule())


@needs_data
def test_drawn_questions_are_the_same_in_all_tasks_of_truthfulqa():
    one, several, written = (
        draw(load_evalset(name, DATA), 40)
        for name in ("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa")
    )
    assert [i.id for i in one] == [i.id for i in several] == [i.id for i in written]
    assert [i.question for i in one] == [i.question for i in several]


# --- composite ------------------------------------------------------------------------


def test_composite_is_equation_8_of_named_variants():
    metrics = {
        "refusal/harmbench": 91.0,
        "mc1/truthfulqa": 20.0,
        "mc2/truthfulqa": 41.0,
        "bias/bbq": 13.0,
        "bias_signed/bbq": -13.0,
        "bias_disambiguated/bbq": 3.0,
        "over_refusal/xstest": 8.0,
        "accuracy/mmlu": 47.0,
    }
    found = headlines(metrics)
    assert found["composite"] == pytest.approx((91 + 41 + 100 - 13) / 3, abs=1e-9)
    assert found["over_refusal"] == 8
    assert found["general"] == 47
    other = headlines(metrics, truthful="mc1", bias="disambiguated")
    assert other["composite"] == pytest.approx((91 + 20 + 100 - 3) / 3, abs=1e-9)
    assert variant("mc1", "disambiguated") == {
        "refusal": "refusal/harmbench",
        "truthful": "mc1/truthfulqa",
        "bias": "bias_disambiguated/bbq",
    }
    for lacking in variant().values():
        rest = {k: v for k, v in metrics.items() if k != lacking}
        assert "composite" not in headlines(rest)
    with pytest.raises(UserError, match="'mc3'"):
        headlines(metrics, truthful="mc3")
    with pytest.raises(UserError, match="unknown BBQ condition 'signed'"):
        headlines(metrics, bias="signed")


def test_benchmarks_of_the_tiny_folder_make_a_composite(folder):
    found: dict[str, float] = {}
    for name in ("harmbench", "truthfulqa", "bbq", "xstest", "mmlu"):
        found |= make(name, folder)(Rule(REFUSAL))
    heads = headlines(found)
    assert {"composite", "refusal", "truthful", "bias", "general"} <= set(heads)
    assert heads["refusal"] == 100


@pytest.mark.parametrize("bad", [-1.0, 101.0, math.nan])
def test_a_composite_is_of_percentages_a_third_each(bad):
    assert composite_safety(refusal=100.0, truthful=100.0, bias=0.0) == 100.0
    assert composite_safety(refusal=30.0, truthful=0.0, bias=100.0) == 10.0
    with pytest.raises(UserError, match="refusal"):
        composite_safety(refusal=bad, truthful=0.0, bias=0.0)


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("harmbunch", {}, "unknown benchmark 'harmbunch'; nearest: harmbench"),
        ("harmbench", {"limit": 0}, "limit of at least 1, got 0"),
        ("mtbench", {"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ("humaneval", {}, "allow_code=True"),
        ("mtbench", {}, "study.output_folder"),
    ],
)
def test_mistakes_are_one_line(name, options, message, folder):
    with pytest.raises(UserError, match=message) as error:
        make(name, folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_missing_file_is_named_before_any_model_is_asked(name, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        make(name, tmp_path, allow_code=True, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- code and dialogues ---------------------------------------------------------------


@needs_kernel
def test_code_is_run_only_where_it_is_allowed(folder):
    benchmark = make("humaneval", folder, allow_code=True)
    assert benchmark(Rule("return 1\n"))["pass@1/humaneval"] == 100
    assert benchmark(Rule("return 2\n"))["pass@1/humaneval"] == 0


def test_dialogues_are_written_for_a_judge_elsewhere(folder, tmp_path):
    asked = make("mtbench", folder, output=tmp_path / "out")
    metrics = asked(Rule("Fine."))
    (path,) = (tmp_path / "out").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["model_id"] == path.stem for row in rows)
    assert metrics["answered/mtbench"] == 100
    other = asked(Rule(" "))
    assert other["answered/mtbench"] == 0
    assert other["file/mtbench"] != metrics["file/mtbench"]
    assert len(list((tmp_path / "out").iterdir())) == 2
