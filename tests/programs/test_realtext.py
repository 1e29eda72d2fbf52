"""The program and preset `realtext`: a training run, its folder, its mistakes."""

import json

import jax
import numpy as np
import pytest
import tiny_data as files
from realtext_case import everything, save_data

from sbr_jax import models
from sbr_jax.data import encode_prompts
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import realtext
from sbr_jax.recipes.realtext import BENCHMARKS, PRESET
from sbr_jax.studies.realtext import corpus
from sbr_jax.studies.realtext import model as made
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny():
    """The program with a model of a few hundred weights and short batches."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WIDTH": 16,
            "LAYERS": 1,
            "HEADS": 2,
            "MEASURED": 4,
            "NEW_TOKENS": 4,
            "CONTEXT": 128,
            "LENGTHS": (64,),
        }.items():
            patch.setattr(made, name, value)
        patch.setattr(realtext, "BENCHMARKS", ("harmbench", "xstest"))
        patch.setattr(corpus, "LENGTHS", (64,))
        patch.setattr(corpus, "TOKENS", 512)
        patch.setattr(corpus, "VOCABULARY", 512)
        yield


@pytest.fixture(scope="module")
def command(data, tiny, tmp_path_factory):
    """A finished run of a few steps: its folder and its arguments without --output."""
    output = tmp_path_factory.mktemp("made") / "runs" / "model"
    arguments = ["--data", str(data), "--steps", "12", "--quiet"]
    assert realtext.main([*arguments, "--output", str(output)]) == 0
    return output, arguments


@pytest.mark.thorough
def test_the_folder_holds_a_chat_model_that_has_learnt(command):
    output, _ = command
    model = models.load(output)
    record = json.loads((output / "training.json").read_text())
    assert model.config.model_type == "llama"
    assert model.config.tied
    assert sum(x.size for x in jax.tree.leaves(model.params)) == record["parameters"]
    assert len(model.tokenizer) == model.config.vocab_size == record["vocabulary"]
    (prompt,) = encode_prompts(model.tokenizer, ["Why?"])
    assert prompt[0] == model.config.bos
    first, last = record["curve"][0], record["curve"][-1]
    assert last[0] == record["steps"] == 12
    assert last[1] < first[1] < 1.1 * np.log(record["vocabulary"])
    assert record["held_out_loss"]["all"] == last[1]
    measured = {"refusal/harmbench", "over_refusal/xstest", "refusal/beavertails-eval"}
    assert measured <= set(record["measured"])
    assert record["judge"]["keywords"] == corpus.KEYWORDS


def test_the_record_has_counts_and_no_text(command, data):
    parts = corpus.read_corpus(data, corpus.kept_out(data), seed=0)
    output, _ = command
    text = (output / "training.json").read_text()
    record = json.loads(text)
    for name, part in parts.items():
        assert record["parts"][name]["rows"] == len(part.train)
        assert part.dropped.items() <= record["parts"][name]["dropped"].items()
    assert record["kept_out"]["advbench"]["prompts"] == 1
    told = [x.prompt for x in everything(parts)]
    for prompts in corpus.kept_out(data).values():
        told += prompts
    assert not [prompt for prompt in told if len(prompt) > 5 and prompt in text]


def test_the_seed_decides_the_folder(command, tmp_path):
    output, arguments = command
    for seed, same in ((0, True), (1, False)):
        other = tmp_path / str(seed)
        more = ("--seed", str(seed), "--output", str(other))
        assert realtext.main([*arguments, *more]) == 0
        for name in ("model.safetensors", "training.json"):
            assert ((other / name).read_bytes() == (output / name).read_bytes()) is same


def test_a_prompt_without_room_is_refused_before_training(tiny, data, monkeypatch):
    monkeypatch.setattr(made, "CONTEXT", 12)
    monkeypatch.delattr(made, "train")
    with pytest.raises(UserError, match="expected prompts of at most 8 tokens"):
        made.build(data, realtext.BENCHMARKS, quiet=True)


def test_folders_are_made_for_a_model_that_is_there(tmp_path, monkeypatch):
    output = tmp_path / "a/b/c"
    arguments = ["--data", str(tmp_path / "absent"), "--output", str(output)]
    assert realtext.main(arguments) == 2
    assert list(tmp_path.iterdir()) == []

    def killed(folder, model):
        raise KeyboardInterrupt

    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(models, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            made.write(output, None, {})
    # A folder that was there before stays.
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    monkeypatch.setattr(models, "save", lambda folder, model: folder.mkdir())
    made.write(output, None, {})
    assert (output / "training.json").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"--steps": "0"}, "--steps: expected at least 1, got 0"),
        (
            {"--seed": "-1"},
            "a whole number in [0, 4294967295], got -1",
        ),
        ({"--output": "taken"}, "expected a folder that is not there yet"),
        ({"--output": "taken/file/model"}, "cannot make"),
        ({"--data": "taken"}, "expected the data file harmbench/"),
    ],
)
def test_a_mistake_is_one_line(tiny, data, tmp_path, capsys, changes, line):
    files.put(tmp_path / "taken/file", "x")
    options = {"--data": str(data), "--output": "model", "--steps": "2"} | changes
    options["--output"] = str(tmp_path / options["--output"])
    if "--data" in changes:
        options["--data"] = str(tmp_path / changes["--data"])
    arguments = [word for pair in options.items() for word in pair]
    assert realtext.main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


# --- the preset -----------------------------------------------------------------------


def test_the_preset_names_what_exists():
    assert PRESET.domains == ("medmcqa", "legalbench", "codealpaca")
    assert set(PRESET.methods) <= {*METHODS, *VARIANTS}
    assert PRESET.study.judge == f"keyword:{corpus.KEYWORDS}"
    assert PRESET.study.benchmarks == BENCHMARKS
