"""The command line of a run: every mistake is one clear line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sbr_jax.training.settings import Settings

from sbr_jax import recipes as configs
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.programs import cli, run

PRESETS = {name: configs.load(name) for name in configs.MODULES}


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
    "two meshes": (
        ["demo", "--mesh", "fsdp=1", "--set", "mesh=fsdp=2"],
        "expected one mesh, got mesh=fsdp=2",
    ),
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
        cwd=Path(__file__).parents[2],
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
