"""What a run refuses, its dry run refuses in the same line."""

import dataclasses

import pytest
from tiers import few
from tiny_preset import STUDY, make_job, tiny_presets

from sbr_jax.costs import dry_run, rehearsal
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.programs import cli, run
from sbr_jax.studies.options import ChatOptions

assert tiny_presets
pytestmark = pytest.mark.usefixtures("tiny_presets", "_own_cache")


@pytest.fixture
def _own_cache(monkeypatch):
    """Compiled programs stay where the tests' own are."""
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)


WRONG = {
    "rank of a subspace": ("safeanchor", "--methods.safeanchor.max-rank=1000"),
    "memory": ("safeanchor", "--training.memory-budget=1e-6"),
    "safety rank": ("salora", "--methods.salora.safety-rank=16"),
    "batch": ("plain", "--training.batch-size=1000"),
    "layers of a probe": ("adaptive-probe", "--methods.adaptive-probe.probe-layers=9"),
    "anchors, unified": ("unified", "--methods.unified.anchors=1000"),
    "share": ("interleaving", "--methods.interleaving.fraction=1e-9"),
    "layers of safe-lora": ("safe-lora", "--methods.safe-lora.layers=0"),
    "seeds on a mesh": ("plain", "--hardware.vmap-seeds=yes", "--mesh", "fsdp=8"),
    "a second row": ("plain sbr", "--methods.sbr.anchors=1000"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_the_run_refuses_the_dry_run_refuses(wrong, tmp_path, capsys):
    rows, setting, *more = wrong
    command = ["tiny", "--methods", *rows.split(), setting, *more]
    assert run.main([*command, "--dry-run"]) == cli.EXIT_USER
    dry = capsys.readouterr()
    assert dry.out == ""
    assert dry.err.count("\n") == 1
    work = ["--workdir", str(tmp_path / "w"), "--quiet"]
    assert run.main([*command, *work]) == cli.EXIT_USER
    assert capsys.readouterr().err == dry.err


# The default is made for larger models.
JOB = make_job("--methods.salora.safety-rank=4")


@pytest.mark.parametrize("row", few([*METHODS, *VARIANTS], METHODS))
def test_what_the_run_takes_the_dry_run_takes(row):
    rehearsal.rehearse(dataclasses.replace(JOB, methods=(row,)), STUDY)


def test_a_rehearsal_needs_no_weights_and_asks_no_judge(monkeypatch):
    def judge(data):
        raise AssertionError("it was asked")

    model = dataclasses.replace(STUDY.model, params=None)
    bare = dataclasses.replace(STUDY, model=model, unaligned=None, judge=judge)
    rows = ("safeanchor", "adaptive-judge", "lox", "sbr")
    folder = ChatOptions(unaligned_folder="there")
    job = dataclasses.replace(JOB, methods=rows, study=folder)
    rehearsal.rehearse(job, bare)
    without = dataclasses.replace(job, study=ChatOptions())
    with pytest.raises(ValueError, match="unaligned"):
        rehearsal.rehearse(without, bare)


def test_a_suffix_that_leaves_no_room_is_refused_before_any_work():
    from sbr_jax.studies import attacks

    search = {"suffix_length": 64, "prompts": 1, "steps": 1, "candidates": 2}
    with pytest.raises(ValueError, match="suffix_length: expected at most") as refused:
        attacks.build("gcg", search=search)
    most = int(str(refused.value).partition("at most ")[2].partition(",")[0])
    assert 20 < most < 64
    attacks.build("gcg", search={**search, "suffix_length": most})


@pytest.mark.parametrize("there", ["a file", "foreign files", "another run"])
def test_a_folder_that_the_run_refuses_is_refused(there, tmp_path, capsys):
    folder = tmp_path / "w"
    if there == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        name = "config.json" if there == "another run" else "mine.txt"
        (folder / name).write_text('{"training": {"learning_rate": 1}}')
    before = sorted(tmp_path.rglob("*"))
    command = ["tiny", "--methods", "plain", "--workdir", str(folder)]
    for more in (["--dry-run"], ["--quiet"]):
        assert run.main([*command, *more]) == cli.EXIT_USER
        assert str(folder) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_rehearses(monkeypatch):
    seen = []
    monkeypatch.setattr(dry_run, "rehearse", lambda job, study: seen.append(study))
    assert run.main(["tiny", "--dry-run"]) == 0
    assert seen == [STUDY]
