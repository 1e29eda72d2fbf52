"""Several processes for one run: what they are told, and what happens when they end."""

import dataclasses
import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_preset import make_job

from sbr_jax.programs import cli, spread, terminal
from sbr_jax.training.records import plain_numbers, write_record
from sbr_jax.typing import UserError

METHODS = ("plain", "lisa")


MADE = make_job("--methods", *METHODS, "--seed", "0", "1")


@pytest.fixture
def job(tmp_path):
    return dataclasses.replace(MADE, workdir=tmp_path / "run")


def instead(monkeypatch, code):
    """Every process runs some lines of Python; gives what each was to do."""
    given = []

    def command(words, wanted, folder, own):
        given.append((folder.name, spread.named(own)))
        return [sys.executable, "-c", code]

    monkeypatch.setattr(spread, "_command", command)
    return given


def test_every_variant_and_seed_falls_to_one_process(job, monkeypatch):
    given = instead(monkeypatch, "pass")
    spread.execute(job, (), 3)
    assert given == [
        ("0", ["lisa/1", "plain/0"]),
        ("1", ["plain/1"]),
        ("2", ["lisa/0"]),
    ]


def test_one_piece_of_work_is_left_to_this_process(job, monkeypatch):
    given = instead(monkeypatch, "pass")
    spread.execute(dataclasses.replace(job, methods=("plain",), seeds=(0,)), (), 9)
    assert given == []


def test_a_run_that_has_lost_its_settings_is_left_to_one_process(job, monkeypatch):
    given = instead(monkeypatch, "pass")
    (job.workdir / "stages/plain/0").mkdir(parents=True)
    spread.execute(job, (), 2)
    assert given == []
    assert (job.workdir / "stages/plain/0").exists()


def test_lines_are_passed_on(job, monkeypatch, capsys):
    given = instead(
        monkeypatch, "import sys; print('said'); print('warned', file=sys.stderr)"
    )
    spread.execute(job, (), 9)
    # No more processes than work.
    assert len(given) == 4
    assert capsys.readouterr() == ("said\n" * 4, "warned\n" * 4)


def test_what_all_processes_complain_of_is_said_once(job, monkeypatch, capsys):
    code = "import sys; print('error: no data', file=sys.stderr); sys.exit(2)"
    instead(monkeypatch, code)
    with pytest.raises(SystemExit) as error:
        spread.execute(job, (), 2)
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: no data\n"


def test_that_finished_stages_are_kept_is_said_once(job, monkeypatch, capsys):
    instead(monkeypatch, f"print({cli.KEPT!r}); raise SystemExit(143)")
    with pytest.raises(SystemExit) as error:
        spread.execute(job, (), 2)
    assert error.value.code == 143
    assert capsys.readouterr() == ("", f"{cli.KEPT}\n")


def test_lines_that_nobody_takes_end_all_processes(job, monkeypatch):
    instead(monkeypatch, "while True: print('said', flush=True)")

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.EPIPE, "said")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="said") as error:
        spread.execute(job, (), 2)
    assert error.value.errno == errno.EPIPE


def test_a_run_of_other_settings_leaves_the_parts_alone(job):
    own = job.workdir / "jobs/0"
    own.mkdir(parents=True)
    settings = {**plain_numbers(job.config.mathematics()), "domains": ["legal"]}
    write_record(own / "config.json", settings)
    with pytest.raises(UserError, match="jobs/0 belongs to a run with other settings"):
        spread.gather(job)
    assert [path.name for path in own.iterdir()] == ["config.json"]
    assert not (job.workdir / "config.json").exists()


def test_a_killed_process_is_named_with_a_remedy(job, monkeypatch):
    instead(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"2 of 2 processes were killed \(signal 9\)"):
        spread.execute(job, (), 2)


def test_no_process_outlives_a_failure_to_start_another(job, monkeypatch, tmp_path):
    sign = tmp_path / "sign"
    code = f"import pathlib, time; time.sleep(60); pathlib.Path({str(sign)!r}).touch()"
    given = instead(monkeypatch, code)
    command = spread._command

    def failing(words, wanted, folder, own):
        if given:
            raise KeyboardInterrupt
        return command(words, wanted, folder, own)

    monkeypatch.setattr(spread, "_command", failing)
    with pytest.raises(KeyboardInterrupt):
        spread.execute(job, (), 2)
    assert not sign.exists()


def test_a_part_has_the_words_of_the_whole(job):
    words = ["demo", "--workdir", "W", "--jobs=2", "--seed", "0", "1", "--quiet"]
    found = spread._command(words, job, Path("-runs/0"), [("plain", 1)])
    assert found[found.index("-m") + 2 :] == [
        *("run", "demo", "--seed", "0", "1", "--quiet"),
        *("--workdir=-runs/0", "--only", "plain/1"),
    ]


def test_all_parts_have_the_date_of_the_whole(job):
    @dataclasses.dataclass(frozen=True)
    class Dated:
        date: str = "2024-07-26"

    dated = dataclasses.replace(job, study=Dated())
    found = spread._command(["demo"], dated, Path("W"), [("plain", 1)])
    assert "--study.date=2024-07-26" in found


@pytest.mark.parametrize("looked", [True, False])
def test_a_process_finds_packages_where_its_parent_did(monkeypatch, tmp_path, looked):
    (tmp_path / "this.py").write_text("print('of the working directory')")
    monkeypatch.chdir(tmp_path)
    path = [name for name in sys.path if name not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", [str(tmp_path)] * looked + path)
    command = terminal.python("this")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (said == "of the working directory\n") == looked


def test_only_gives_each_variant_its_seeds(job):
    found = spread.chosen(job, ["lisa/1", "plain/1", "plain/0"])
    assert [(one.methods, one.seeds) for one in found] == [
        (("lisa",), (1,)),
        (("plain",), (0, 1)),
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_shares_are_all_the_work_once_and_begin_at_different_variants(count, seeds):
    left = [(name, seed) for name in ("plain", "lean", "sbr") for seed in range(seeds)]
    parts = spread.shares(left, count)
    assert sorted(one for own in parts for one in own) == sorted(left)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if count <= 3:
        assert len({own[0][0] for own in parts}) == count


def test_auto_is_one_a_core_and_one_on_a_mesh(job, monkeypatch):
    monkeypatch.setattr(spread, "cores", lambda: [0, 1, 2])
    assert spread.processes(job, "auto", 2) == 2
    assert spread.processes(job, "auto", 9) == 3
    hardware = dataclasses.replace(job.config.hardware, mesh="data=1")
    config = dataclasses.replace(job.config, hardware=hardware)
    assert spread.processes(dataclasses.replace(job, config=config), "auto", 9) == 1


def test_an_accelerator_is_not_shared(job, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert spread.processes(job, "auto", 9) == 1
    with pytest.raises(UserError, match="expected one process, as all would share"):
        spread.processes(job, 2, 9)
