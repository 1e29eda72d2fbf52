"""Presets of chat models from the command line: runs, the dry run, bad input."""

import json
import shutil

import jax
import pytest
import tiny_chat
from chat_case import build, copy_world, save_world
from tiny_chat import MARK
from tiny_data import as_json, as_table, put

from sbr_jax import recipes as configs
from sbr_jax.programs import run
from sbr_jax.studies.chat import checkpoints

SMALL = [f"study.{key}={value!r}" for key, value in tiny_chat.SIZES.items()]
QUICK = ["steps_per_domain=2", "batch_size=4", "repair_steps=1", "lora_rank=2"]
QUICK += ["repair_blocks=1", "fisher_examples=4", "fisher_microbatch=4"]
CAPPED = ["safeanchor.max_rank=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def copy(world, tmp_path):
    return copy_world(world, tmp_path)


# --- runs -----------------------------------------------------------------------------


def command(world, workdir, *more, sets=(*QUICK, *SMALL, *CAPPED)):
    return [
        "llama2-7b",
        *("--model", str(world / "model"), "--data", str(world / "data")),
        *("--workdir", str(workdir), "--methods", "plain", "safeanchor"),
        *("--domains", "medical", "code", "--seed", "42", "--quiet", *more),
        *("--set", *sets),
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
    assert set(summary["methods"]) == {"plain", "safeanchor"}
    for row in summary["methods"].values():
        assert 0 <= row["refusal"] <= 100
        assert 0 <= row["over_refusal"] <= 100
        assert 0 <= row["domain_accuracy"] <= 100
    config = json.loads((finished / "config.json").read_text())
    assert config["data"]["sources"] == {"medical": "medqa", "code": "codealpaca"}
    assert config["study"]["dtype"] == "bfloat16"
    assert not {"model_folder", "remat", "mesh"} & set(config["study"])
    assert set(config["measurements"]) == {"harmbench", "xstest"}
    lines = (finished / "results.jsonl").read_text().splitlines()
    stages = [(r["method"], r["stage"]) for r in map(json.loads, lines)]
    assert stages.count(("safeanchor", "repair")) == 2


def test_no_text_of_the_data_reaches_the_results(finished):
    for path in finished.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            assert MARK not in path.read_text(), path.name


def test_the_same_command_has_nothing_left_to_do(world, finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*")}
    # Hardware is free to change, data are not.
    sets = (*QUICK, *SMALL, *CAPPED, "study.generation_batch=3")
    assert run.main(command(world, finished, sets=sets)) == 0
    assert {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("*")} == before


def test_a_folder_of_other_data_is_refused(copy, finished, capsys):
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


def dry(folder, *more, sets=SMALL):
    return run.main(
        [
            "llama2-7b",
            *("--model", str(folder / "model"), "--data", str(folder / "data")),
            *("--dry-run", *more, "--set", *sets),
        ]
    )


def test_a_dry_run_checks_and_forecasts_and_touches_nothing(
    world, tmp_path, capsys, monkeypatch
):
    def refuse(*args, **options):
        raise AssertionError("a dry run read weights")

    monkeypatch.setattr(checkpoints, "load_model", refuse)
    monkeypatch.chdir(tmp_path)
    every = [s for s in SMALL if "measures" not in s]
    # What a tiny model cannot hold is refused, as the run would refuse it.
    assert dry(world, sets=[*every, "lora_rank=2"]) == 2
    assert "max_rank: expected at most the 48" in capsys.readouterr().err
    ranked = ("safeanchor", "safeanchor-exact", "unified")
    capped = [f"{row}.max_rank=4" for row in ranked]
    capped += ["sbr.anchors=4", "unified.anchors=4"]
    sets = [*every, *capped, "lora_rank=2", "device.memory_gb=24"]
    assert dry(world, sets=sets) == 0
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


def other_family(folder):
    path = folder / "model/config.json"
    raw = json.loads(path.read_text())
    raw["model_type"] = "qwen2"
    path.write_text(json.dumps(raw))


def missing(name):
    return lambda folder: (folder / "data" / name).unlink()


def rewritten(name, text):
    return lambda folder: put(folder / "data" / name, text)


def long_prompt(folder):
    path = folder / "data/harmbench/harmbench_behaviors_text_all.csv"
    row = tiny_chat.behaviour("w1 " * 120, 0)
    put(path, as_table([row]))


NO_OUTPUT = as_json([{"instruction": "w1", "input": ""}])
BAD = {
    "no template": (no_template, (), "a tokenizer with a chat template"),
    "two bos": (two_bos, (), "expected one '<s>' at the start, got 2"),
    "truncated": (truncated, (), "cut short"),
    "other family": (other_family, (), "q_proj.bias"),
    "missing file": (missing("catqa/catqa_english.json"), (), "catqa_english.json"),
    "missing set": (
        missing("harmbench/harmbench_behaviors_text_all.csv"),
        (),
        "harmbench_behaviors_text_all.csv",
    ),
    "empty split": (
        rewritten("alpaca/alpaca_5000.json", "[]"),
        (),
        "expected at least one row, got none",
    ),
    "missing column": (
        rewritten("alpaca/alpaca_5000.json", NO_OUTPUT),
        (),
        "expected a column 'output'",
    ),
    "long prompt": (long_prompt, (), "harmbench: expected prompts of at most 88"),
    "overlap": (
        tiny_chat.overlap,
        ("study.calibration=26", "study.safety_mix=1"),
        "calibration/harmbench: 3",
    ),
    "length": (None, ("study.max_length=97",), "the model's context of 96"),
    "short": (None, ("study.max_length=4",), "leave no room for an answer"),
    "size": (None, ("study.train=0",), "study.train: expected at least 1"),
    "dtype": (None, ("study.dtype=int4",), "study.dtype: expected one of bfloat16"),
    "measure": (None, ("study.measures=['harmbnch']",), "nearest: harmbench"),
    "judge": (None, ("study.judge=llama-guard",), "expected a folder with the judge"),
    "words": (None, ("study.judge=keyword:x",), "expected keywords among"),
    "device": (None, ("device.memory=1",), "expected one of memory_gb, tflops"),
    "device value": (None, ("device.tflops=fast",), "or 'measured'"),
    "devices": (None, ("device.count=0.5",), "expected a whole number above 0"),
    "batch": (None, ("study.train=2", "batch_size=4"), "expected less than 4"),
    "rank": (None, ("lora_rank=999",), "lora_rank: expected at most"),
}


@pytest.mark.parametrize(("damage", "sets", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_anything_is_loaded(
    world, request, damage, sets, message, capsys
):
    folder = world
    if damage is not None:
        folder = request.getfixturevalue("copy")
        damage(folder)
    assert dry(folder, sets=[*SMALL, *sets]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert MARK not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model FOLDER_OR_HUB_ID"),
        (["--model", "m"], "expected --data FOLDER"),
        (["--model", "no where", "--data", "D"], "a checkpoint folder or a hub id"),
        (["--model", "M", "--data", "nowhere"], "a folder with data sets"),
        (["--model", "M", "--data", "D", "--domains", "medcal"], "nearest: medical"),
        (
            [
                *("--model", "M", "--data", "D", "--domains", "medical", "medqa"),
                *("--set", *SMALL),
            ],
            "data set once, got 'medqa' twice",
        ),
        (
            ["--model", "M", "--data", "D", "--methods", "safe-lora"],
            "study.unaligned_folder=FOLDER",
        ),
        (["--model", "M", "--data", "D", "--set", "device.tflops=1"], "--dry-run"),
    ],
)
def test_a_wrong_command_line_is_one_line(world, arguments, message, tmp_path, capsys):
    places = {"M": str(world / "model"), "D": str(world / "data")}
    workdir = tmp_path / "run"
    given = [places.get(a, a) for a in arguments]
    assert run.main(["mistral-7b", "--workdir", str(workdir), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b"])
def test_the_presets_say_what_the_paper_says(name):
    preset = configs.load(name)
    settings = preset.settings
    assert settings["batch_size"] == 16
    assert settings["accumulation"] == 2
    assert settings["steps_per_domain"] * 16 == pytest.approx(5000 * 3, abs=16)
    assert (settings["lora_rank"], settings["lora_alpha"]) == (16, 32.0)
    assert settings["lora_dropout"] == 0.05
    assert settings["learning_rate"] * settings["final_fraction"] == pytest.approx(1e-6)
    assert preset.seeds == (42, 123, 456, 789, 1234)
    assert preset.domains == ("medical", "legal", "code")
    options = preset.options
    assert (options["train"], options["calibration"]) == (5000, 500)
    assert (options["probe"], options["max_new_tokens"]) == (200, 256)
    assert options["max_length"] == 512
