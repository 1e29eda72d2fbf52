"""The command that runs the analyses: its files, its folders, its mistakes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import synthetic_run
import tiny
from analyses_case import EXAMPLES, REQUESTS, STEPS
from tiny_preset import TinyOptions, make_job

from sbr_jax import recipes
from sbr_jax.analysis import exhaustion
from sbr_jax.programs import analyse
from sbr_jax.programs.job import parse_preset
from sbr_jax.studies import analyses
from sbr_jax.studies.options import TestbedOptions
from sbr_jax.subspace import effective_rank
from sbr_jax.training.records import plain_numbers, read_json, write_record
from sbr_jax.typing import UserError

STUDY = tiny.study(
    calibration=tiny.dataset(1, 60, 0),
    harmful=tiny.dataset(7, 30, 9),
    calibration_controls={
        "benign": tiny.dataset(3, 24, 5),
        "random": tiny.dataset(9, 60, 11),
    },
)
"""One for all contexts: what is compiled for it is kept."""


def tiny_context(workdir: Path, **changes):
    job = make_job(
        *("--workdir", str(workdir), "--quiet", "--seed", "0"),
        *("--methods", "plain", "safeanchor-exact:projection-only"),
        *(f"--training.{key}={value}" for key, value in changes.items()),
    )
    made = type("Made", (TinyOptions,), {"build": lambda *_, **__: STUDY})
    context = analyses.Context(dataclasses.replace(job, study=made()))
    context.__dict__["by_kind"] = EXAMPLES
    return context


def test_all_analyses_of_a_tiny_study(tmp_path, monkeypatch):
    monkeypatch.setattr(analyses, "request_sets", lambda tokenizer, options: REQUESTS)
    monkeypatch.setattr(analyses, "STEPS", (0.5, 2.0))
    monkeypatch.setattr(analyses, "DRAWS", 1)
    folder = tmp_path / "w"
    page = analyse.execute(tiny_context(folder), ["sensitivity", "exhaustion"])
    first = read_json(folder / "analysis.json")
    assert set(first) == {"of", "sensitivity", "exhaustion"}
    assert first["sensitivity"]["sizes"] == [30, 60]
    rest = ["harm-types", "coupling", "probe", "selectivity"]
    analyse.execute(tiny_context(folder), rest)
    whole = read_json(folder / "analysis.json")
    assert set(whole) == {"of", *analyses.ANALYSES}
    (row,) = whole["selectivity"]["rows"].values()
    assert whole["selectivity"]["examples"] == 30
    for name, share in row["share"].items():
        assert 0 < share < 1, name
        # Written with six decimals.
        wanted = pytest.approx(row["held_out"] / share, rel=1e-5)
        assert row["selectivity"][name] == wanted
    assert whole["exhaustion"] == first["exhaustion"]
    row = whole["exhaustion"]["safeanchor-exact:projection-only"]
    assert row["rank"][0] > 0
    assert 0 < row["removed"][0] <= 1
    assert whole["harm-types"]["examples"] == 12
    assert whole["harm-types"]["kinds"][-1] == "random tokens"
    drift = whole["coupling"]["direction_cosine"]["plain"][0]
    assert drift[0] == pytest.approx(1, abs=1e-5)
    assert drift[-1] < 1
    assert set(whole["coupling"]["causal"]["cosine"]) == set(STEPS)
    text = page.read_text()
    found = whole["probe"]["auroc"]["direct"]
    assert set(found) == {"look-alikes", *tiny_context(folder).study.domains}
    assert {len(readings) for readings in found.values()} == {tiny.CONFIG.layers + 2}
    for name in ({*analyses.ANALYSES} - {"coupling"}) | {"coupling-causal"}:
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert f'id="{name}-' in text
    before = (folder / "analysis.json").read_bytes()
    with pytest.raises(UserError, match="another preset, model or settings"):
        analyse.execute(tiny_context(folder, learning_rate=0.5), ["harm-types"])
    assert (folder / "analysis.json").read_bytes() == before


def test_the_subspace_of_an_analysis_is_that_of_the_defence():
    context = tiny_context(Path("unused"))
    found = context.subspace(context.study.calibration)
    assert int(np.max(effective_rank(found)["q_proj"])) > 0
    size = np.asarray(context.adapter["q_proj"].lora_b[0]).size
    assert np.any(found.basis["q_proj"][:, :size])
    assert not np.any(found.basis["q_proj"][:, size:])  # B = 0 hides A


@pytest.mark.parametrize("program", ["run", "attack"])
def test_the_folder_of_another_program_is_refused_by_name(program, tmp_path, capsys):
    folder = synthetic_run.write(tmp_path / program, ("plain",), seeds=(0,))
    if program == "attack":
        config = {"training": {}, "attack": {"name": "poison"}}
        (folder / "config.json").write_text(json.dumps(config))
    before = sorted(folder.iterdir())
    more = ["--results", str(folder)] if program == "run" else []
    assert analyse.main(["demo", "--workdir", str(folder), *more]) == 2
    assert capsys.readouterr().err == (
        f"error: --workdir: {folder} is the folder of experiments.{program}; "
        f"choose another for the analyses: --workdir {folder}-analysis\n"
    )
    assert sorted(folder.iterdir()) == before


def test_an_interrupted_analysis_is_continued_in_its_folder(tmp_path):
    (tmp_path / "exhaustion" / "stages").mkdir(parents=True)
    analyse.check_folder(tmp_path)
    (tmp_path / "stages").mkdir()
    with pytest.raises(UserError, match="holds stages but no analysis"):
        analyse.check_folder(tmp_path)
    (tmp_path / "analysis.json").write_text("{}")
    analyse.check_folder(tmp_path)


def test_damaged_analyses_are_named_before_any_is_made(tmp_path):
    path = tmp_path / "analysis.json"
    path.write_text("{half")
    with pytest.raises(UserError, match=r"analysis\.json.* delete it to have all") as e:
        analyse.execute(tiny_context(tmp_path), ["harm-types"])
    assert str(path) in str(e.value)
    assert path.read_text() == "{half"


UNDRAWN = {
    "empty": ("harm-types", {}),
    "no rows": ("exhaustion", {}),
    "no readings": ("probe", {"fitted": 4, "auroc": {}}),
    "text": ("coupling", {"stages": ["start"], "direction_cosine": {"plain": "x"}}),
}


def keep(folder, context, **stored):
    """An `analysis.json` of the context's study that holds these results."""
    whole = {"of": plain_numbers(analyse.identity(context)), **stored}
    write_record(folder / "analysis.json", whole)


