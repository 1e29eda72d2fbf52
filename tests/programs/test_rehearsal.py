"""What a run refuses, its dry run refuses in the same line."""

import pytest
import tiny

from sbr_jax import recipes as configs
from sbr_jax.costs import dry_run, rehearsal
from sbr_jax.methods import ABLATIONS, METHODS
from sbr_jax.programs import cli, run

STUDY = tiny.study()
PRESET = configs.Preset(
    name="tiny",
    summary="",
    study=lambda domains, **options: STUDY,
    domains=("medical", "legal"),
    known_domains=lambda: ("medical", "legal"),
    methods=("plain",),
    seeds=(3,),
    settings={**vars(tiny.config(steps_per_domain=2)), "mesh": None},
)


@pytest.fixture(autouse=True)
def _preset(monkeypatch):
    monkeypatch.setitem(configs.MODULES, "tiny", "tiny")
    load = configs.load
    monkeypatch.setattr(
        configs, "load", lambda name: PRESET if name == "tiny" else load(name)
    )
    # Compiled programs stay where the tests' own are.
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)


WRONG = {
    "rank of a subspace": ("safeanchor", "safeanchor.max_rank=1000"),
    "the same, exactly": ("safeanchor-exact", "safeanchor-exact.max_rank=1000"),
    "the same, unified": ("unified", "unified.max_rank=1000"),
    "safety rank": ("salora", "salora.safety_rank=16"),
    "safety rank without tokens": ("salora", "salora.safety_rank=1000"),
    "rank of the adapter": ("plain", "lora_rank=1000"),
    "batch": ("plain", "batch_size=1000"),
    "layers of a probe": ("adaptive-probe", "adaptive-probe.layers=(9,)"),
    "anchors": ("sbr", "sbr.anchors=1000"),
    "anchors, unified": ("unified", "unified.anchors=1000"),
    "share": ("interleaving", "interleaving.fraction=1e-9"),
    "share of lisa": ("lisa", "lisa.alignment_share=1.0"),
    "layers of safe-lora": ("safe-lora", "safe-lora.layers=0"),
    "pruned share": ("antidote", "antidote.fraction=1.0"),
    "seeds on a mesh": ("plain", "vmap_seeds='yes'", "--mesh", "fsdp=1"),
    "a second row": ("plain sbr", "sbr.anchors=1000"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_the_run_refuses_the_dry_run_refuses(wrong, tmp_path, capsys):
    rows, setting, *more = wrong
    command = ["tiny", "--methods", *rows.split(), "--set", setting, *more]
    assert run.main([*command, "--dry-run"]) == cli.EXIT_USER
    dry = capsys.readouterr()
    assert dry.out == ""
    assert dry.err.count("\n") == 1
    work = ["--workdir", str(tmp_path / "w"), "--quiet"]
    assert run.main([*command, *work]) == cli.EXIT_USER
    assert capsys.readouterr().err == dry.err


@pytest.mark.parametrize("row", [*METHODS, *ABLATIONS])
def test_what_the_run_takes_the_dry_run_takes(row):
    # The default is made for larger models.
    sets = ("salora.safety_rank=4",) if row == "salora" else ()
    given = run.Arguments("tiny", methods=(row,), overrides=sets, dry_run=True)
    rehearsal.rehearse(run.make_plan(given), STUDY)


def test_a_rehearsal_needs_no_weights_and_asks_no_judge(monkeypatch):
    import dataclasses

    def judge(data):
        raise AssertionError("it was asked")

    model = dataclasses.replace(STUDY.model, params=None)
    bare = dataclasses.replace(STUDY, model=model, unaligned=None, judge=judge)
    rows = ("safeanchor", "adaptive-judge", "lox", "sbr")
    plan = run.make_plan(run.Arguments("tiny", methods=rows, dry_run=True))
    options = {"dtype": "bfloat16", "unaligned_folder": "there"}
    plan = dataclasses.replace(plan, study_options=options)
    rehearsal.rehearse(plan, bare)
    without = dataclasses.replace(plan, study_options={"dtype": "bfloat16"})
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


def test_a_dry_run_rehearses(monkeypatch):
    seen = []
    monkeypatch.setattr(dry_run, "rehearse", lambda plan, study: seen.append(study))
    assert run.main(["tiny", "--dry-run"]) == 0
    assert seen == [STUDY]
