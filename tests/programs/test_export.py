"""Weights taken out of a run give the numbers that the run measured."""

import json
import shutil

import jax
import numpy as np
import pytest
import test_experiments
import tiny
import tiny_stories
from run_folder_case import content
from tiny_preset import CONFIG, STUDY, make_job, tiny_presets

from sbr_jax import models
from sbr_jax.models.peft import load_peft
from sbr_jax.programs import cli, export, run
from sbr_jax.training import checkpoint, pipeline
from sbr_jax.training.program import init_adapter
from sbr_jax.training.records import read_json, write_record
from sbr_jax.training.run_folder import run_of

assert tiny_presets
pytestmark = pytest.mark.usefixtures("tiny_presets")
MONITORED = "safeanchor-exact:csm-only"
# That antidote is deployed as it was evaluated is a test of `training/test_deployed`.
VARIANTS = ("plain", MONITORED, "salora", "lox")
OPTIONS = ("--methods.salora.safety-rank=4",)


@pytest.fixture(scope="module", name="whole")
def fixture_whole(tmp_path_factory):
    """A finished run of all variants, two domains, one seed."""
    folder = tmp_path_factory.mktemp("whole")
    job = make_job("--workdir", str(folder), "--methods", *VARIANTS, *OPTIONS)
    pipeline.run(
        STUDY,
        job.methods,
        job.seeds,
        job.workdir,
        job.config,
        job.domains,
        notes=job.notes(),
        quiet=True,
    )
    return folder


def command(folder, output, variant, *more):
    return [
        "tiny",
        *("--workdir", str(folder), "--variant", variant, "--seed", "3"),
        *("--output", str(output), *more),
    ]


def go(folder, output, variant, *more):
    return export.main([*command(folder, output, variant, *more), "--quiet"])


def said(capsys, *args):
    """What is said about a mistake; nothing is written."""
    assert export.main([*args, "--quiet"]) == cli.EXIT_USER
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def measured(folder, variant):
    """The composite that the run gives after its last domain."""
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    (line,) = (
        x
        for x in lines
        if (x["method"], x["stage"], x["domain"]) == (variant, "evaluate", "legal")
    )
    return line["metrics"]["composite"]


def composite(base, adapter):
    return STUDY.evaluate(base, adapter)["composite"]


# --- what is written ------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", MONITORED, "salora"])
def test_an_adapter_scores_what_the_run_measured(whole, tmp_path, variant):
    before = content(whole)
    assert go(whole, tmp_path / "out", variant, "--base-name", "owner/name") == 0
    assert content(whole) == before
    found = load_peft(tmp_path / "out", tiny.CONFIG)
    score = composite(STUDY.model.params, found)
    # Results have six digits.
    assert score == pytest.approx(measured(whole, variant), rel=1e-5)
    assert abs(score - composite(STUDY.model.params, None)) > 1e-3 * score
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "owner/name"
    if variant == "salora":  # It deploys B projected; the run keeps B as trained.
        like = init_adapter(STUDY, CONFIG, 3)
        trained = checkpoint.restore(whole / "stages/salora/3/05-train/adapter", like)
        for name, pair in trained.items():
            np.testing.assert_array_equal(found[name].lora_a, pair.lora_a)
            assert np.abs(found[name].lora_b - pair.lora_b).max() > 1e-4


@pytest.mark.parametrize("variant", ["plain", "lox"])
def test_a_merged_checkpoint_scores_what_the_run_measured(whole, tmp_path, variant):
    assert go(whole, tmp_path / "out", variant, "--merged") == 0
    model = models.load(tmp_path / "out")
    assert model.config == tiny.CONFIG
    score = composite(model.params, None)
    # W + ΔW is rounded once more than (x W) + (x A) B, in float32.
    assert score == pytest.approx(measured(whole, variant), rel=1e-4)
    assert abs(score - composite(STUDY.model.params, None)) > 1e-3 * score


# --- stages ---------------------------------------------------------------------------


