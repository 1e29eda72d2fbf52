"""Settings: said in `--help`, felt in the run, kept in its folder."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
from tiny_preset import CONFIG, PRESET, STUDY, make_job, tiny_presets

from sbr_jax import recipes
from sbr_jax.data.batches import batch
from sbr_jax.methods import METHODS, VARIANTS, Hyperparameters, build
from sbr_jax.programs import analyse, attack, main, parsing, run
from sbr_jax.settings import Hardware, Training, restore
from sbr_jax.training.program import init_adapter, make_program

assert tiny_presets
PRESETS = {name: recipes.load(name) for name in recipes.MODULES}


def options(record, scope):
    """Every field of a record, as the command line spells it."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        name = f"{scope}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{name}.")
        else:
            yield f"--{name}", value


def trees(preset):
    return {
        "study": preset.study,
        "training": preset.training,
        "hardware": preset.hardware,
        "methods": preset.hyperparameters,
    }


# --- presets --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), PRESETS.items())
def test_a_preset_is_complete(name, preset):
    assert preset.name == name
    assert set(preset.domains) <= set(preset.study.known_domains())
    assert len(preset.domains) == len(set(preset.domains)) >= 3
    assert set(preset.methods) <= {*METHODS, *VARIANTS}
    assert len(preset.seeds) >= 3
    module = sys.modules[f"sbr_jax.recipes.{recipes.MODULES[name]}"]
    assert f"python -m experiments.run {name} --workdir" in module.__doc__
    assert "Cost:" in module.__doc__
    assert "Expected:" in module.__doc__


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b"])
def test_the_presets_of_the_paper_say_what_it_says(name):
    preset = PRESETS[name]
    training, study = preset.training, preset.study
    assert training.batch_size == 16
    assert preset.hardware.accumulation == 2
    assert training.steps_per_domain * 16 == pytest.approx(5000 * 3, abs=16)
    assert (training.lora_rank, training.lora_alpha) == (16, 32.0)
    assert training.lora_dropout == 0.05
    assert training.learning_rate * training.final_fraction == pytest.approx(1e-6)
    assert preset.seeds == (42, 123, 456, 789, 1234)
    assert preset.domains == ("medical", "legal", "code")
    assert (study.train, study.calibration) == (5000, 500)
    assert (study.probe, study.max_new_tokens) == (200, 256)
    assert study.max_length == 512


def test_presets_share_the_settings_calibrated_on_plain():
    same = PRESETS["testbed"].training
    assert PRESETS["demo"].training == same
    hard = PRESETS["testbed-hard"].training
    assert dataclasses.replace(hard, learning_rate=same.learning_rate) == same


