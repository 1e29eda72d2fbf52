"""A run's folder when something is wrong with it: told apart, told in one line."""

import functools
import json
import os
import re
import resource
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from run_folder_case import LAST, STUDY, go, refused, results, settle
from test_damaged_runs import KilledError, kill_after

from sbr_jax.settings import Training
from sbr_jax.training import checkpoint, records, stages, track
from sbr_jax.training.csm import monitor
from sbr_jax.training.finite import require_finite
from sbr_jax.training.summary import summarise
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    go(folder)
    return folder


@pytest.mark.parametrize("variant", ["plain", "safeanchor"])
def test_the_start_is_measured_first_or_when_it_is_needed(variant, tmp_path):
    for first in (True, False):
        folder = tmp_path / str(first)
        go(folder, (variant,), domains=("medical",), start_first=first)
        paths = folder.glob("stages/**/result.json")
        made = sorted((path.stat().st_mtime_ns, path.parent.name) for path in paths)
        places = [name for _, name in made]
        # The monitor compares with the start's score; without one the results need it.
        needed = places.index("02-repair") if variant == "safeanchor" else len(places)
        assert places.index("00-base") == (0 if first else needed - 1)
    assert results(tmp_path / "True") == results(tmp_path / "False")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(folder):
    """Changes one bit of the largest data file of a checkpoint."""
    path = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


# --- what a stage begins with ---------------------------------------------------------

SPOILT = {
    "no stage": lambda seed: shutil.rmtree(seed / LAST),
    "no first stage": lambda seed: shutil.rmtree(seed / "01-train"),
    "edited record": lambda seed: (seed / LAST / "result.json").write_text(
        (seed / LAST / "result.json").read_text().replace('"loss": ', '"loss": 1')
    ),
}


@pytest.mark.parametrize(
    ("spoil", "variant"),
    [("no stage", "lisa"), ("no first stage", "plain"), ("edited record", "plain")],
)
def test_a_stage_never_begins_with_another_ones_input(spoil, variant, run, finished):
    seed = run / "stages" / variant / "0"
    SPOILT[spoil](seed)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("result.json")}
    said, paths = refused(run)
    assert paths == [seed], said
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("result.json")}
    assert settle(run, results(finished)) == [said]


@pytest.mark.parametrize(
    ("what", "spoil"), [("adapter", flip), ("state", shutil.rmtree)]
)
def test_what_is_evaluated_is_what_was_trained(spoil, what, run, finished):
    seed = run / "stages/lisa/0"
    shutil.rmtree(seed / "08-evaluate")
    spoil(seed / (LAST if what == "adapter" else "07-subspace") / what)
    assert len(settle(run, results(finished))) == 1


def test_an_evaluation_that_nothing_follows_is_made_again_alone(run, finished):
    last = run / "stages/lisa/0/08-evaluate"
    cut(last / "result.json")
    assert refused(run)[1] == [last]
    cut(run / "stages/base/all/00-base/result.json")
    assert set(refused(run)[1]) == {last, run / "stages/base/all/00-base"}
    settle(run, results(finished))


def killed(folder, monkeypatch, records):
    """A run that was killed after so many records."""
    kill_after(monkeypatch, records)
    with pytest.raises(KilledError):
        go(folder)
    monkeypatch.undo()


def test_an_edited_step_of_a_history_is_noticed(tmp_path, finished, monkeypatch):
    killed(tmp_path, monkeypatch, 2)  # The start, and a checkpoint after one step.
    (path,) = tmp_path.glob("stages/plain/0/01-train/partial-*/history.json")
    history = json.loads(path.read_text())
    path.write_text(json.dumps({**history, "step": 0}))
    said, paths = refused(tmp_path)
    assert paths == [path.parent], said
    path.write_text("{half")
    assert settle(tmp_path, results(finished))


# --- whose a stage is -----------------------------------------------------------------