def test_an_unfinished_variant_needs_a_stage_that_is_there(whole, tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "stages/plain/3/08-evaluate")
    start = command(folder, out, "plain")
    error = said(capsys, *start)
    assert "expected stage 8 to be finished" in error
    assert "07-subspace" in error
    assert "that of 05-train" in said(capsys, *start, "--stage", "4")
    assert "that of 05-train" in said(capsys, *start, "--stage", "0")
    assert go(folder, out, "plain", "--stage", "5") == 0
    assert go(whole, tmp_path / "whole", "plain") == 0
    one, two = (load_peft(x, tiny.CONFIG) for x in (out, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # An older checkpoint that lies there is not taken for one that has gone.
    shutil.copytree(
        folder / "stages/plain/3/05-train/adapter",
        folder / "stages/plain/3/01-train/adapter",
    )
    shutil.rmtree(folder / "stages/plain/3/05-train/adapter")
    start = command(folder, tmp_path / "third", "plain")
    for stage in ("5", "4"):
        assert f"delete {folder}/stages/plain/3 and" in said(
            capsys, *start, "--stage", stage
        )
    # What SaLoRA deploys depends on a state that stage 7 has replaced.
    start = command(folder, tmp_path / "other", "salora")
    assert "state" in said(capsys, *start, "--stage", "5")


# --- mistakes -------------------------------------------------------------------------


def test_mistakes_are_one_line_before_anything_is_built(
    whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export, "execute", pytest.fail)
    out = tmp_path / "out"
    start = command(whole, out, "plain")
    for change, wanted in (
        (command(whole, out, "lox"), "other base weights"),
        (start[:-2], "--output"),
        ([*start[:3], "--variant", "plane", *start[5:]], "nearest: plain"),
        ([*start[:6], "4", *start[7:]], "expected one of 3"),
        ([*start, "--stage", "2"], "expected stage 2 to be finished"),
        ([*start[:2], str(tmp_path), *start[3:]], "found no"),
        ([*start, "--unaligned", "here"], "has no such folder; drop it"),
        ([*start[:-1], str(whole)], "new or empty folder"),
    ):
        assert wanted in said(capsys, *change), wanted
    assert not out.exists()


def rewrite(folder, config):
    """Makes of a run one that had another configuration from the beginning."""
    write_record(folder / "config.json", config)
    for path in folder.rglob("result.json"):
        write_record(path, {**read_json(path), "run": run_of(config)})


def test_folders_of_other_programs_presets_and_versions_are_refused(
    whole, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    config = read_json(folder / "config.json")
    start = command(folder, tmp_path / "out", "plain")
    for change, wanted in (
        ({"attack": {"name": "poison"}}, "experiments.attack"),
        ({"study": {"split": "test"}}, "this version does not know split"),
        ({"fingerprint": "other"}, "other data or another model"),
        ({"training": {**config["training"], "odd": 1}}, "does not know odd"),
        ({"settings": {}}, "got one of an older"),
    ):
        rewrite(folder, {**config, **change})
        assert wanted in said(capsys, *start)
    rewrite(folder, {k: v for k, v in config.items() if k != "domains"})
    assert "expected domains" in said(capsys, *start)
    # What a preset cannot do without is asked for first.
    start[0] = "llama2-7b"
    rewrite(folder, {**config, "study": {}})
    assert "expected --model FOLDER_OR_HUB_ID" in said(capsys, *start)
    assert "expected --data FOLDER" in said(capsys, *start, "--model", "M")
    assert not (tmp_path / "out").exists()


# --- a preset of the command line -----------------------------------------------------


def test_a_run_of_a_preset_is_exported(tmp_path, capsys):
    data = tiny_stories.save_data(tmp_path / "data")
    model = tiny_stories.save_model(tmp_path / "model")
    folders = ["--data", str(data), "--model", str(model)]
    workdir = tmp_path / "run"
    rows = ("--methods", "plain", "--domains", "gsm8k", "--seed", "0")
    arguments = test_experiments.command(["stories", *folders], workdir, *rows)
    assert run.main(arguments) == 0
    start = ["stories", "--workdir", str(workdir), "--variant", "plain", "--seed", "0"]
    out = tmp_path / "out"
    assert export.main([*start, *folders, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "adapter of plain, seed 0, after gsm8k (stage 04-evaluate)" in text
    assert str(out) in text
    raw = json.loads((out / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(model)
    assert raw["r"] == 2
    base = models.load(model)
    pairs = load_peft(out, base.config)
    assert any(np.any(pair.lora_b) for pair in pairs.values())
    merged = tmp_path / "merged"
    start += ["--merged", "--output", str(merged)]
    assert export.main([*start, *folders, "--quiet"]) == 0
    found = models.load(merged)
    wanted = models.merge_adapter(base.params, pairs)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted)
    assert found.tokenizer("w3 w5").input_ids == base.tokenizer("w3 w5").input_ids
    # Another model is not the run's.
    other = models.make_model(base.config, wanted, base.tokenizer)
    models.save(tmp_path / "other", other)
    shutil.rmtree(merged)
    folders[-1] = str(tmp_path / "other")
    assert "another model" in said(capsys, *start, *folders)
