"""Files of a run that were changed after it: one line that names them, and what to do.

They are valid JSON here; what is cut short is in `test_command_line.py`.
"""

import json

import numpy as np
import pytest
import synthetic_run

from experiments.results import read_run
from sbr_jax.training.results import Workdir, read_result, write_result
from sbr_jax.typing import UserError

LINE = {
    "method": "plain",
    "seed": 0,
    "stage": "train",
    "domain": "legal",
    "index": 0,
    "metrics": {"loss": 0.1},
    "diagnostics": {},
}


def one_line(error):
    said = str(error.value)
    assert "\n" not in said
    return said


# --- a finished stage -----------------------------------------------------------------

RECORDS = {
    "nothing": ({}, "line.method"),
    "empty parts": ({"line": {}, "timing": {}}, "line.method"),
    "line": ({"line": [], "timing": {}}, "line.method"),
    "seed": ({"line": {**LINE, "seed": "0"}, "timing": {}}, "usable line.seed;"),
    "timing": ({"line": LINE}, "usable timing;"),
    "metric": (
        {"line": {**LINE, "metrics": {"loss": "low"}}, "timing": {}},
        "usable line.metrics.loss;",
    ),
    "diagnostic": (
        {"line": {**LINE, "diagnostics": {"alpha": {"q": ["a"]}}}, "timing": {}},
        "usable line.diagnostics.alpha;",
    ),
    "seconds": ({"line": LINE, "timing": {"seconds": "2 s"}}, "timing.seconds;"),
}


def stage(folder):
    return Workdir(folder).stage("plain", 0, 1, "train")


@pytest.mark.parametrize(("record", "named"), RECORDS.values(), ids=RECORDS)
def test_a_damaged_stage_is_named(record, named, tmp_path):
    path = stage(tmp_path) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))

    def open_again():
        with Workdir(tmp_path).opened({"settings": {}}, {}):
            pytest.fail("work would begin")

    (tmp_path / "config.json").write_text('{"settings": {}}')
    readers = (
        lambda: read_result(path.parent),
        lambda: Workdir(tmp_path).lines(()),
        open_again,
    )
    for reader in readers:
        with pytest.raises(UserError) as error:
            reader()
        said = one_line(error)
        assert f"expected a stage's record in {path}, " in said
        assert named in said
        assert said.endswith("delete its folder to compute that stage again")


def test_what_a_run_writes_is_in_order(tmp_path):
    written = write_result(
        stage(tmp_path),
        method="plain",
        seed=0,
        stage="train",
        domain="legal",
        index=0,
        metrics={"loss": np.nan, "blocks": 1},
        diagnostics={"alpha": {"q_proj": np.ones((2, 3))}, "auroc": np.float32(0.5)},
        timing={"seconds": 1.5, "seconds_per_step": None},
    )
    assert written["line"]["metrics"] == {"loss": None, "blocks": 1}
    assert Workdir(tmp_path).lines(()) == [written] == [read_result(stage(tmp_path))]
    assert read_result(tmp_path) is None


# --- the files of a run ---------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    return synthetic_run.write(tmp_path / "run", ("plain",), seeds=(0,))


def change(path, number, **metrics):
    """Sets metrics of one line."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[number - 1]["metrics"] |= metrics
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("value", ["98.9", [98.9], {"mean": 98.9}])
def test_a_metric_that_is_no_number_is_named(value, finished):
    path = finished / "results.jsonl"
    change(path, 3, composite=value)
    with pytest.raises(UserError) as error:
        read_run(finished)
    said = one_line(error)
    assert f"in line 3 of {path}, " in said
    assert "without a usable metrics.composite: run the same command again" in said


def test_a_metric_that_was_not_finite_is_none_that_is_damaged(finished):
    change(finished / "results.jsonl", 3, composite=None)
    assert not read_run(finished).metric("plain", "composite").size
    assert read_run(finished).metric("plain", "refusal").size


def test_a_time_that_is_no_number_is_named(finished):
    path = finished / "timings.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, "seconds_per_step": "fast"}) + "\n")
    with pytest.raises(UserError) as error:
        read_run(finished)
    assert f"line 1 of {path}, " in one_line(error)
    assert "usable seconds_per_step: " in one_line(error)


@pytest.mark.parametrize("value", [None, "poison", ["poison"], 1])
@pytest.mark.parametrize("key", ["settings", "attack"])
def test_a_config_of_another_shape_is_named(key, value, finished):
    path = finished / "config.json"
    path.write_text(json.dumps({"settings": {}, "attack": {}, key: value}))
    with pytest.raises(UserError) as error:
        read_run(finished)
    said = one_line(error)
    assert f"expected an object as '{key}' in {path}, got {json.dumps(value)};" in said


PROGRAMS = {
    "run": {},
    "attack": {"attack": {"name": "poison"}},
    "analyse": {"analysis": "exhaustion"},
}


@pytest.mark.parametrize(("program", "more"), PROGRAMS.items(), ids=PROGRAMS)
def test_an_unfinished_run_is_continued_by_its_own_program(program, more, finished):
    (finished / "config.json").write_text(json.dumps({"settings": {}, **more}))
    path = finished / "results.jsonl"
    begun = path.read_text().splitlines()[0] + "\n"
    for write in (lambda: path.write_text(begun), path.unlink):
        write()
        with pytest.raises(UserError) as error:
            read_run(finished)
        advice = f"run the same experiments.{program} command again, which continues"
        assert one_line(error).endswith(advice)
