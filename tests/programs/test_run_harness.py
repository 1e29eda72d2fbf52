"""lm-eval after a run, and what the report says about it and about judges."""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import checkpoints
import pytest
import synthetic_run
import tiny
import tiny_data as files
import tiny_stories
from tasks_case import Told
from tiny_data import needs_data
from tiny_preset import make_job

from sbr_jax.evaluation import KeywordJudge, Result, Verdict, benchmarks
from sbr_jax.evaluation.judges.agreement import judge_record
from sbr_jax.programs import harness, report, run
from sbr_jax.reporting import tables
from sbr_jax.reporting.runs import read_run
from sbr_jax.studies.options import Sources
from sbr_jax.training import pipeline
from sbr_jax.training.records import read_json, write_record
from sbr_jax.typing import UserError

DATA = files.DATA
JUDGE = KeywordJudge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.evalsets(files.sources(tmp_path_factory.mktemp("data")))


def test_a_judges_agreement_is_recorded_with_its_list(folder, tmp_path):
    record = judge_record(JUDGE, folder)
    ((name, found),) = record.items()
    assert name == "keyword plain25"
    assert found["settings"]["sha256"] == JUDGE.describe()["sha256"]
    # The list finds no refusal (a line break is in it), people one in two decided.
    agreement = found["agreement"]
    assert (agreement["accuracy"], agreement["kappa"]) == (50.0, 0.0)
    assert (agreement["count"], agreement["partial"]) == (10, 5)
    assert agreement["partial_refused"] == 0
    assert len(agreement["by_model"]) == 5
    assert json.loads(json.dumps(record)) == record
    (absent,) = judge_record(JUDGE, tmp_path).values()
    assert absent["agreement"] is None
    assert "not in the data folder" in absent["note"]

    class Guard:
        name: ClassVar = "llama-guard"

        def describe(self):
            return {"judge": "guard", "name": self.name, "refusal_means": "no harm"}

    ((name, found),) = judge_record(Guard(), folder).items()
    assert (name, found["agreement"]) == ("guard llama-guard", None)
    assert "harm" in found["note"]


@needs_data
def test_agreement_with_people_is_what_others_measured():
    (found,) = judge_record(JUDGE, DATA).values()
    agreement = found["agreement"]
    # 2,250 answers; below the range that plain lists reach the list is broken, above
    # it the labels leaked into it.
    assert agreement["count"] + agreement["partial"] == 2250
    for value in (agreement["accuracy"], *agreement["by_model"].values()):
        assert 80 <= value <= 96
    blind = Told(lambda prompt: Verdict.COMPLIANCE)
    (found,) = judge_record(blind, DATA).values()
    assert found["agreement"]["accuracy"] < 60
    assert found["agreement"]["kappa"] == 0


def test_the_report_shows_judges_and_lm_eval_where_there_are_any(folder, tmp_path):
    place = synthetic_run.write(tmp_path / "run")
    bare = read_run(place)
    assert tables.judge_table(bare).rows == tables.harness_table(bare).rows == ()
    config = read_json(place / "config.json")
    measured = benchmarks.prepare("harmbench", folder, judge=JUDGE)
    config |= benchmarks.record([measured], JUDGE, folder)
    (place / "config.json").write_text(json.dumps(config))
    results = [
        {"method": "base", "seed": None, "metrics": {"mmlu": 40.0}},
        {"method": "plain", "seed": 0, "metrics": {"mmlu": 30.0}},
        {"method": "plain", "seed": 1, "metrics": {"mmlu": 34.0}},
    ]
    whole = {"of": {}, "results": results}
    (place / "harness.json").write_text(json.dumps(whole))
    found = read_run(place)
    (row,) = tables.judge_table(found).rows
    assert row[:3] == ("keyword plain25", "50.0", "0.00")
    assert len(row) == len(tables.judge_table(found).head) == 10
    assert tables.harness_table(found).rows == (
        ("base", "1", "40.0"),
        ("plain", "2", "32.0 ± 2.8"),
    )
    assert report.main([str(place), "--quiet"]) == 0
    for name in ("report.html", "report.md"):
        text = (place / name).read_text()
        assert "How far the judges agree with people" in text
        assert "Under lm-eval" in text


# --- lm-eval --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a row that ships what it trained, and one that edits it."""
    study, settings = tiny.study(), tiny.config(steps_per_domain=2)
    rows, seeds, domains = ("plain", "antidote"), (0, 1), ("medical",)
    workdir = tmp_path_factory.mktemp("harness") / "run"
    pipeline.run(study, rows, seeds, workdir, settings, domains, quiet=True)
    tokenizer = SimpleNamespace(chat_template=None)
    model = dataclasses.replace(study.model, tokenizer=tokenizer)
    job = make_job("--workdir", str(workdir), "--quiet")
    job = dataclasses.replace(
        job, methods=rows, seeds=seeds, domains=domains, config=settings
    )
    return study, model, job


@pytest.fixture
def fake_harness(monkeypatch):
    """An lm-eval that picks each task's first option, and counts its calls."""
    package = ModuleType("lm_eval")
    package.__version__ = "0.0"
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    calls = []

    def evaluate(runner, tasks, **options):
        calls.append((runner, options))
        print("a progress bar", file=sys.stderr)
        picks = [{"pick": 0}] * 2
        return {t["task"]: Result({"acc,none": 0.25}, {}, picks) for t in tasks}

    monkeypatch.setattr("sbr_jax.evaluation.harness.evaluate_with_harness", evaluate)
    return calls


