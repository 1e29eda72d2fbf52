"""The attack's command line: mistakes, sizes, and the files of a short run."""

import dataclasses
import json

import pytest

from sbr_jax import recipes as configs
from sbr_jax.programs import attack as program
from sbr_jax.studies import attacks as studies
from sbr_jax.studies import testbed
from sbr_jax.typing import UserError

QUICK = (
    "steps_per_domain=2",
    "batch_size=4",
    "repair_steps=2",
    "lora_rank=2",
    "study.calibration_examples=16",
)

BAD = {
    "no preset": ([], "expected a preset, got none"),
    "preset": (["testbd", "--workdir", "W"], "unknown preset 'testbd'; nearest: testb"),
    "stories": (["stories", "--workdir", "W"], "unknown preset 'stories'"),
    "no workdir": (["testbed", "--attack", "poison"], "add --workdir runs/poison"),
    "no attack": (["testbed", "--workdir", "W"], "expected an attack, got none"),
    "attack": (["poisn"], "unknown attack 'poisn'; nearest: poison"),
    "ratio": (["poison", "--ratio", "1.5"], "ratio: expected a number from 0 to 1"),
    "ratio text": (["poison", "--ratio", "x"], "--ratio"),
    "examples": (["poison", "--examples", "0"], "examples: expected at least 1"),
    "many examples": (
        ["poison", "--examples", "99999999"],
        "--examples: expected at most 100000, got 99999999",
    ),
    "epochs": (["poison", "--epochs", "0"], "epochs: expected at least 1, got 0"),
    "epochs and steps": (
        ["poison", "--epochs", "2", "--set", "steps_per_domain=2"],
        "got both",
    ),
    "no data": (["ablation", "--ratio", "0.1"], "has no training data of its own"),
    "no epochs": (["jailbreak", "--epochs", "50"], "has no training data of its own"),
    "no search": (["poison", "--steps", "5"], "--steps: the attack 'poison' searches"),
    "search": (["gcg", "--suffix-length", "0"], "--suffix-length: expected at least 1"),
    "no poison": (["gcg", "--ratio", "0.1"], "has no training data of its own"),
    "method": (["poison", "--methods", "plan"], "unknown method 'plan'; nearest"),
    "seed": (["poison", "--seed", "-1"], "expected seeds from 0 to 4294967295, got -1"),
    "seed twice": (["poison", "--seed", "1", "1"], "expected each seed once"),
    "flag": (["poison", "--rato", "1"], "Unrecognized options: --rato"),
    "setting": (["poison", "--set", "step=2"], "unknown option of --set 'step'"),
    "study option": (["poison", "--set", "study.hrd=True"], "nearest: hard"),
    "hyper-parameter": (
        ["poison", "--methods", "safeanchor", "--set", "safeanchor.max_ran=1"],
        "max_rank",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    if arguments and "--workdir" not in arguments and arguments[0] != "testbed":
        arguments = ["testbed", "--workdir", workdir, "--attack", *arguments]
    arguments = [workdir if a == "W" else a for a in arguments]
    assert program.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_epochs_become_steps():
    common = {"preset": "testbed", "workdir": "w", "attack": "poison"}
    plan = program.make_plan(program.Arguments(**common, epochs=50, examples=100))
    size = configs.load("testbed").settings["batch_size"]
    assert plan.settings.steps_per_domain == -(-50 * 100 // size)
    plan = program.make_plan(
        program.Arguments(**common, overrides=("steps_per_domain=3",))
    )
    assert plan.settings.steps_per_domain == 3
    benign = program.make_plan(
        program.Arguments(**{**common, "attack": "jailbreak"})
    ).settings
    assert (
        benign.steps_per_domain == configs.load("testbed").settings["steps_per_domain"]
    )


def test_the_largest_training_set_is_one_that_is_drawn_at_once():
    arguments = program.Arguments("testbed", "w", "poison", examples=100_000)
    assert program.make_plan(arguments).examples == 100_000
    with pytest.raises(UserError, match="expected at most 100000, got 100001; rows"):
        program.make_plan(dataclasses.replace(arguments, examples=100_001))


def test_every_attack_is_listed_and_fits_the_testbed(capsys):
    assert program.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name, attack in studies.ATTACKS.items():
        assert name in text
        assert set(attack.domains) <= set(testbed.domains.DOMAINS)
        sizes = (attack.ratio, attack.examples, attack.epochs)
        assert all(value is None for value in sizes) or None not in sizes


def test_two_steps_write_all_files_and_the_report(tmp_path):
    workdir = tmp_path / "run"
    arguments = ["testbed", "--workdir", str(workdir), "--attack", "poison"]
    arguments += ["--ratio", "0.5", "--examples", "8", "--methods", "plain"]
    arguments += ["--seed", "1", "--quiet", "--set", *QUICK]
    assert program.main(arguments) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    row = summary["methods"]["plain"]
    for metrics in (summary["base"], row):
        assert {"harmful_score", "asr", "refusal", "composite"} <= set(metrics)
        assert metrics["asr"] == metrics["harmful_score"] <= 100
        # Compliance, refusal and gibberish are all there is.
        parts = ("harmful_score", "refusal", "gibberish")
        assert sum(metrics[p] for p in parts) == pytest.approx(100, abs=1e-3)
    config = json.loads((workdir / "config.json").read_text())
    assert config["attack"] == {"name": "poison", "ratio": 0.5, "examples": 8}
    assert (workdir / "results.jsonl").read_text().count("\n") >= 4
    assert "ASR" in (workdir / "report.html").read_text()
    # Finished stages are kept, and another ratio is another run.
    before = (workdir / "results.jsonl").read_bytes()
    assert program.main(arguments) == 0
    assert (workdir / "results.jsonl").read_bytes() == before
    arguments[arguments.index("0.5")] = "0.25"
    assert program.main(arguments) == 2


def test_a_search_is_kept_by_stage_and_belongs_to_its_budget(tmp_path, monkeypatch):
    short = dataclasses.replace(studies.ATTACKS["gcg"], domains=("medical",))
    monkeypatch.setitem(studies.ATTACKS, "gcg", short)
    workdir = tmp_path / "run"
    arguments = ["testbed", "--workdir", str(workdir), "--attack", "gcg"]
    arguments += ["--steps", "1", "--suffix-length", "2", "--candidates", "4"]
    arguments += ["--prompts", "2", "--methods", "plain", "--seed", "1", "--quiet"]
    arguments += ["--set", *QUICK]
    assert program.main(arguments) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    for metrics in (summary["base"], summary["methods"]["plain"]):
        assert {"harmful_score", "refusal"} <= set(metrics)
        parts = ("asr", "refusal_gcg", "asr_gibberish")
        assert sum(metrics[p] for p in parts) == pytest.approx(100, abs=1e-3)
        assert metrics["gcg_loss_last"] <= metrics["gcg_loss_first"]
    config = json.loads((workdir / "config.json").read_text())
    budget = {"steps": 1, "suffix_length": 2, "candidates": 4, "prompts": 2}
    assert budget.items() <= config["attack"].items()
    monkeypatch.setattr(studies.prompts, "gcg", lambda *_, **__: pytest.fail("again"))
    assert program.main(arguments) == 0
    arguments[arguments.index("4")] = "5"
    assert program.main(arguments) == 2
