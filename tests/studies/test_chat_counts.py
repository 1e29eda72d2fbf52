"""Counts of a chat study, once and under a name of its own; its forecast."""

import dataclasses
import gc
import json
import types
import weakref

import numpy as np
import pytest
import tiny_chat
from chat_case import build

from sbr_jax import recipes
from sbr_jax.costs import dry_run, estimates
from sbr_jax.costs.forecast import A100
from sbr_jax.evaluation import (
    KeywordJudge,
    benchmarks,
    harness_tasks,
    tasks,
)
from sbr_jax.evaluation.result import Result
from sbr_jax.methods import Hyperparameters
from sbr_jax.programs import run
from sbr_jax.programs.job import Job
from sbr_jax.progress import UNITS
from sbr_jax.studies.options import ChatOptions, Sources
from sbr_jax.training.config import Config
from sbr_jax.typing import UserError

# --- measurements ---------------------------------------------------------------------


class First:
    """Prefers the first option, and says what a judge of sums can read."""

    def describe(self):
        return {}

    def answers(self, prompts, **options):
        return ["6"] * len(prompts)

    def log_likelihoods(self, prompts, options):
        return [-1.0 - np.arange(len(choices)) for choices in options]


def test_a_question_of_mc2_with_one_right_option_is_mc2(tmp_path, monkeypatch):
    row = {
        "question": "Why?",
        "mc1_targets": {"right": 1, "wrong": 0},
        "mc2_targets": {"right": 1, "wrong": 0, "wronger": 0},
    }
    path = tmp_path / "truthfulqa/mc_task.json"
    path.parent.mkdir()
    path.write_text(json.dumps([row]))
    found = benchmarks.prepare("truthfulqa", tmp_path, limit=1, judge=KeywordJudge())
    metrics = found(First())
    assert metrics["mc1/truthfulqa"] == 100.0
    # e^0 of 1 + e^-1 + e^-2, in percent: a formula, so rounding alone.
    wanted = 100.0 / (1.0 + np.exp(-1.0) + np.exp(-2.0))
    assert metrics["mc2/truthfulqa"] == pytest.approx(wanted, rel=1e-9)
    item = types.SimpleNamespace(
        id="0", question="Why?", choices=("a", "b"), correct=(0,), group=""
    )
    monkeypatch.setattr(harness_tasks, "import_harness", lambda: None)
    monkeypatch.setattr(
        harness_tasks, "_choice_task", lambda name, rows, share=None: share
    )
    assert harness_tasks.truthfulqa_task([item], name="truthfulqa_mc2") is not None
    assert harness_tasks.truthfulqa_task([item]) is None
    with pytest.raises(UserError, match="metric mc1 or mc2, got 'mc3'"):
        tasks.truthfulqa_mc(First(), [item], metric="mc3")
    item.correct = (0, 1)
    with pytest.raises(UserError, match="expected one right option in every item"):
        tasks.truthfulqa_mc(First(), [item], metric="mc1")


@pytest.mark.parametrize(
    "option", [{"limit": "3"}, {"limit": True}, {"max_new_tokens": 2.5}]
)
def test_a_limit_that_is_no_whole_number_is_refused(option, tmp_path):
    with pytest.raises(UserError, match="of at least 1, got "):
        benchmarks.prepare("harmbench", tmp_path, judge=KeywordJudge(), **option)


def test_no_measurement_is_called_as_a_domains_accuracy(roomy):
    taken = {f"accuracy/{name}" for name in ChatOptions().known_domains()}
    shared = set(benchmarks.BENCHMARKS) & set(ChatOptions().known_domains())
    assert {"medqa", "legalbench", "gsm8k"} <= shared
    for name in benchmarks.BENCHMARKS:
        result = Result({"accuracy": 1.0, "accuracy/part": 1.0}, {}, [])
        assert not taken & set(benchmarks.flat(result, name))
    found = benchmarks.prepare("medqa", roomy / "data", judge=KeywordJudge())(First())
    assert list(found) == ["benchmark_accuracy/medqa"]


def test_no_measures_leave_the_domains_and_the_monitor(roomy):
    study = build(roomy, ("code",), benchmarks=())
    assert study.evaluate(None, None) == {}
    assert set(study.asked) == {"probe"}
    assert study.notes["measurements"] == {}