def test_stages_of_another_run_and_another_place_are_refused(run, tmp_path, finished):
    go(tmp_path / "other", variants=["plain"], learning_rate=3e-3)
    seed = run / "stages/plain/0"
    for source, named in (
        (tmp_path / "other/stages/plain/0", "found one of another run"),
        (run / "stages/lisa/0", "plain/0/00-subspace in .*, found that of lisa/0/00"),
    ):
        shutil.rmtree(seed)
        shutil.copytree(source, seed)
        said, paths = refused(run)
        assert re.search(named, said)
        assert paths == [seed]
    assert settle(run, results(finished))


def test_a_lost_configuration_is_written_anew_and_anothers_is_not_believed(run):
    path = run / "config.json"
    whole = path.read_bytes()
    path.unlink()
    go(run)
    assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(UserError, match=r"holds .* but no config"):
        go(run, learning_rate=3e-3)
    config = json.loads(whole)
    del config["digest"]
    config["training"]["learning_rate"] = 3e-3
    records.write_record(path, config)
    said, paths = refused(run)
    assert paths == [path], said
    path.unlink()
    go(run)
    assert path.read_bytes() == whole


def test_a_folder_of_an_older_version_is_told_apart(run):
    for path in [run / "config.json", *run.rglob("result.json")]:
        content = json.loads(path.read_text())
        del content["digest"]
        path.write_text(json.dumps(content))
    said, paths = refused(run)
    assert "written by an older version" in said
    assert "choose another folder" in said
    assert paths == [run]


# --- what is not finite ---------------------------------------------------------------


def test_a_step_that_leaves_no_weights_is_not_finished(tmp_path):
    said = r"plain, seed 0, domain medical: .*finite .*update.* at step 0"
    with pytest.raises(UserError, match=said):
        go(tmp_path, learning_rate=1e30, steps_per_domain=1)
    assert (tmp_path / "stages/plain/0/00-subspace/result.json").exists()
    assert not (tmp_path / "stages/plain/0/01-train").exists()


def test_a_state_that_is_not_finite_is_not_finished(tmp_path, finished, monkeypatch):
    killed(tmp_path, monkeypatch, 16)
    keep = tmp_path / "stages/lisa/0" / LAST / "state"
    assert keep.exists()

    def spoil(tree, where):
        require_finite(jax.tree.map(lambda x: np.full(x.shape, np.nan), tree), where)

    monkeypatch.setattr(track, "require_finite", spoil)
    with pytest.raises(UserError, match=r"lisa, .*state after subspace.*finite"):
        go(tmp_path)
    monkeypatch.undo()
    assert keep.exists()
    go(tmp_path)
    assert results(tmp_path) == results(finished)


def test_weights_that_are_not_finite_are_named():
    tree = {"a": np.ones(2, np.int32), "b": [np.float32(1), np.array([1, np.inf])]}
    with pytest.raises(UserError, match=r"here: expected finite weights.*\['b'\]\[1\]"):
        require_finite(tree, "here")
    require_finite({**tree, "b": jax.numpy.ones(2, jax.numpy.bfloat16)}, "here")


def test_a_base_model_that_is_not_finite_is_not_evaluated(tmp_path):
    params = jax.tree.map(lambda x: x, STUDY.model.params)
    leaf = jax.tree.leaves(params)[-1]
    broken = jax.tree.map(lambda x: x.at[0].set(np.nan) if x is leaf else x, params)
    study = tiny.study(model=tiny.models.make_model(tiny.CONFIG, broken))
    with pytest.raises(UserError, match="base model: expected finite weights"):
        go(tmp_path, study=study)
    assert not list(tmp_path.rglob("result.json"))


def test_a_probe_that_is_no_number_decides_nothing(tmp_path):
    study = tiny.study(probe=lambda base, adapter: np.nan)
    with pytest.raises(UserError, match="base model, probe: expected a finite score"):
        go(tmp_path, study=study)
    for scores in ([np.nan], [10.0, np.inf]):
        probe = functools.partial(lambda left, x: next(left), iter(scores))
        with pytest.raises(UserError, match="here, probe: expected a finite score"):
            monitor(0, probe, lambda x, n: x, 99.0, Training(), where="here")