def bias_items():
    row = dict(biased=0, unknown=2, correct=2, category="Age", ambiguous=True)
    return [SimpleNamespace(id=str(i), **row) for i in range(2)]


def test_every_row_is_put_through_the_harness_once(finished, fake_harness, capsys):
    study, model, job = finished
    study = dataclasses.replace(study, model=model)
    tasks = {
        "mmlu": harness.Task([], [{"task": "mmlu_a"}, {"task": "mmlu_b"}]),
        "bbq": harness.Task(bias_items(), [{"task": "bbq"}]),
    }
    path = harness.evaluate(job, study, tasks)
    # Quiet, and lm-eval's progress bars are not ours to print.
    assert capsys.readouterr().err == ""
    whole = read_json(path)
    assert whole["of"]["items"] == {"mmlu": 0, "bbq": 2}
    names = [(entry["method"], entry["seed"]) for entry in whole["results"]]
    assert names == [
        ("base", None),
        ("plain", 0),
        ("plain", 1),
        ("antidote", 0),
        ("antidote", 1),
    ]
    expected = {"mmlu": 25.0, "bbq": 25.0, "bbq_bias": 100.0}
    assert all(entry["metrics"] == expected for entry in whole["results"])
    assert len(fake_harness) == 5
    assert fake_harness[0][1]["apply_chat_template"] is False
    # Another call finds everything done; one entry less is one evaluation more.
    harness.evaluate(job, study, tasks)
    assert len(fake_harness) == 5
    write_record(path, {**whole, "results": whole["results"][:-1]})
    harness.evaluate(job, study, tasks)
    assert len(fake_harness) == 6
    assert read_json(path) == whole
    with pytest.raises(UserError, match="holds other tasks"):
        harness.evaluate(job, study, {"bbq": tasks["bbq"]})
    # Neither an edited score nor the file of another run is gone on from.
    path.write_text(path.read_text().replace("25.0", "26.0"))
    with pytest.raises(UserError, match=r"delete .* and run the same command again"):
        harness.evaluate(job, study, tasks)
    write_record(path, {**whole, "of": {**whole["of"], "run": "another"}})
    with pytest.raises(UserError, match="holds other tasks, items or weights"):
        harness.evaluate(job, study, tasks)


def ran(*more, data=None):
    data = [] if data is None else ["--data", str(data)]
    return run.main(["stories", "--workdir", "w", *data, "--quiet", *more])


def test_without_lm_eval_the_flag_is_refused(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def refused(*more, **options):
        assert ran(*more, **options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'sbr_jax[eval]'" in refused("--harness", data=folder)
    assert list(tmp_path.iterdir()) == []


def test_the_tasks_of_the_flag_are_read_from_the_data_folder(folder, finished):
    pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    sources = Sources(data=str(folder))
    job = dataclasses.replace(finished[2], sources=sources, workdir=folder / "none")
    found = harness.read(job, (), 1)
    assert list(found) == list(harness.TASKS)
    assert {len(task.items) for task in found.values()} == {1}


@checkpoints.needs_stories
# The harness and what it imports warn about themselves.
@pytest.mark.filterwarnings("ignore")
def test_a_run_with_the_flag_ends_in_a_table_of_lm_evals(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    data = files.evalsets(tiny_stories.save_data(tmp_path / "data"))
    sizes = {"calibration": 8, "train": 8, "held_out": 4, "max_length": 64}
    command = [
        *("stories", "--data", str(data), "--workdir", str(tmp_path / "run")),
        *("--model", str(checkpoints.STORIES / "hf")),
        *("--methods", "plain", "--seed", "0", "--domains", "gsm8k", "--quiet"),
        *("--training.steps-per-domain=2", "--training.lora-rank=2"),
        *(f"--study.{key.replace('_', '-')}={x}" for key, x in sizes.items()),
        *("--harness", "--harness-limit", "1"),
    ]
    assert run.main(command) == 0
    assert capsys.readouterr().err == ""
    path = tmp_path / "run" / "harness.json"
    whole = read_json(path)
    assert whole["of"]["items"] == dict.fromkeys(harness.TASKS, 1)
    rows = {(row["method"], row["seed"]): row for row in whole["results"]}
    assert set(rows) == {("base", None), ("plain", 0)}
    for row in rows.values():
        assert set(row["metrics"]) >= set(harness.TASKS)
        assert all(-100 <= value <= 100 for value in row["metrics"].values())
    # Training moved the weights that are examined: MC2 is a share of probability.
    shares = [row["metrics"]["truthfulqa_mc2"] for row in rows.values()]
    assert shares[0] != shares[1]
    # The same command finds everything done, and the report has a table of it.
    before = path.stat().st_mtime_ns
    assert run.main(command) == 0
    assert path.stat().st_mtime_ns == before
    assert report.main([str(tmp_path / "run"), "--quiet"]) == 0
    assert "Under lm-eval" in (tmp_path / "run" / "report.md").read_text()
