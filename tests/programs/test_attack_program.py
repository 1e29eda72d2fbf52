"""The attack's command line: sizes, and the files of a short run."""

import dataclasses
import json

import pytest
from few_items import few_items

from sbr_jax import recipes
from sbr_jax.programs import attack as program
from sbr_jax.programs import attack_job, job
from sbr_jax.studies import attacks as studies
from sbr_jax.studies import testbed

pytestmark = pytest.mark.usefixtures(few_items.__name__)
PRESET = recipes.load("testbed")
QUICK = (
    "--training.steps-per-domain=2",
    "--training.batch-size=4",
    "--training.repair-steps=2",
    "--training.lora-rank=2",
    "--study.calibration-examples=16",
)


def attacked(*words):
    words = ("--workdir", "w", *words)
    kind = attack_job.AttackArguments
    arguments = job.parse_preset(kind, PRESET, words, "tests")
    return attack_job.make_attack(PRESET, arguments, words)


def test_epochs_become_steps():
    found = attacked("--attack", "poison", "--epochs", "50", "--examples", "100")
    size = PRESET.training.batch_size
    assert found.config.training.steps_per_domain == -(-50 * 100 // size)
    said = attacked("--attack", "poison", "--training.steps-per-domain", "3")
    assert said.config.training.steps_per_domain == 3
    benign = attacked("--attack", "jailbreak")
    assert benign.config.training == PRESET.training
    # As much as the preset has: also that is a number of steps.
    steps = PRESET.training.steps_per_domain
    same = attacked("--attack", "poison", f"--training.steps-per-domain={steps}")
    assert same.config.training.steps_per_domain == steps
    # The largest training set is one that is drawn at once.
    assert attacked("--attack", "poison", "--examples", "100000").examples == 100_000


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
    arguments += ["--seed", "1", "--quiet", *QUICK]
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


@pytest.mark.thorough
def test_a_search_is_kept_by_stage_and_belongs_to_its_budget(tmp_path, monkeypatch):
    short = dataclasses.replace(studies.ATTACKS["gcg"], domains=("medical",))
    monkeypatch.setitem(studies.ATTACKS, "gcg", short)
    workdir = tmp_path / "run"
    arguments = ["testbed", "--workdir", str(workdir), "--attack", "gcg"]
    arguments += ["--steps", "1", "--suffix-length", "2", "--candidates", "4"]
    arguments += ["--prompts", "2", "--methods", "plain", "--seed", "1", "--quiet"]
    arguments += QUICK
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