def test_a_summary_bears_what_was_not_finite():
    def line(stage, domain, **metrics):
        found = {"method": "plain", "seed": 0, "stage": stage, "domain": domain}
        return {"line": {**found, "metrics": metrics}, "timing": {}}

    names = ("composite", "refusal", "accuracy/a", "domain_accuracy")
    found = [
        {"line": {"method": "base", "stage": "base", "metrics": {"composite": None}}},
        line("repair", "a", blocks=None),
        {**line("train", "a"), "timing": {"seconds_per_step": None}},
        line("evaluate", "a", **dict.fromkeys(names)),
    ]
    row = summarise([{"timing": {}, **record} for record in found], "base")["methods"]
    assert np.isnan(row["plain"]["composite"])
    assert np.isnan(row["plain"]["refusal"])
    assert np.isnan(row["plain"]["domain_accuracy"])
    assert row["plain"]["seconds_per_step"] is None


# --- where nothing can be written -----------------------------------------------------


def test_a_full_disk_is_one_line_and_loses_nothing(
    run, finished, small_files, monkeypatch
):
    shutil.rmtree(run / "stages/lisa")
    small_files(300)
    with pytest.raises(UserError, match=r"cannot write .*File too large.* kept") as e:
        go(run)
    assert "\n" not in str(e.value)
    assert not list(run.rglob(".*.tmp"))
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    usage = SimpleNamespace(free=200)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"lisa/0/.* \(No space left on device\); what"):
        go(run)
    monkeypatch.undo()
    go(run)
    assert results(run) == results(finished)


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, small_files):
    tree = jax.random.normal(jax.random.key(0), (300, 300))
    small_files(20_000)
    with pytest.raises(UserError, match=r"cannot write .*/x \(File too large\)"):
        checkpoint.save(tmp_path / "x", tree)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    checkpoint.save(tmp_path / "x", tree)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_places_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        go(tmp_path / ("x" * 300))
    with pytest.MonkeyPatch.context() as patch:

        def full(*args):
            raise OSError(28, os.strerror(28))

        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"config\.json \(No space left on"):
            go(tmp_path / "run")
    assert [path.name for path in tmp_path.glob("run/*")] == [".lock"]
    (tmp_path / "run" / "stages").touch()
    with pytest.raises(UserError, match=r"holds stages but no config"):
        go(tmp_path / "run")


# --- what a kill and a hand leave -----------------------------------------------------


def test_a_folder_that_goes_in_mid_run_is_no_success(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write, left = stages.write_result, [3]

    def removing(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(folder / "stages/plain")
        return write(*args, **options)

    monkeypatch.setattr(stages, "write_result", removing)
    with pytest.raises(UserError, match="run the same command again"):
        go(folder)


@pytest.mark.parametrize("gone", ["base", "plain"])
def test_a_row_that_goes_in_mid_run_is_no_success(gone, run, finished, monkeypatch):
    shutil.rmtree(run / "stages/lisa/0")
    write = stages.write_result

    def removing(*args, **options):
        shutil.rmtree(run / "stages" / gone, ignore_errors=True)
        return write(*args, **options)

    monkeypatch.setattr(stages, "write_result", removing)
    with pytest.raises(UserError, match=f"stages/{gone}/.*run the same command again"):
        go(run)
    monkeypatch.undo()
    go(run)
    assert results(run) == results(finished)


def test_what_a_kill_left_is_tidied(run, finished):
    seed = run / "stages/plain/0"
    (seed / LAST / "partial-00000001").mkdir()
    (seed / "09-train" / "partial-00000001" / "tree").mkdir(parents=True)
    shutil.copytree(seed / LAST / "adapter", seed / "01-train" / "adapter")
    go(run)
    assert not list(run.rglob("partial-*"))
    assert not (seed / "01-train" / "adapter").exists()
    assert results(run) == results(finished)