@pytest.mark.parametrize(("name", "stored"), UNDRAWN.values(), ids=UNDRAWN)
def test_what_cannot_be_drawn_is_refused_before_any_is_made(
    name, stored, tmp_path, monkeypatch
):
    other = "sensitivity" if name == "harm-types" else "harm-types"
    context = tiny_context(tmp_path)
    keep(tmp_path, context, **{name: stored})
    before = (tmp_path / "analysis.json").read_bytes()
    monkeypatch.setitem(analyses.ANALYSES, other, lambda _: pytest.fail("was made"))
    with pytest.raises(UserError, match=f"expected a {name} analysis .* older") as e:
        analyse.execute(context, [other])
    assert str(e.value).endswith("delete it to have all analyses made anew")
    assert str(tmp_path / "analysis.json") in str(e.value)
    assert (tmp_path / "analysis.json").read_bytes() == before


def test_a_damaged_analysis_can_be_made_anew_by_itself(tmp_path, monkeypatch):
    row = exhaustion.exhaustion(("a",), [[90.0]])
    monkeypatch.setitem(analyses.ANALYSES, "exhaustion", lambda _: {"plain": row})
    context = tiny_context(tmp_path)
    keep(tmp_path, context, exhaustion={})
    assert 'id="exhaustion-' in analyse.execute(context, ["exhaustion"]).read_text()


def test_list_names_analyses_and_the_presets_that_they_fit(capsys):
    assert analyse.main(["--list"]) == 0
    text = capsys.readouterr().out
    lines = {
        line.split()[0]: line for line in text.splitlines() if line.startswith(" ")
    }
    assert set(lines) == {*analyses.ANALYSES, *recipes.MODULES}
    assert all(name in lines["testbed"] for name in analyses.ANALYSES)
    assert "exhaustion" in lines["stories"]
    assert not any(name in lines["stories"] for name in analyses.LABELLED)


def test_other_presets_leave_out_what_they_cannot_do(tmp_path):
    kind, preset = analyse.AnalyseArguments, recipes.load("stories")
    words = ("--workdir", str(tmp_path))
    _, names = analyse.make_context(preset, parse_preset(kind, preset, words, ""))
    assert names == ["sensitivity", "exhaustion", "selectivity"]


def test_the_probe_is_measured_on_requests_it_was_not_fitted_on():
    from sbr_jax import testbed
    from sbr_jax.studies import examples

    sets = examples.request_sets(testbed.load().tokenizer, TestbedOptions(hard=True))
    assert list(sets["harmful"]) == ["direct", "behind a jailbreak", "of unseen kinds"]
    assert list(sets["harmless"]) == ["helpful", "look-alikes"]
    rows = {
        name: {row.tobytes() for row in data.tokens}
        for found in sets.values()
        for name, data in found.items()
    }
    assert not rows["direct"] & rows["of unseen kinds"]
    assert not rows["direct"] & rows["look-alikes"]
