"""Several processes for one run: what they are told, and what happens when they end."""

import dataclasses
import sys

import pytest
from tiny_preset import make_job

from sbr_jax.programs import spread
from sbr_jax.typing import UserError

METHODS = ("plain", "lisa")


@pytest.fixture
def job(tmp_path):
    made = make_job("--methods", *METHODS, "--seed", "0", "1")
    return dataclasses.replace(made, workdir=tmp_path / "run")


def instead(monkeypatch, code):
    """Every process runs some lines of Python; gives what each was to do."""
    given = []

    def command(words, folder, own):
        given.append((folder.name, spread.named(own)))
        return [sys.executable, "-c", code]

    monkeypatch.setattr(spread, "_command", command)
    return given


def test_every_variant_and_seed_falls_to_one_process(job, monkeypatch):
    given = instead(monkeypatch, "pass")
    spread.execute(job, (), 3)
    assert given == [
        ("0", ["plain/0", "lisa/1"]),
        ("1", ["plain/1"]),
        ("2", ["lisa/0"]),
    ]


def test_no_more_processes_than_work(job, monkeypatch):
    given = instead(monkeypatch, "pass")
    spread.execute(job, (), 9)
    assert len(given) == 4
    spread.execute(dataclasses.replace(job, methods=("plain",), seeds=(0,)), (), 9)
    assert len(given) == 4


def test_lines_are_passed_on(job, monkeypatch, capsys):
    instead(monkeypatch, "import sys; print('said'); print('warned', file=sys.stderr)")
    spread.execute(job, (), 2)
    assert capsys.readouterr() == ("said\n" * 2, "warned\n" * 2)


def test_the_code_of_a_mistake_is_that_of_the_command(job, monkeypatch):
    instead(monkeypatch, "raise SystemExit(2)")
    with pytest.raises(SystemExit) as error:
        spread.execute(job, (), 2)
    assert error.value.code == 2


def test_a_killed_process_is_named_with_a_remedy(job, monkeypatch):
    instead(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"2 of 2 processes were killed \(signal 9\)"):
        spread.execute(job, (), 2)


def test_no_process_outlives_a_failure_to_start_another(job, monkeypatch, tmp_path):
    sign = tmp_path / "sign"
    code = f"import pathlib, time; time.sleep(60); pathlib.Path({str(sign)!r}).touch()"
    given = instead(monkeypatch, code)
    command = spread._command

    def failing(words, folder, own):
        if given:
            raise KeyboardInterrupt
        return command(words, folder, own)

    monkeypatch.setattr(spread, "_command", failing)
    with pytest.raises(KeyboardInterrupt):
        spread.execute(job, (), 2)
    assert not sign.exists()


def test_a_part_has_the_words_of_the_whole(tmp_path):
    words = ["demo", "--workdir", "W", "--jobs=2", "--seed", "0", "1", "--quiet"]
    found = spread._command(words, tmp_path, [("plain", 1)])
    assert found[3:] == [
        *("demo", "--seed", "0", "1", "--quiet"),
        *("--workdir", str(tmp_path), "--only", "plain/1"),
    ]


def test_only_gives_each_variant_its_seeds(job):
    found = spread.chosen(job, ["lisa/1", "plain/0", "plain/1"])
    assert [(one.methods, one.seeds) for one in found] == [
        (("plain",), (0, 1)),
        (("lisa",), (1,)),
    ]


def test_auto_is_one_a_core_and_one_on_a_mesh(job, monkeypatch):
    monkeypatch.setattr(spread, "_cores", lambda: [0, 1, 2])
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
