"""The command line: every preset builds and runs, every mistake is one clear line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_stories
from safetensors.numpy import load_file, save_file

from experiments import cli, configs, report, run
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.training.settings import Settings

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
    module = sys.modules[f"experiments.configs.{configs.MODULES[name]}"]
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


BAD = {
    "no preset": ([], "expected a preset, got none"),
    "preset": (["demmo", "--workdir", "W"], "unknown preset 'demmo'; nearest: demo"),
    "no workdir": (["demo"], "add --workdir runs/demo"),
    "empty workdir": (["demo", "--workdir", ""], "add --workdir runs/demo"),
    "method": (["demo", "--methods", "plan"], "unknown method 'plan'; nearest: plain"),
    "ablation": (
        ["demo", "--methods", "safeanchor-exact:no-anchr"],
        "nearest: safeanchor-exact:no-anchor",
    ),
    "domain": (
        ["demo", "--domains", "medcal"],
        "unknown domain 'medcal'; nearest: med",
    ),
    "domain twice": (["demo", "--domains", "code", "code"], "got 'code' twice"),
    "seed": (["demo", "--seed", "x"], "--seed"),
    "negative seed": (["demo", "--seed", "-1"], "seed"),
    "flag": (["demo", "--sede", "1"], "Unrecognized options: --sede"),
    "mesh": (["demo", "--mesh", "fsdp"], "expected axis=size pairs"),
    "big mesh": (["demo", "--mesh", "fsdp=999"], "needs 999 devices"),
    "setting": (["demo", "--set", "step=2"], "unknown option of --set 'step'"),
    "no value": (["demo", "--set", "batch_size"], "expected KEY=VALUE"),
    "type": (["demo", "--set", "batch_size=two"], "expected a value of int"),
    "range": (["demo", "--set", "batch_size=0"], "at least 1, got 0"),
    "scope": (["demo", "--set", "plan.x=1"], "unknown scope of --set 'plan'"),
    "rank cap 0": (["demo", "--set", "safeanchor.max_rank=0"], "max_rank"),
    "hyper-parameter": (["demo", "--set", "safeanchor.max_ran=1"], "max_rank"),
    "no such data": (["stories", "--data", "nowhere"], "a folder with data sets"),
    "no data option": (["demo", "--data", "nowhere"], "has no such option"),
    "study option": (["demo", "--set", "study.hrd=True"], "nearest: hard"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [str(workdir) if a == "W" else a for a in arguments]
    if arguments and "--workdir" not in arguments and arguments != ["demo"]:
        arguments += ["--workdir", str(workdir)]
    if arguments and arguments[0] == "stories" and "nowhere" in arguments:
        arguments[arguments.index("nowhere")] = str(tmp_path / "nowhere")
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not workdir.exists()


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


def test_an_interrupt_says_that_the_command_continues(monkeypatch, capsys):
    def interrupted(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", interrupted)
    assert run.main(["demo", "--workdir", "nowhere"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(plan):
        raise ValueError("ours")

    monkeypatch.setattr(run, "execute", broken)
    with pytest.raises(ValueError, match="ours"):
        run.main(["demo", "--workdir", "nowhere"])


def test_overrides_are_sorted_by_what_they_belong_to():
    texts = ["lora_rank=4", "study.hard=True", "safeanchor.max_rank=16", "mesh=None"]
    rows = ("plain", "safeanchor")
    found = run.parse_overrides(texts, PRESETS["testbed"], rows)
    settings, study, options = found
    assert settings["lora_rank"] == 4
    assert settings["mesh"] is None
    assert study["hard"] is True
    assert options == {"safeanchor": {"max_rank": 16}}


def test_every_setting_can_be_named_on_the_command_line():
    for field in dataclasses.fields(Settings):
        text = f"{field.name}={field.default!r}"
        settings, *_ = run.parse_overrides([text], PRESETS["demo"], ())
        assert settings[field.name] == field.default


def test_list_names_everything(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in (*PRESETS, *METHODS, *ABLATIONS, "medical", "gsm8k"):
        assert name in text


def test_a_process_fails_fast_with_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "demmo"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown preset 'demmo'; nearest: demo")


def test_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="nearest: b2"):
        cli.check_names("thing", ["b3"], ["a1", "b2"])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["safeanchor.max_rank=abc"], "max_rank"),
        (["safeanchor.max_rank=2.5"], "max_rank"),
        (["safeanchor.energy=None"], "energy"),
        (["learning_rate=1e999"], "learning_rate"),
        (["steps_per_domain=None"], "steps_per_domain"),
        (["fisher_examples=abc"], "fisher_examples"),
    ],
)
def test_values_of_a_wrong_type_are_one_line(extra, named, tmp_path, capsys):
    code = run.main(
        [
            "demo",
            "--workdir",
            str(tmp_path / "w"),
            "--methods",
            "safeanchor",
            "--set",
            *extra,
        ]
    )
    complaint = capsys.readouterr().err.strip()
    assert code == 2
    assert named in complaint
    assert len(complaint.splitlines()) == 1


def test_a_workdir_below_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code = run.main(["demo", "--workdir", str(tmp_path / "file" / "w")])
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed", str(2**32)], "expected seeds from 0 to 4294967295"),
        (["--set", "study.split=foo"], "split: expected one of test, validation"),
        (["--set", "study.model_folder=3"], "model_folder: expected a path"),
        (
            ["--methods", "adaptive-probe", "--set", "adaptive-probe.layers=9"],
            "layers: expected a list",
        ),
    ],
)
def test_more_mistakes_are_one_line(given, message, tmp_path, capsys):
    assert run.main(["testbed", "--workdir", str(tmp_path / "w"), *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_reader_that_stops_early_is_no_error():
    def program():
        raise BrokenPipeError

    out = sys.stdout
    try:
        assert cli.guarded(program, interrupted="") == cli.EXIT_PIPE
    finally:
        sys.stdout.close()
        sys.stdout = out
