"""Presets: every one builds and runs, and refuses what it cannot run."""

import json
import shutil
import sys

import numpy as np
import pytest
import tiny_stories
from safetensors.numpy import load_file, save_file
from sbr_jax.training.settings import Settings

from sbr_jax import recipes as configs
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.programs import report, run

PRESETS = {name: configs.load(name) for name in configs.MODULES}
QUICK = (
    "steps_per_domain=2",
    "batch_size=4",
    "repair_steps=2",
    "lora_rank=2",
    "fisher_examples=8",
)
SMALL = (
    "study.calibration=8",
    "study.train=16",
    "study.held_out=8",
    "study.max_length=16",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments that put the preset stories on a random model and made-up text."""
    folder = tmp_path_factory.mktemp("tiny")
    data = tiny_stories.save_data(folder / "data")
    model = tiny_stories.save_model(folder / "model")
    return ["stories", "--data", str(data), "--model", str(model)]


def command(start, workdir, *more, sets=(*QUICK, *SMALL)):
    return [*start, "--workdir", str(workdir), *more, "--quiet", "--set", *sets]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run of two rows."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    rows = ("--domains", "gsm8k", "alpaca", "--seed", "0")
    arguments = command(
        tiny,
        workdir,
        *rows,
        *("--methods", "plain", "safeanchor-exact"),
        sets=(*QUICK, *SMALL, "safeanchor-exact.max_rank=16"),
    )
    assert run.main(arguments) == 0
    return arguments, workdir


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_complete(name):
    preset = PRESETS[name]
    assert preset.name == name
    assert set(preset.domains) <= set(preset.known_domains())
    assert len(preset.domains) == len(set(preset.domains)) >= 3
    assert set(preset.methods) <= {*METHODS, *ABLATIONS}
    assert len(preset.seeds) >= 3
    Settings(**preset.settings)
    module = sys.modules[f"sbr_jax.recipes.{configs.MODULES[name]}"]
    assert f"python -m experiments.run {name} --workdir" in module.__doc__
    assert "Cost:" in module.__doc__
    assert "Expected:" in module.__doc__


def test_presets_share_the_settings_calibrated_on_plain():
    same = dict(PRESETS["testbed"].settings)
    assert dict(PRESETS["demo"].settings) == same
    hard = dict(PRESETS["testbed-hard"].settings)
    assert {k for k in same if same[k] != hard[k]} <= {"learning_rate"}


@pytest.mark.parametrize("name", ["demo", "testbed-hard"])
def test_testbed_presets_run_two_steps(name, tmp_path):
    more = ("--methods", "plain", "--seed", "0", "--domains", "legal", "code")
    assert run.main(command([name], tmp_path / "run", *more, sets=QUICK)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = summary["methods"]["plain"]
    assert set(row["trajectory"]) == {"base", "legal", "code"}
    assert 0 <= row["composite"] <= 100
    assert report.main([str(tmp_path / "run"), "--quiet"]) == 0


def test_stories_runs_on_any_checkpoint_and_text(finished):
    _, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["methods"]) == {"plain", "safeanchor-exact"}
    for row in summary["methods"].values():
        assert np.isfinite(row["safety_loss"])
        assert row["loss/gsm8k"] > 0
        assert 0 <= row["domain_accuracy"] <= 100
    assert report.main([str(workdir), "--quiet"]) == 0
    text = (workdir / "report.html").read_text()
    assert "Spectrum beside a control" in text
    assert "held-out safe answers" in text


def test_no_text_of_the_data_reaches_the_results(finished):
    _, workdir = finished
    for path in workdir.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".md", ".html"):
            assert tiny_stories.MARK not in path.read_text(), path.name


def test_the_same_command_has_nothing_left_to_do(finished):
    arguments, workdir = finished
    before = snapshot(workdir / "stages")
    results = (workdir / "results.jsonl").read_bytes()
    assert run.main(arguments) == 0
    assert snapshot(workdir / "stages") == before
    assert (workdir / "results.jsonl").read_bytes() == results


def test_a_folder_of_other_settings_is_refused_untouched(finished, capsys):
    arguments, workdir = finished
    before = snapshot(workdir)
    assert run.main([*arguments, "learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate: there 0.003, now 0.5" in error
    assert error.count("\n") == 1
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("study.calibration=0",), "got none"),
        (("study.calibration_source='gsm8k'",), "share"),
        (("study.max_length=3",), "fit into max_length=3"),
        (("safeanchor-exact.max_rank=100000",), "max_rank: expected at most"),
    ],
    ids=["empty", "overlap", "too short", "rank above dimension"],
)
def test_a_study_that_cannot_be_run_is_refused(tiny, tmp_path, capsys, change, message):
    rows = ("--methods", "safeanchor-exact", "--domains", "gsm8k", "--seed", "0")
    arguments = command(tiny, tmp_path / "run", *rows, sets=(*QUICK, *SMALL, *change))
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, capsys, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny[-1], model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "model.layers.0.self_attn.q_proj.extra"
        tensors[name] = np.zeros((2, 2), np.float32)
    else:
        tensors[name] = np.zeros((3, *tensors[name].shape[1:]), np.float32)
    save_file(tensors, path)
    start = [*tiny[:-1], str(model)]
    assert run.main(command(start, tmp_path / "run", "--domains", "gsm8k")) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, capsys):
    rows = ("--methods", "plain", "--domains", "gsm8k", "--seed", "0")
    sets = (*QUICK, *SMALL, "learning_rate=1e30", "steps_per_domain=4")
    assert run.main(command(tiny, tmp_path / "run", *rows, sets=sets)) == 2
    error = capsys.readouterr().err
    assert "expected a finite loss" in error
    assert "plain" in error
    assert "gsm8k" in error
    assert error.count("\n") == 1
