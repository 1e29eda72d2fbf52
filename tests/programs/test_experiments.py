"""Runs of presets on the testbed and on text, and what they refuse."""

import json

import jax
import numpy as np
import pytest
import tiny_stories
from few_items import few_items

from sbr_jax.programs import report, run

QUICK = (
    "--training.steps-per-domain=2",
    "--training.batch-size=4",
    "--training.repair-steps=2",
    "--training.lora-rank=2",
    "--training.fisher-examples=8",
)
SMALL = (
    "--study.calibration=8",
    "--study.train=16",
    "--study.held-out=8",
    "--study.max-length=16",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments that put the preset stories on a random model and made-up text."""
    folder = tmp_path_factory.mktemp("tiny")
    data = tiny_stories.save_data(folder / "data")
    model = tiny_stories.save_model(folder / "model")
    return ["stories", "--data", str(data), "--model", str(model)]


def command(start, workdir, *more, sizes=(*QUICK, *SMALL)):
    """A quick command line; what is said in `more` replaces a size."""
    said = {word.partition("=")[0] for word in more}
    kept = (word for word in sizes if word.partition("=")[0] not in said)
    return [*start, "--workdir", str(workdir), "--quiet", *kept, *more]


@pytest.mark.usefixtures(few_items.__name__)
def test_a_testbed_preset_runs_two_steps(tmp_path):
    more = ("--methods", "plain", "--seed", "0", "--domains", "legal")
    assert run.main(command(["demo"], tmp_path / "run", *more, sizes=QUICK)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = summary["methods"]["plain"]
    assert set(row["trajectory"]) == {"base", "legal"}
    assert 0 <= row["composite"] <= 100
    assert report.main([str(tmp_path / "run"), "--quiet"]) == 0


def test_stories_runs_on_any_checkpoint_and_text(tiny, tmp_path):
    workdir = tmp_path / "run"
    more = ("--methods", "plain", "safeanchor-exact", "--domains", "gsm8k")
    rank = ("--seed", "0", "--methods.safeanchor-exact.max-rank=16")
    assert run.main(command(tiny, workdir, *more, *rank)) == 0
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
    # No text of the data reaches the results.
    for path in workdir.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".md", ".html"):
            assert tiny_stories.MARK not in path.read_text(), path.name


def test_two_processes_write_what_one_writes(tiny, tmp_path, monkeypatch):
    # Theirs would be the user's own cache; here lies what this process compiled.
    cache = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    rows = ("--methods", "plain", "--domains", "gsm8k", "--seed", "0", "1")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, jobs in ((one, "1"), (two, "2")):
        more = ("--hardware.vmap-seeds=no", "--jobs", jobs)
        assert run.main(command(tiny, folder, *rows, *more)) == 0
    assert sorted(path.name for path in two.iterdir() if path.is_dir()) == ["stages"]
    assert (two / "results.jsonl").read_bytes() == (one / "results.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--study.calibration-source=gsm8k", "share"),
        ("--study.max-length=3", "fit into max_length=3"),
    ],
    ids=["overlap", "too short"],
)
def test_a_study_that_cannot_be_run_is_refused(tiny, tmp_path, capsys, change, message):
    rows = ("--methods", "plain", "--domains", "gsm8k", "--seed", "0")
    arguments = command(tiny, tmp_path / "run", *rows, change)
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "results.jsonl").exists()
