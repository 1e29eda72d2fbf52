"""Sizes that data or model cannot fill: refused before anything is measured."""

import pytest
import tiny

from sbr_jax import recipes as configs
from sbr_jax.programs import run, sweep
from sbr_jax.studies import attacks
from sbr_jax.studies.testbed import MOST_CALIBRATION_EXAMPLES
from sbr_jax.training import pipeline
from sbr_jax.training.study import Domain
from sbr_jax.typing import UserError


def never(base, adapter):
    """Stands for measurements that must not be made."""
    pytest.fail("measured before the sizes were looked at")


STUDY = tiny.study(probe=never, evaluate=never)
POOR = tiny.study(probe=never, evaluate=never, harmful=None)
WIDTH = tiny.CONFIG.width


def go(folder, row="plain", options=None, study=STUDY, **settings):
    config = tiny.with_options(tiny.config(**settings), {row: options or {}})
    pipeline.run(
        study,
        (row,),
        (0,),
        folder,
        config,
        ("medical",),
        quiet=True,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"batch_size": 100_000},
            "batch_size to be less than 128, twice the 64 ",
        ),
        ({"batch_size": 128}, "of domain medical, got 128"),
        ({"lora_rank": 100_000}, f"lora_rank to be at most {WIDTH}, the smaller"),
        ({"lora_rank": WIDTH + 1, "lora_targets": "up_proj"}, "side of up_proj, got"),
        (
            {"row": "sbr", "options": {"anchors": 25}},
            "anchors: expected at least 25 distinct harmful prompts, got 24",
        ),
        (
            {"row": "sbr:one", "study": POOR},
            "requests to draw from",
        ),
    ],
    ids=["batch", "twice", "rank", "target", "anchors", "no anchors"],
)
def test_what_cannot_be_filled_is_refused_before_any_work(tmp_path, given, message):
    with pytest.raises(UserError, match=message) as caught:
        go(tmp_path / "new", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


class MeasuredError(Exception):
    """The run got past every check."""


@pytest.mark.parametrize(
    "given",
    [
        {"batch_size": 127},
        {"lora_rank": WIDTH},
        {"row": "sbr", "options": {"anchors": 24}},
    ],
    ids=["batch", "rank", "anchors"],
)
def test_the_largest_size_that_fits_is_taken(tmp_path, given):
    def measured(base, adapter):
        raise MeasuredError

    with pytest.raises(MeasuredError):
        go(tmp_path, study=tiny.study(evaluate=measured), **given)


def test_attacks_with_few_rows_fit_their_default_batch(tmp_path):
    """The identity attack has ten rows, and the testbed batches of sixteen."""
    size = configs.load("testbed").training.batch_size
    for attack in attacks.ATTACKS.values():
        if attack.examples is None:
            continue
        domain = Domain(tiny.dataset(0, attack.examples), never)
        study = tiny.study(domains={"medical": domain}, evaluate=never)
        pipeline._check_sizes(study, ["medical"], tiny.config(batch_size=size))


def refused(main, arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("preset", ["demo", "testbed-hard"])
def test_the_world_has_only_so_many_calibration_examples(preset, tmp_path, capsys):
    arguments = [preset, "--workdir", str(tmp_path / "w"), "--set"]
    for count in (MOST_CALIBRATION_EXAMPLES + 1, 9_999_999):
        given = [*arguments, f"study.calibration_examples={count}"]
        said = refused(run.main, given, capsys)
        assert f"expected at most {MOST_CALIBRATION_EXAMPLES}" in said
        assert f"got {count}" in said
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["seeds", "jobs"])
def test_a_mistyped_count_of_a_sweep_is_refused(name, tmp_path, capsys):
    given = ["testbed-orders", "--workdir", str(tmp_path / "w"), f"--{name}", "9999999"]
    said = refused(sweep.main, given, capsys)
    assert f"--{name}: expected from 1 to 1000, got 9999999" in said
