"""The sequence of domains: resumable to the same bytes, repaired by the rule."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pipeline_child
import pytest
import tiny

from sbr_jax.data.batches import TokenDataset
from sbr_jax.data.leaks import check_disjoint
from sbr_jax.training import records, results, stages
from sbr_jax.training.pipeline import run
from sbr_jax.typing import UserError

STUDY = tiny.study()
CHILD = Path(__file__).parents[1] / "pipeline_child.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of the child's job."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline_child.main(folder)
    return folder


def read(folder):
    text = (folder / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def fake_probe(scores):
    """A probe that gives the scores one after the other."""
    left = list(scores)
    return lambda base, adapter: left.pop(0)


def go(folder, study=STUDY, rows=("plain",), seeds=(0,), domains=("medical",), **more):
    config = more.pop("config", None) or tiny.config(**more.pop("settings", {}))
    config = tiny.with_options(config, more.pop("options", {}))
    return run(study, rows, seeds, folder, config, domains, quiet=True, **more)


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
        (row, seed, *stage)
        for row in pipeline_child.ROWS
        for seed in (0, 1)
        for stage in per_seed
    ]
    text = (whole / "results.jsonl").read_text()
    assert "second" not in text
    assert "NaN" not in text
    diagnostics = lines[-2]["diagnostics"]
    assert set(diagnostics["alpha"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    times = (whole / "timings.jsonl").read_text().splitlines()
    assert len(times) == len(lines)
    assert "seconds_per_step" in json.loads(times[2])


def test_summary_has_the_promised_form(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) == {"base", "methods"}
    assert list(summary["methods"]) == pipeline_child.ROWS
    row = summary["methods"]["plain"]
    wanted = {"seeds", "trajectory", "composite", "composite_std", "retention"}
    wanted |= {"refusal", "domain_accuracy", "domain_accuracy_learned", "general"}
    assert wanted | {"seconds_per_step"} <= set(row)
    assert row["seeds"] == [0, 1]
    assert list(row["trajectory"]) == ["base", "medical", "legal"]
    lines = [
        x for x in read(whole) if x["method"] == "plain" and x["stage"] == "evaluate"
    ]
    last = [x["metrics"]["composite"] for x in lines if x["domain"] == "legal"]
    assert row["composite"] == pytest.approx(np.mean(last), rel=1e-5)
    assert row["composite_std"] == pytest.approx(np.std(last, ddof=1), rel=1e-4)
    base = summary["base"]["composite"]
    assert row["retention"] == pytest.approx(100 * np.mean(last) / base, rel=1e-5)
    learned = [x["metrics"][f"accuracy/{x['domain']}"] for x in lines]
    assert row["domain_accuracy_learned"] == pytest.approx(np.mean(learned), rel=1e-5)
    final = [
        x["metrics"][f"accuracy/{domain}"]
        for x in lines
        if x["domain"] == "legal"
        for domain in ("medical", "legal")
    ]
    assert row["domain_accuracy"] == pytest.approx(np.mean(final), rel=1e-5)


def test_only_the_newest_checkpoints_are_kept(whole):
    kept = sorted(
        path.parent.name for path in (whole / "stages/plain/0").glob("*/adapter")
    )
    assert kept == ["05-train"]
    assert not list(whole.glob("stages/**/partial-*"))


class StopError(Exception):
    """Stands for a crash."""


def test_a_crash_at_every_stage_boundary_changes_nothing(whole, tmp_path, monkeypatch):
    # Dies right before every other result, and before every third checkpoint's end.
    calls = {"n": 0, "alive": 0}
    original, save = stages.write_result, stages.checkpoint.save

    def dying(*args, **options):
        calls["n"] += 1
        if calls["n"] % 2:
            raise StopError
        calls["alive"] += 1
        return original(*args, **options)

    def dying_save(folder, tree):
        save(folder, tree)
        calls["n"] += 1
        if calls["n"] % 3 == 0:
            raise StopError

    monkeypatch.setattr(stages, "write_result", dying)
    monkeypatch.setattr(stages.checkpoint, "save", dying_save)
    for _ in range(300):
        with contextlib.suppress(StopError):
            pipeline_child.main(tmp_path, seeds=(0,))
            break
    else:
        pytest.fail("never finished")
    assert calls["alive"] > 10
    lines = (whole / "results.jsonl").read_text().splitlines(keepends=True)
    expected = "".join(x for x in lines if json.loads(x)["seed"] in (None, 0))
    assert (tmp_path / "results.jsonl").read_text() == expected


def test_kill_9_and_rerun_give_the_same_bytes(whole, tmp_path):
    rng = random.Random(os.getpid())
    command = [sys.executable, str(CHILD), str(tmp_path)]
    kills = 0
    for _ in range(2):
        child = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        # Importing takes seconds: wait for the first stages, then a random while.
        before = len(list(tmp_path.glob("stages/*/*/*")))
        while len(list(tmp_path.glob("stages/*/*/*"))) <= before + 2:
            if child.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 1
    pipeline_child.main(tmp_path)
    ours, theirs = (x / "results.jsonl" for x in (tmp_path, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_computes_nothing(whole, monkeypatch):
    before = (whole / "results.jsonl").stat().st_size

    def never(*args, **options):
        pytest.fail("computed something")

    monkeypatch.setattr(stages, "write_result", never)
    pipeline_child.main(whole)
    assert (whole / "results.jsonl").stat().st_size == before


@pytest.mark.parametrize(
    ("scores", "blocks"),
    [([100.0, 95.0], 0), ([100.0, 94.0, 96.0], 1), ([100.0, 10.0, 10.0, 10.0], 2)],
)
def test_repair_runs_exactly_when_the_rule_says(tmp_path, scores, blocks):
    study = tiny.study(probe=fake_probe(scores))
    row = "safeanchor-exact:csm-only"
    go(tmp_path, study, rows=(row,))
    line = next(x for x in read(tmp_path) if x["stage"] == "repair")
    assert line["metrics"]["blocks"] == blocks
    assert line["metrics"]["probe"] == scores[1]
    assert line["metrics"]["probe_after"] == scores[-1]
    changed = (
        tmp_path / "stages/safeanchor-exact+csm-only/0/02-repair/adapter"
    ).is_dir()
    assert changed == (blocks > 0)


def test_the_judge_is_asked_once_per_example_of_a_domain(tmp_path):
    """Training, two repair blocks and the end of the domain share one answer."""
    asked = []

    def judge(data):
        asked.append(data.tokens.tobytes())
        return tiny.judge(data)

    # The aligned model, then each domain: found low, and low after either block.
    study = tiny.study(probe=fake_probe([100.0] + 6 * [10.0]), judge=judge)
    monitored = {"adaptive-judge": {"monitored": True}}
    domains = ("medical", "legal")
    go(tmp_path, study, rows=("adaptive-judge",), domains=domains, options=monitored)
    blocks = [x["metrics"]["blocks"] for x in read(tmp_path) if x["stage"] == "repair"]
    assert blocks == [2, 2]
    assert asked == [study.domains[name].train.tokens.tobytes() for name in domains]


def test_without_a_probe_nothing_is_monitored(tmp_path):
    class NoProbe:
        def __call__(self, base, adapter):
            pytest.fail("probed")

    study = tiny.study(probe=NoProbe())
    object.__setattr__(study, "probe", None)
    go(tmp_path, study, rows=("safeanchor-exact:csm-only",))
    assert not [x for x in read(tmp_path) if x["stage"] == "repair"]


def test_other_rows_and_seeds_are_added_to_a_folder(tmp_path):
    go(tmp_path, seeds=(1,))
    go(tmp_path, seeds=(0,))
    seeds = [x["seed"] for x in read(tmp_path) if x["stage"] == "evaluate"]
    assert seeds == [0, 1]


def test_mapped_seeds_agree_with_one_after_the_other(tmp_path):
    go(tmp_path / "a", seeds=(0, 1))
    go(tmp_path / "b", seeds=(0, 1), settings={"vmap_seeds": "yes"})
    for one, two in zip(read(tmp_path / "a"), read(tmp_path / "b"), strict=True):
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3)


def test_a_loss_that_is_not_finite_keeps_what_is_finished(tmp_path):
    # Adam's first steps are bounded by the learning rate, so it takes a huge one.
    with pytest.raises(UserError, match=r"plain, seed 0, domain medical: .*at step \d"):
        go(tmp_path, settings={"learning_rate": 1e30})
    assert (tmp_path / "stages/plain/0/00-subspace/result.json").exists()
    assert not (tmp_path / "stages/plain/0/01-train").exists()


def untouched(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_folder_of_other_settings_is_refused_and_left_alone(whole, tmp_path):
    before = untouched(whole)
    for settings, named in (
        ({"steps_per_domain": 4}, "training.steps_per_domain: there 5, now 4"),
        ({"learning_rate": 1.0, "steps_per_domain": 5}, "training.learning_rate"),
    ):
        with pytest.raises(UserError, match=named):
            run(
                STUDY,
                pipeline_child.ROWS,
                [0],
                whole,
                tiny.with_options(tiny.config(**settings), pipeline_child.OVERRIDES),
            )
    with pytest.raises(UserError, match="domains"):
        go(whole, config=pipeline_child.CONFIG)
    assert untouched(whole) == before
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds summary\.json but no config"):
        go(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "mine"


def test_hardware_settings_do_not_make_another_run(tmp_path):
    go(tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    go(tmp_path, settings={"log_every": 1, "checkpoint_every": 3})
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": ("plan",)}, "unknown method 'plan'; nearest: plain"),
        ({"domains": ("medicine",)}, "unknown domain 'medicine'; nearest: medical"),
        ({"rows": ()}, "at least one method"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "each seed once"),
        ({"seeds": (-1,)}, "seeds of at least 0"),
        ({"settings": {"mesh": "fsdp=16"}}, "needs 16 devices"),
        ({"settings": {"mesh": "fsdp=2", "vmap_seeds": "yes"}}, "vmap_seeds"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        go(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_empty_or_leaking_calibration_is_refused(tmp_path):
    empty = TokenDataset(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))
    with pytest.raises(UserError, match="safety calibration set with at least one"):
        go(tmp_path, tiny.study(calibration=empty))
    leaking = tiny.study(leak_check={"calibration/probe": 3})
    with pytest.raises(UserError, match="calibration and probe share 3 prompts"):
        go(tmp_path, leaking)
    data = tiny.dataset(0, 4)
    assert check_disjoint({"a": data, "b": tiny.dataset(1, 4)}) == {"a/b": 0}
    with pytest.raises(UserError, match="a and b share 4 prompts"):
        check_disjoint({"a": data, "b": data.tokens[:, :4].tolist()})


def test_a_folder_in_use_is_refused(tmp_path):
    config = {"training": {}}
    with results.Workdir(tmp_path).opened(config, {}):
        other = results.Workdir(tmp_path).opened(config, {})
        with pytest.raises(UserError, match="in use by another run"), other:
            pass


def test_numbers_in_results_are_valid_json():
    tree = {"a": np.float32(1 / 3), "b": [np.nan, 1], "c": jax.numpy.ones(2)}
    found = records.plain_numbers(tree)
    assert found == {"a": 0.333333, "b": [None, 1], "c": [1.0, 1.0]}
