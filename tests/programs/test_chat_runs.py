"""Presets of chat models from the command line: runs, the dry run, bad input."""

import json
import shutil

import jax
import pytest
import tiny_chat
from chat_case import SMALL, build, copy_world, save_world
from tiny_chat import MARK
from tiny_data import as_json, put

from sbr_jax.programs import run
from sbr_jax.studies.chat import checkpoints

QUICK = [
    *("--training.steps-per-domain=2", "--training.batch-size=4"),
    *("--training.repair-steps=1", "--training.lora-rank=2"),
    *("--training.repair-blocks=1", "--training.fisher-examples=4"),
    *("--hardware.fisher-microbatch=4", "--hardware.accumulation=1"),
]
CAPPED = ["--methods.safeanchor.max-rank=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def copy(world, tmp_path):
    return copy_world(world, tmp_path)


# --- runs -----------------------------------------------------------------------------


def command(world, workdir, *more):
    return [
        "llama2-7b",
        *("--model", str(world / "model"), "--data", str(world / "data")),
        *("--workdir", str(workdir), "--methods", "safeanchor"),
        *("--domains", "medical", "--seed", "42", "--quiet"),
        *(*QUICK, *SMALL, *CAPPED, *more),
    ]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    # JAX's own attention has no gradient in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert run.main(command(world, workdir)) == 0
    return workdir


def test_a_preset_runs_end_to_end_and_says_what_it_was_made_of(finished):
    summary = json.loads((finished / "summary.json").read_text())
    (row,) = summary["methods"].values()
    for name in ("refusal", "over_refusal", "domain_accuracy"):
        assert 0 <= row[name] <= 100
    config = json.loads((finished / "config.json").read_text())
    assert config["data"]["sources"] == {"medical": "medqa"}
    assert config["study"]["dtype"] == "bfloat16"
    assert not [name for name in config["study"] if "folder" in name]
    assert set(config["measurements"]) == {"harmbench", "xstest"}
    lines = (finished / "results.jsonl").read_text().splitlines()
    stages = [(r["method"], r["stage"]) for r in map(json.loads, lines)]
    assert stages.count(("safeanchor", "repair")) == 1
    # No text of the data reaches the results.
    for path in finished.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            assert MARK not in path.read_text(), path.name


def test_a_folder_is_left_as_it_is_and_other_data_are_refused(
    world, copy, finished, capsys
):
    before = {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*")}
    # Hardware is free to change, data are not.
    again = command(world, finished, "--hardware.generation-batch=3")
    assert run.main(again) == 0
    assert {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*")} == before
    path = copy / "data/alpaca/alpaca_5000.json"
    rows = json.loads(path.read_text())
    put(path, as_json(rows[::-1]))
    assert run.main(command(copy, finished)) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_a_quantised_base_gives_a_study_that_can_be_measured(world):
    study = build(world, ("code",), weights=True, quantize="int8", dtype="float32")
    leaves = jax.tree.leaves(study.model.params["layers"]["q_proj"])
    assert {str(leaf.dtype) for leaf in leaves} >= {"int8"}
    assert 0 <= study.domains["code"].evaluate(study.model.params, None) <= 100


# --- the dry run, and bad input -------------------------------------------------------


def dry(folder, *more, sizes=SMALL):
    """A dry run; what is said in `more` replaces a size."""
    said = {word.partition("=")[0] for word in more}
    kept, inside = [], True
    for word in sizes:
        inside = word not in said if word.startswith("--") else inside
        kept += [word] if inside else []
    start = ["llama2-7b", "--model", str(folder / "model")]
    return run.main([*start, "--data", str(folder / "data"), "--dry-run", *kept, *more])


def test_a_dry_run_checks_and_forecasts_and_touches_nothing(
    world, tmp_path, capsys, monkeypatch
):
    def refuse(*args, **options):
        raise AssertionError("a dry run read weights")

    monkeypatch.setattr(checkpoints, "load_model", refuse)
    monkeypatch.chdir(tmp_path)
    every = SMALL[: SMALL.index("--study.benchmarks")]
    ranked = ("safeanchor", "safeanchor-exact", "unified")
    capped = [f"--methods.{name}.max-rank=4" for name in ranked]
    capped += ["--methods.sbr.anchors=4", "--methods.unified.anchors=4"]
    rank = "--training.lora-rank=2"
    # What a tiny model cannot hold is refused, as the run would refuse it.
    assert dry(world, rank, sizes=every) == 2
    assert "max_rank: expected at most the 48" in capsys.readouterr().err
    assert dry(world, *capped, rank, "--device.memory-gb=24", sizes=every) == 0
    out = capsys.readouterr().out
    for text in (
        "medical: medqa, legal: legalbench, code: codealpaca",
        "0 prompts shared",
        "train medical",
        "measured truthfulqa",
        "per-example gradients",
        "fits into 22.4 GiB",
        "safeanchor-exact",
        "all, 5 seeds",
    ):
        assert text in out, text
    assert MARK not in out
    assert list(tmp_path.iterdir()) == []


def no_template(folder):
    shutil.rmtree(folder / "model")
    tiny_chat.save_model(folder / "model", template=None)


def two_bos(folder):
    shutil.rmtree(folder / "model")
    template = "{{ bos_token }}" + tiny_chat.TEMPLATE
    tiny_chat.save_model(folder / "model", template)


def truncated(folder):
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_prompts(folder):
    (folder / "data/catqa/catqa_english.json").unlink()


def no_answers(folder):
    rows = as_json([{"instruction": "w1", "input": ""}])
    put(folder / "data/alpaca/alpaca_5000.json", rows)


BAD = {
    "no template": (no_template, (), "a tokenizer with a chat template"),
    "two bos": (two_bos, (), "expected one '<s>' at the start, got 2"),
    "truncated": (truncated, (), "cut short"),
    "missing file": (no_prompts, (), "catqa_english.json"),
    "missing column": (no_answers, (), "expected a column 'output'"),
    "overlap": (
        tiny_chat.overlap,
        ("--study.calibration=26", "--study.safety-mix=1"),
        "calibration and harmbench share 3 prompts",
    ),
    "short": (None, ("--study.max-length=4",), "leave no room for an answer"),
}


@pytest.mark.parametrize(("damage", "words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_anything_is_loaded(
    world, request, damage, words, message, capsys
):
    folder = world
    if damage is not None:
        folder = request.getfixturevalue("copy")
        damage(folder)
    assert dry(folder, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert MARK not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no where", "--data", "D"], "a checkpoint folder or a hub id"),
        (
            ["--model", "M", "--data", "D", *SMALL, "--domains", "medical", "medqa"],
            "data set once, got 'medqa' twice",
        ),
    ],
)
def test_a_wrong_folder_is_one_line(world, arguments, message, tmp_path, capsys):
    places = {"M": str(world / "model"), "D": str(world / "data")}
    workdir = tmp_path / "run"
    given = [places.get(a, a) for a in arguments]
    assert run.main(["mistral-7b", "--workdir", str(workdir), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()