# --- help -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["testbed", "stories", "llama2-7b", "realtext"])
def test_help_names_every_setting_with_the_presets_value(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["run", name, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out.splitlines()
    assert max(map(len, told)) <= 80
    lines = (x.strip("│╭╮╰╯─ ") for x in told)
    text = "".join(f"{' ' if line[:2] != '--' else chr(10)}{line}" for line in lines)
    text = text.replace(",\n--", ", --")  # Both names of a switch.
    count = 0
    for scope, tree in trees(PRESETS[name]).items():
        for option, value in options(tree, f"{scope}."):
            line = rf"^{option},? (.*) \(default: (.*)\)"
            (said,) = re.findall(line, text, re.MULTILINE)
            assert len(said[0].split()) > 1, option  # Its sentence.
            shown = " ".join(value) if isinstance(value, tuple) else str(value)
            assert said[1].strip("'") == shown, option
            count += 1
    assert count > 100
    assert text.count("(required)") == 1  # --workdir.
    assert "`" not in text


NEEDED = {"tune": 3, "align": 4, "plan": 2, "sweep": 1, "report": 1, "export demo": 4}


@pytest.mark.parametrize("words", NEEDED)
def test_help_says_what_is_required_without_markup(words, capsys):
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    text = capsys.readouterr().out
    assert text.count("(required)") == NEEDED[words]
    assert not re.search(r"`|\(default: ('')?\)", text)


@pytest.mark.parametrize("program", [run, attack, analyse])
def test_help_without_a_preset_is_the_usage(program, capsys):
    assert program.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == program.__doc__.strip()


def test_list_names_everything(capsys):
    assert main(["run", "--list"]) == 0
    text = capsys.readouterr().out
    for name in (*PRESETS, *METHODS, *VARIANTS, "medical", "gsm8k"):
        assert name in text


# --- spelling -------------------------------------------------------------------------

SPELT = {
    "--training.learning-rate=1e-3": ("learning_rate", 1e-3),
    "--training.lora_rank 4": ("lora_rank", 4),
    "--training.fisher-examples 7": ("fisher_examples", 7),
    "--training.memory-budget None": ("memory_budget", None),
    "--methods.safegrad.monitored": ("monitored", True),
    "--methods.adaptive-probe.probe-layers 0 1": ("probe_layers", (0, 1)),
    "--methods.safeanchor.no-relax": ("relax", False),
    "--methods.safe-lora.threshold 0.6": ("threshold", 0.6),
    "--hardware.vmap-seeds=no": ("vmap_seeds", "no"),
    "--mesh fsdp=4,tp=2": ("mesh", "fsdp=4,tp=2"),
}


def test_a_setting_is_spelt_in_the_usual_ways():
    config = make_job(*" ".join(SPELT).split()).config
    for words, (name, wanted) in SPELT.items():
        own = [config.training, config.hardware]
        if words.startswith("--methods."):
            method = words.split(".")[1]
            own = [getattr(config.methods, method.replace("-", "_"))]
        (found,) = (getattr(record, name) for record in own if hasattr(record, name))
        assert (type(found), found) == (type(wanted), wanted)
    # And nothing else has changed; the budget is none before as well.
    changed = set(options(config, "")) ^ set(options(CONFIG, ""))
    assert len(changed) == 2 * (len(SPELT) - 1)


def test_every_setting_can_be_said():
    words = []
    for scope, tree in trees(PRESET).items():
        for option, value in options(tree, f"{scope}."):
            head, _, tail = option.rpartition(".")
            if isinstance(value, bool):
                words.append(option if value else f"{head}.no-{tail}")
            else:
                values = value if isinstance(value, tuple) else (value,)
                words += [option, *map(str, values)]
    job = make_job(*words)
    assert (job.study, job.config) == (PRESET.study, CONFIG)


def test_every_option_is_among_those_that_the_nearest_are_taken_from():
    kind = run.RunArguments[type(PRESETS["realtext"].study)]
    known = set(parsing.flags(kind))
    for scope, tree in trees(PRESETS["realtext"]).items():
        assert {option for option, _ in options(tree, f"{scope}.")} <= known
    assert {"--methods.safeanchor.no-relax", "--device.memory-gb", "--dry-run"} <= known
    assert not any("hyperparameters" in option for option in known)


# --- the way to where a setting counts ------------------------------------------------


def step_length(*words):
    """How far one optimizer step moves an adapter."""
    config = make_job("--training.weight-decay", "0", *words).config
    program = make_program("plain", STUDY, config)
    adapter, base = init_adapter(STUDY, config, 0), STUDY.model.params
    data = batch(STUDY.domains["legal"].train, config.training.batch_size, 0, 0)
    start, key = program.start(adapter, {}), jax.random.key(0)
    train, _ = program.step(base, start, {}, data, key)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), train.adapter, adapter)
    return max(jax.tree.leaves(moved))


def test_a_setting_reaches_the_optimizers_step():
    one, two = (step_length("--training.learning-rate", x) for x in ("1e-3", "2e-3"))
    # Adam's first step has the length of the rate, up to its ε.
    assert two == pytest.approx(2 * one, rel=1e-3)


def test_a_setting_reaches_the_method():
    def mixed(*words):
        method = build("interleaving", make_job(*words).config.methods)
        problem = make_program("interleaving", STUDY, CONFIG).problem
        return method.mix(problem, STUDY.domains["legal"].train, 0).tokens.tobytes()

    assert mixed() != mixed("--methods.interleaving.fraction", "0.3")


def test_a_setting_reaches_the_study():
    words = ("--study.calibration-examples", "17", "--domains", "legal")
    job = make_job(*words, preset=PRESETS["demo"])
    assert len(job.make_study().calibration) == 17


# --- the run's folder -----------------------------------------------------------------


@pytest.mark.usefixtures("tiny_presets")
def test_the_folder_holds_every_number_and_gives_the_same_objects_back(tmp_path):
    words = ["--training.lora-rank", "3", "--methods.sbr.anchors", "4"]
    words += ["--methods.adaptive-probe.probe-layers", "0", "1", "--domains", "legal"]
    words += ["--study.size", "2"]
    start = ["run", "tiny", "--workdir", str(tmp_path / "w"), "--quiet"]
    assert main([*start, *words]) == 0
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    job = make_job(*words)
    for name, written in (
        ("training", job.config.training),
        ("methods", job.config.methods),
    ):
        known = dict(options(written, ""))
        assert len(known) == len(list(options(type(written)(), "")))
        flat = {}
        for key, value in record[name].items():
            inner = value.items() if isinstance(value, dict) else [(None, value)]
            for field, number in inner:
                flat[f"--{key}" + (f".{field}" if field else "")] = number
        spelt = {key.replace("_", "-"): value for key, value in flat.items()}
        assert spelt == json.loads(json.dumps(known))
    assert record["study"] == {"size": 2, "hard": False}
    assert restore(Training(), record["training"], "") == job.config.training
    assert restore(Hyperparameters(), record["methods"], "") == job.config.methods
    assert restore(PRESET.study, record["study"], "") == job.study
    hardware = record["hardware"]
    hardware.pop("backend")
    assert restore(Hardware(), hardware, "") == job.config.hardware
