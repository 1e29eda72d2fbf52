"""Files of a run that were changed after it: one line that names them, and what to do.

They are valid JSON here; what is cut short is in `test_command_line.py`.
"""

import json

import numpy as np
import pytest
import synthetic_run

from sbr_jax.programs import report
from sbr_jax.reporting.runs import read_run
from sbr_jax.training.records import digest_of, write_record
from sbr_jax.training.run_folder import RunFolder, run_of
from sbr_jax.training.stage_records import Line, read_result, unusable, write_result
from sbr_jax.typing import UserError

CONFIG = {"training": {}}
RUN = run_of(CONFIG)
LINE = vars(Line("plain", 0, "train", "legal", 0, {"loss": 0.1}))


def refused(call):
    """The one line of a refusal."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def rewrite(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- a finished stage -----------------------------------------------------------------

RECORD = {
    "line": LINE,
    "timing": {},
    "run": RUN,
    "place": "plain/0/01-train",
    "files": {},
}
RECORDS = {
    "nothing": ({}, "expected a digest in"),
    "unsealed": (RECORD, "expected a digest in"),
    "edited": (
        {**RECORD, "timing": {"seconds": 1}, "digest": digest_of(RECORD)},
        "it was changed after it was written",
    ),
    "of another run": ({**RECORD, "run": "q"}, "found one of another run"),
    "of another seed": ({**RECORD, "place": "plain/1/01-train"}, "that of plain/1/01"),
}


@pytest.fixture
def folder(tmp_path):
    write_record(tmp_path / "config.json", CONFIG)
    return RunFolder(tmp_path)


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_stage_is_named(name, folder):
    record, named = RECORDS[name]
    path = folder.stage("plain", 0, 1, "train") / "result.json"
    path.parent.mkdir(parents=True)
    if name.startswith("of"):
        write_record(path, record)
    else:
        path.write_text(json.dumps(record))

    def open_again():
        with folder.opened(CONFIG, {}):
            pytest.fail("work would begin")

    readers = (
        lambda: read_result(path.parent, RUN),
        lambda: folder.lines(()),
        open_again,
    )
    for reader in readers:
        said = refused(reader)
        assert str(path) in said
        assert named in said
        seed = path.parent.parent
        assert said.endswith(f": delete {seed} and run the same command again")


def test_what_a_run_writes_is_in_order(folder):
    path = folder.stage("plain", 0, 1, "train")
    alpha = {"alpha": {"q_proj": np.ones((2, 3))}, "auroc": np.float32(0.5)}
    metrics = {"loss": np.nan, "blocks": 1, "rate": np.float32(1 / 3)}
    line = Line("plain", 0, "train", "legal", 0, metrics, alpha)
    written = write_result(path, RUN, line, {"seconds": 1.5, "seconds_per_step": None})
    rounded = {"loss": None, "blocks": 1, "rate": 0.333333}
    assert written["line"]["metrics"] == rounded
    assert folder.lines(()) == [written] == [read_result(path, RUN)]
    assert read_result(folder.folder, RUN) is None


def test_a_line_that_no_run_writes_is_named():
    assert unusable(LINE) == []
    assert unusable([])[0] == "method"
    wrongs = {"seed": "0", "metrics.loss": "low", "diagnostics.alpha": {"q": ["a"]}}
    for name, value in wrongs.items():
        key, _, inner = name.partition(".")
        wrong = {**LINE, key: {inner: value} if inner else value}
        assert unusable(wrong)[0] == name


# --- the files of a run ---------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    return synthetic_run.write(tmp_path / "run", ("plain",), seeds=(0,))


def with_value(path, place, change):
    lines = lines_of(path)
    change(lines[place])
    rewrite(path, lines)


def composite(value):
    return lambda line: line["metrics"].update(composite=value)


WRONG = {
    "text": ("results", 2, composite("98.9"), "metrics.composite"),
    "time": (
        "timings",
        0,
        lambda x: x.update(seconds_per_step="x"),
        "seconds_per_step",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_is_none_is_named(name, finished):
    file, place, change, key = WRONG[name]
    path = finished / f"{file}.jsonl"
    with_value(path, place, change)
    said = refused(lambda: read_run(finished))
    assert f"in line {place + 1} of {path}, " in said
    assert f" usable {key}: run the same command again" in said


def test_a_metric_that_was_not_finite_is_none_that_is_damaged(finished):
    with_value(finished / "results.jsonl", 2, composite(None))
    assert not read_run(finished).metric("plain", "composite").size
    assert read_run(finished).metric("plain", "refusal").size


@pytest.mark.parametrize("stages", [("base",), ("train", "repair", "evaluate")])
def test_a_report_bears_what_was_not_finite(stages, tmp_path):
    run = synthetic_run.write(tmp_path / "run", ("plain", "safeanchor"), seeds=(0,))
    path = run / "results.jsonl"
    lines = lines_of(path)
    for line in (line for line in lines if line["stage"] in stages):
        line["metrics"] = dict.fromkeys(line["metrics"])
    rewrite(path, lines)
    assert report.main([str(run), "--quiet"]) == 0
    assert "safeanchor" in (run / "report.md").read_text()


@pytest.mark.parametrize(("key", "value"), [("settings", None), ("attack", "poison")])
def test_a_config_of_another_shape_is_named(key, value, finished):
    path = finished / "config.json"
    path.write_text(json.dumps({"settings": {}, "attack": {}, key: value}))
    said = refused(lambda: read_run(finished))
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
        advice = f"run the same experiments.{program} command again, which continues"
        assert refused(lambda: read_run(finished)).endswith(advice)


# --- lines and the stages that they are of --------------------------------------------


def with_stages(path, variants=("plain", "ewc")):
    """A made-up run, and the stages that its lines and times are of."""
    synthetic_run.write(path, variants, seeds=(0, 1))
    write_record(path / "config.json", CONFIG)
    folder, numbers = RunFolder(path), {}
    for line in lines_of(path / "results.jsonl"):
        of = line["method"], line["seed"]
        numbers[of] = numbers.get(of, -1) + 1
        place = folder.stage(*of, numbers[of], line["stage"])
        write_result(place, RUN, Line(**line))
    folder.publish(variants)
    return path / "results.jsonl"


EDITED = {
    "a metric": (lambda x: x[2]["metrics"].update(composite=99.0), "line 3 of"),
    "a diagnostic": (lambda x: x[3]["diagnostics"].update(a=1), "line 4 of"),
    "a seed": (lambda x: x[1].update(seed=7), "line 2 of"),
    "the first gone": (lambda x: x[1:], "00-base/result.json"),
    "the last gone": (lambda x: x[:-1], "after line 24 of"),
    "one twice": (lambda x: [*x, x[-1]], "line 26 of"),
    "two exchanged": (lambda x: [x[0], x[2], x[1], *x[3:]], "line 2 of"),
}


def edit(path, name):
    change, named = EDITED[name]
    lines = lines_of(path)
    rewrite(path, change(lines) or lines)
    return named


@pytest.mark.parametrize("name", EDITED)
def test_lines_that_are_not_those_of_the_stages_are_named(name, tmp_path):
    path = with_stages(tmp_path / "run")
    assert read_run(path.parent).methods == ["plain", "ewc"]
    named = edit(path, name)
    said = refused(lambda: read_run(path.parent))
    assert named in said
    assert str(path) in said
    assert said.endswith(": run the same command again, which writes the file anew")
    RunFolder(path.parent).publish(("plain", "ewc"))
    assert read_run(path.parent).methods == ["plain", "ewc"]


def test_a_copy_an_old_run_and_one_under_way_are_reported(tmp_path):
    path = with_stages(tmp_path / "run")
    folder, whole = path.parent, path.read_bytes()
    times = folder / "timings.jsonl"
    # A variant is published when all of its seeds are finished.
    for file in (path, times):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:13]))
    assert read_run(folder).methods == ["plain"]
    path.write_bytes(whole)
    edit(path, "a metric")
    (folder / "stages").rename(tmp_path / "stages")
    assert read_run(folder).methods == ["plain", "ewc"]
    (tmp_path / "stages").rename(folder / "stages")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert read_run(folder).methods == ["plain", "ewc"]