def test_code_is_run_once_for_the_same_weights(roomy, monkeypatch):
    runs = []

    def humaneval(runner, items, **options):
        runs.append(items)
        return Result({"pass@1": 25.0}, {}, [])

    monkeypatch.setattr(benchmarks, "kernel_isolation", lambda: True)
    monkeypatch.setattr(tasks, "humaneval", humaneval)
    study = build(roomy, ("code",), benchmarks=("humaneval",), allow_code=True)
    learnt = study.domains["code"].evaluate
    one, two, adapter = np.ones(1), np.ones(1), np.zeros(1)
    assert study.evaluate(one, adapter) == {"pass@1/humaneval": 25.0}
    assert learnt(one, adapter) == 25.0
    assert len(runs) == 1
    # Equal numbers are not the same weights.
    assert learnt(two, adapter) == 25.0
    assert len(runs) == 2
    alive = weakref.ref(two)
    del two
    gc.collect()
    assert alive() is None


# --- the forecast ---------------------------------------------------------------------


UNPROJECTED = dataclasses.replace(Hyperparameters().safeanchor, projection="none")


def forecast_of(roomy, variant, **methods):
    """A job, its study, and what a step of it costs."""
    preset = recipes.load("llama2-7b")
    options = dataclasses.replace(preset.study, **tiny_chat.SIZES)
    plan = Job(
        preset="llama2-7b",
        workdir=roomy,
        methods=(variant,),
        domains=("code",),
        seeds=preset.seeds,
        config=Config(preset.training, preset.hardware, Hyperparameters(**methods)),
        study=options,
        sources=Sources(str(roomy / "model"), str(roomy / "data")),
    )
    study = build(roomy, ("code",))
    return plan, study, estimates.load_of(plan, study)


def test_a_mesh_divides_the_hours_of_everything(roomy):
    plan, study, job = forecast_of(roomy, "safeanchor-exact:csm-only")
    one = estimates.variant_seconds(plan, study, job, A100, "safeanchor")
    eight = dry_run.on_mesh(A100, "fsdp=4,tp=2")
    shared = estimates.variant_seconds(plan, study, job, eight, "safeanchor")
    assert {"training", "Fisher", "measuring", "monitor"} < set(one)
    for part, seconds in one.items():
        # Products and bytes both go to eight devices: only rounding is left.
        assert shared[part] == pytest.approx(seconds / 8, rel=1e-9), part
    assert dry_run.on_mesh(eight, "fsdp=8") == eight
    assert dry_run.on_mesh(eight, None) == eight
    with pytest.raises(UserError, match=r"device\.count 8: expected 4, the devices"):
        dry_run.on_mesh(eight, "fsdp=4")


def test_a_dry_run_says_how_a_mesh_shares_the_work(capsys):
    assert run.main(["demo", "--dry-run", "--mesh", "fsdp=4"]) == 0
    assert "4 of them with equal shares" in capsys.readouterr().out


def test_the_start_model_is_measured_once_for_all(roomy):
    plan, study, job = forecast_of(roomy, "safeanchor-exact:csm-only")
    first, *rows, last = dry_run.time_table(plan, study, job, A100).rows
    assert first[0] == "start model, once"
    start = estimates.start_seconds(plan, study, job, A100)
    assert min(start["measuring"], start["monitor"]) > 0

    def seconds(cell):
        number, unit = cell.split()
        return float(number) * UNITS[unit]

    # Tables show three digits.
    assert seconds(first[-1]) == pytest.approx(sum(start.values()), rel=5e-3)
    whole = sum(seconds(row[-1]) for row in rows) * len(plan.seeds) + seconds(first[-1])
    assert seconds(last[-1]) == pytest.approx(whole, rel=1e-2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("row", "methods", "monitored"),
    [
        ("plain", {}, False),
        ("safeanchor-exact:csm-only", {}, True),
        ("safeanchor-exact:anchor-only", {}, False),
        ("unified:no-projection", {}, True),
        ("safeanchor", {"safeanchor": UNPROJECTED}, True),
    ],
)
def test_a_row_without_a_projection_pays_for_no_fisher(roomy, row, methods, monitored):
    plan, study, job = forecast_of(roomy, row, **methods)
    seconds = estimates.variant_seconds(plan, study, job, A100, row)
    assert "Fisher" not in seconds
    assert "Fisher" not in estimates.memory(plan, study, job)
    assert ("monitor" in seconds) == monitored
