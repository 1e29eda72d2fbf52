"""What `pip install` brings: the package alone, and a command for every program."""

import importlib
import tomllib
from pathlib import Path

import pytest

import sbr_jax.programs
from sbr_jax.programs import ASKED, PROGRAMS, cli, main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_only_the_library_is_installed():
    setuptools = pytest.importorskip("setuptools")
    options = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_packages(ROOT, **options)
    assert {name.partition(".")[0] for name in found} == {"sbr_jax"}
    everything = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "sbr_jax").rglob("__init__.py")
    }
    assert set(found) == everything


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_command_and_the_module_are_the_same(name, monkeypatch, capsys):
    assert PROJECT["project"]["scripts"] == {"sbr-jax": "sbr_jax.programs:main"}
    program = importlib.import_module(f"experiments.{name.replace('-', '_')}")
    assert program.main is main
    source = Path(program.__file__).read_text(encoding="utf-8")
    assert f'main(["{name}", *sys.argv[1:]])' in source
    target = importlib.import_module(f"sbr_jax.programs.{name.replace('-', '_')}")
    seen = []
    monkeypatch.setattr(target, "main", lambda words: seen.append(words) or 7)
    assert main([name, "--list"]) == 7
    assert seen == [["--list"]]


def test_messages_name_the_command_that_was_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/sbr-jax", "run"])
    assert cli.command("run") == "sbr-jax run"
    monkeypatch.setattr("sys.argv", ["/clone/experiments/run.py"])
    assert cli.command("run") == "python -m experiments.run"


def test_a_core_that_is_alone_says_what_to_install(monkeypatch, capsys):
    extra = " ".join(PROJECT["project"]["optional-dependencies"]["experiments"])
    assert all(package in extra for package in ASKED)
    monkeypatch.setattr(sbr_jax.programs, "ASKED", ("flax_that_is_not_there",))
    assert main(["run", "--list"]) == cli.EXIT_USER
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'sbr_jax[experiments]'" in said


def test_no_program_imports_another():
    folder = Path(sbr_jax.programs.__file__).parent
    words = [name.replace("-", "_") for name in PROGRAMS]
    for name in words:
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        for other in {*words} - {name}:
            assert f"programs import {other}\n" not in text
            assert f"programs.{other} import" not in text
