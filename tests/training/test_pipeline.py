"""The sequence of domains: resumable to the same bytes, repaired by the rule."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pipeline_child
import pytest
import run_folder_case
import tiny
from run_folder_case import read, results

from sbr_jax import distributed
from sbr_jax.data.batches import TokenDataset
from sbr_jax.studies import attacks
from sbr_jax.training import stages, track
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.study import Domain, check_sizes
from sbr_jax.typing import UserError

CHILD = Path(__file__).parents[1] / "pipeline_child.py"
CSM = "safeanchor-exact:csm-only"
go = functools.partial(
    run_folder_case.go,
    variants=("plain",),
    domains=("medical",),
    steps_per_domain=6,
    checkpoint_every=None,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of the child's job."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline_child.main(folder)
    return folder


SCORES = types.SimpleNamespace(left=[])
"""What a probe gives, one after the other."""
PROBED = tiny.study(probe=lambda base, adapter: SCORES.left.pop(0))


# --- what a run leaves ----------------------------------------------------------------


def test_results_are_complete_and_in_order(whole):
    lines = read(whole)
    assert lines[0]["method"] == "base"
    assert lines[0]["stage"] == "base"
    found = [(x["method"], x["seed"], x["stage"], x["domain"]) for x in lines[1:]]
    per_seed = [("subspace", None)] + [
        (stage, domain)
        for domain in ("medical", "legal")
        for stage in ("train", "subspace", "evaluate")
    ]
    assert found == [
        (variant, seed, *stage)
        for variant in pipeline_child.VARIANTS
        for seed in (0, 1)
        for stage in per_seed
    ]
    assert b"second" not in results(whole)
    assert b"NaN" not in results(whole)
    diagnostics = lines[-2]["diagnostics"]
    assert set(diagnostics["alpha"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    times = (whole / "timings.jsonl").read_text().splitlines()
    assert len(times) == len(lines)
    assert "seconds_per_step" in json.loads(times[2])
    # Only the newest checkpoints are kept.
    kept = (whole / "stages/plain/0").glob("*/adapter")
    assert [path.parent.name for path in kept] == ["05-train"]
    assert not list(whole.glob("stages/**/partial-*"))


def test_summary_has_the_promised_form(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) == {"base", "methods"}
    assert list(summary["methods"]) == pipeline_child.VARIANTS
    row = summary["methods"]["plain"]
    wanted = {"seeds", "trajectory", "composite", "composite_std", "retention"}
    wanted |= {"refusal", "domain_accuracy", "domain_accuracy_learned", "general"}
    assert wanted | {"seconds_per_step"} <= set(row)
    assert row["seeds"] == [0, 1]
    assert list(row["trajectory"]) == ["base", "medical", "legal"]
    lines = [
        x for x in read(whole) if x["method"] == "plain" and x["stage"] == "evaluate"
    ]
    ended = [x["metrics"] for x in lines if x["domain"] == "legal"]
    last = [metrics["composite"] for metrics in ended]
    learned = [x["metrics"][f"accuracy/{x['domain']}"] for x in lines]
    final = [m[f"accuracy/{domain}"] for m in ended for domain in ("medical", "legal")]
    base = summary["base"]["composite"]
    assert row["composite"] == pytest.approx(np.mean(last), rel=1e-5)
    assert row["composite_std"] == pytest.approx(np.std(last, ddof=1), rel=1e-4)
    assert row["retention"] == pytest.approx(100 * np.mean(last) / base, rel=1e-5)
    assert row["domain_accuracy_learned"] == pytest.approx(np.mean(learned), rel=1e-5)
    assert row["domain_accuracy"] == pytest.approx(np.mean(final), rel=1e-5)


# --- stopping and going on ------------------------------------------------------------


class StopError(Exception):
    """Stands for a crash."""


@pytest.mark.thorough
def test_a_crash_at_every_stage_boundary_changes_nothing(whole, tmp_path, monkeypatch):
    # Dies right before every other result, and before every third checkpoint's end.
    calls = {"n": 0, "alive": 0}
    original = stages.write_result

    def dying(*args, **options):
        calls["n"] += 1
        if calls["n"] % 2:
            raise StopError
        calls["alive"] += 1
        return original(*args, **options)

    def dying_save(save, folder, tree):
        save(folder, tree)
        calls["n"] += 1
        if calls["n"] % 3 == 0:
            raise StopError

    monkeypatch.setattr(stages, "write_result", dying)
    for place, name in ((stages.checkpoint, "save"), (stages.snapshot, "write")):
        save = functools.partial(dying_save, getattr(place, name))
        monkeypatch.setattr(place, name, save)
    for _ in range(300):
        with contextlib.suppress(StopError):
            pipeline_child.main(tmp_path, seeds=(0,))
            break
    else:
        pytest.fail("never finished")
    assert calls["alive"] > 10
    lines = results(whole).splitlines(keepends=True)
    expected = b"".join(x for x in lines if json.loads(x)["seed"] in (None, 0))
    assert results(tmp_path) == expected


def test_kill_9_and_rerun_give_the_same_bytes(whole, tmp_path):
    rng = random.Random(os.getpid())
    child = subprocess.Popen([sys.executable, str(CHILD), str(tmp_path)])
    deadline, stage = time.monotonic() + 120, 2 + rng.randrange(6)
    # Importing takes seconds: wait for the first stages, then a random while.
    while len(list(tmp_path.glob("stages/*/*/*"))) <= stage:
        if child.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    time.sleep(rng.random() * 0.5)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    pipeline_child.main(tmp_path)
    assert results(tmp_path) == results(whole)


def test_a_finished_run_computes_nothing(whole, monkeypatch):
    before = results(whole)

    def never(*args, **options):
        pytest.fail("computed something")

    monkeypatch.setattr(stages, "write_result", never)
    monkeypatch.setattr(track, "load", never)
    pipeline_child.main(whole)
    assert results(whole) == before


@pytest.mark.thorough
def test_other_variants_seeds_and_hardware_continue_a_folder(tmp_path):
    go(tmp_path, seeds=(1,))
    go(tmp_path, seeds=(0,), log_every=1, checkpoint_every=3)
    seeds = [x["seed"] for x in read(tmp_path) if x["stage"] == "evaluate"]
    assert seeds == [0, 1]
    before = results(tmp_path)
    go(tmp_path, seeds=(0,), log_every=1)
    assert results(tmp_path) == before
    go(tmp_path, variants=("lisa",))
    assert {x["method"] for x in read(tmp_path)} == {"base", "plain", "lisa"}


def test_mapped_seeds_agree_with_one_after_the_other(tmp_path):
    go(tmp_path / "a", seeds=(0, 1))
    go(tmp_path / "b", seeds=(0, 1), vmap_seeds="yes")
    for one, two in zip(read(tmp_path / "a"), read(tmp_path / "b"), strict=True):
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3)


# --- the monitor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "blocks"), [([95.0], 0), ([94.0, 96.0], 1), ([10.0, 10.0, 10.0], 2)]
)
def test_repair_runs_exactly_when_the_rule_says(tmp_path, scores, blocks, monkeypatch):
    monkeypatch.setattr(SCORES, "left", [100.0, *scores])
    go(tmp_path, variants=(CSM,), study=PROBED)
    line = next(x for x in read(tmp_path) if x["stage"] == "repair")
    assert line["metrics"]["blocks"] == blocks
    assert line["metrics"]["probe"] == scores[0]
    assert line["metrics"]["probe_after"] == scores[-1]
    stage = tmp_path / "stages" / CSM.replace(":", "+") / "0/02-repair"
    assert (stage / "adapter").is_dir() == (blocks > 0)


@pytest.mark.thorough
def test_the_judge_is_asked_once_per_example_of_a_domain(tmp_path, monkeypatch):
    """Training, two repair blocks and the end of the domain share one answer."""
    asked = []

    def judge(data):
        asked.append(data.tokens.tobytes())
        return tiny.judge(data)

    # The aligned model, then each domain: found low, and low after either block.
    monkeypatch.setattr(SCORES, "left", [100.0] + 6 * [10.0])
    study = dataclasses.replace(PROBED, judge=judge)
    monitored = {"adaptive-judge": {"monitored": True}}
    go(
        tmp_path,
        variants=("adaptive-judge",),
        study=study,
        domains=None,
        options=monitored,
    )
    blocks = [x["metrics"]["blocks"] for x in read(tmp_path) if x["stage"] == "repair"]
    assert blocks == [2, 2]
    assert asked == [domain.train.tokens.tobytes() for domain in study.domains.values()]


def test_without_a_probe_nothing_is_monitored(tmp_path):
    study = tiny.study()
    object.__setattr__(study, "probe", None)
    go(tmp_path, variants=(CSM,), study=study)
    assert not [x for x in read(tmp_path) if x["stage"] == "repair"]


# --- what is refused ------------------------------------------------------------------


def never(base, adapter):
    """Stands for evaluations that must not be made."""
    pytest.fail("evaluated before everything was looked at")


def changed(**changes):
    return {"study": tiny.study(**{"probe": never, "evaluate": never, **changes})}


WIDTH = tiny.CONFIG.width
NO_ROWS = TokenDataset(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))
EMPTY = {"medical": Domain(NO_ROWS, never)}
MISTAKES = {
    "variant": ({"variants": ("plan",)}, "unknown method 'plan'; nearest: plain"),
    "domain": ({"domains": ("medicine",)}, "unknown domain 'medicine'; nearest: medi"),
    "no variant": ({"variants": ()}, "at least one method"),
    "twice": ({"seeds": (1, 1)}, "each seed once"),
    "negative": ({"seeds": (-1,)}, r"expected seed to be .*\[0, 4294967295\], got -1"),
    "seed 0 again": ({"seeds": (0, 2**32)}, r"\[0, 4294967295\], got 4294967296; oth"),
    "no whole seed": ({"seeds": (0.5,)}, "expected seed to be a whole number"),
    "rows of a mesh": ({"mesh": "fsdp=8", "batch_size": 12}, "fsdp = 8 divides, got"),
    "mapped mesh": ({"mesh": "fsdp=2", "vmap_seeds": "yes"}, "vmap_seeds"),
    "batch": ({"batch_size": 100_000}, "batch_size to be less than 128, twice the 64 "),
    "twice all": ({"batch_size": 128}, "of domain medical, got 128"),
    "rank": (
        {"lora_rank": WIDTH + 1, "lora_targets": "up_proj"},
        f"lora_rank to be at most {WIDTH}, the smaller side of up_proj, got",
    ),
    "anchors": (
        {"variants": ("sbr",), "options": {"sbr": {"anchors": 25}}},
        "anchors: expected at least 25 distinct harmful prompts, got 24",
    ),
    "no anchors": (
        {"variants": ("sbr:one",), **changed(harmful=None)},
        "requests to draw from",
    ),
    "empty calibration": (changed(calibration=NO_ROWS), "set with at least one"),
    "empty domain": (changed(domains=EMPTY), "examples in domain medical, got none"),
    "leak": (
        changed(leak_check={"calibration/probe": 3}),
        "calibration and probe share 3 prompts",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_any_work(name, tmp_path):
    given, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        go(tmp_path / "new", **{**changed(), **given})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_processes_are_asked_for_the_same_data_before_any_work(tmp_path, monkeypatch):
    def differs(what, value, remedy):
        raise UserError(f"{what}: {value}; {remedy}")

    monkeypatch.setattr(distributed, "require_same", differs)
    with pytest.raises(UserError, match="data or model: tiny; give every host the"):
        go(tmp_path / "new", **changed())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"batch_size": 127, "lora_rank": WIDTH},
        {"variants": ("sbr",), "options": {"sbr": {"anchors": 24}}},
    ],
    ids=["batch and rank", "anchors"],
)
def test_the_largest_size_that_fits_is_taken(tmp_path, given):
    def evaluated(base, adapter):
        raise StopError

    with pytest.raises(StopError):
        go(tmp_path, study=tiny.study(evaluate=evaluated), **given)


def test_attacks_with_few_examples_fit_the_default_batch():
    """The identity attack has ten, and the testbed batches of sixteen."""
    for attack in attacks.ATTACKS.values():
        if attack.examples is not None:
            domain = Domain(tiny.dataset(0, attack.examples), never)
            study = tiny.study(domains={"medical": domain})
            check_sizes(study, ["medical"], tiny.config(batch_size=16).training)


def test_a_folder_of_other_settings_is_refused_and_left_alone(whole, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    steps, options = {"steps_per_domain": 5}, pipeline_child.OVERRIDES
    for settings, named in (
        ({"steps_per_domain": 4}, "training.steps_per_domain: there 5, now 4"),
        ({"learning_rate": 1.0, **steps}, "training.learning_rate"),
        ({"domains": ("medical",), **steps}, "domains"),
    ):
        with pytest.raises(UserError, match=named):
            go(whole, **{"domains": None, "options": options, **settings})
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds summary\.json but no config"):
        go(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "mine"


def test_a_folder_in_use_is_refused(tmp_path):
    config = {"training": {}}
    with RunFolder(tmp_path).opened(config, {}):
        other = RunFolder(tmp_path).opened(config, {})
        with pytest.raises(UserError, match="in use by another run"), other:
            pass
