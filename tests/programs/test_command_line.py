"""Every program: folders that are not ours, interrupts, and defects of our own."""

import json

import pytest
import synthetic_run

from sbr_jax.programs import analyse, cli, report, run, sweep
from tools import fill_docs

PROGRAMS = {"report": report, "analyse": analyse, "fill_docs": fill_docs}


def refused(main, arguments, capsys):
    """The one line that a program ends with; everything else about it is checked."""
    assert main([str(argument) for argument in arguments]) == cli.EXIT_USER
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("error: ").removesuffix("\n")


# --- how a program ends -------------------------------------------------------------


def test_an_interrupt_says_that_the_command_continues(monkeypatch, capsys):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", interrupted)
    assert run.main(["demo", "--workdir", "nowhere"]) == cli.EXIT_INTERRUPTED
    assert "the same command continues" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(job):
        raise ValueError("ours")

    monkeypatch.setattr(run, "execute", broken)
    with pytest.raises(ValueError, match="ours"):
        run.main(["demo", "--workdir", "nowhere"])


# --- folders ------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    return synthetic_run.write(tmp_path / "finished", ("plain",), seeds=(0,))


ASKED = {
    "run": (run, ["demo", "--methods", "plain", "--training.steps-per-domain", "1"]),
    "analyse": (analyse, ["demo"]),
    "sweep": (sweep, ["testbed-orders"]),
    "dry sweep": (sweep, ["testbed-orders", "--dry-run"]),
}


@pytest.mark.parametrize(
    ("name", "below"),
    [("run", ""), ("analyse", "deeper/down"), ("sweep", ""), ("dry sweep", "deeper")],
)
def test_a_workdir_that_is_a_file_is_one_line(name, below, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    program, arguments = ASKED[name]
    workdir = file / below if below else file
    said = refused(program.main, [*arguments, "--workdir", workdir], capsys)
    assert str(file) in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", [name for name in ASKED if name != "dry sweep"])
def test_a_folder_of_foreign_files_is_refused_by_name(name, tmp_path, capsys):
    program, arguments = ASKED[name]
    # A sweep keeps each cell's run in a folder below its own.
    folder = tmp_path / "medical-legal-code" if name == "sweep" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("mine")
    (folder / ".hidden").write_text("of the system")
    said = refused(program.main, [*arguments, "--workdir", tmp_path], capsys)
    assert f"{folder} holds thesis.tex but no " in said
    assert {path.name for path in folder.iterdir()} == {"thesis.tex", ".hidden"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("run", b"{half"), ("analyse", b"[1, 2]"), ("report", b"\xff")],
)
def test_a_damaged_config_is_named(name, content, finished, capsys):
    path = finished / "config.json"
    path.write_bytes(content)
    program, arguments = {**ASKED, "report": (report, [])}[name]
    where = [finished] if name == "report" else ["--workdir", finished]
    said = refused(program.main, [*arguments, *where], capsys)
    assert f"expected JSON in {path}" in said
    assert said.endswith("restore it, or choose another folder")


def test_a_config_of_another_program_is_no_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    program, arguments = ASKED["run"]
    said = refused(program.main, [*arguments, "--workdir", tmp_path], capsys)
    assert "another program's file" in said


TYPES = b'{"method": 1, "seed": 0, "stage": "a", "domain": "b", "metrics": {}}'


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("report", b'{"method": "pla'),
        ("report", b'{"method": "plain"}'),
        ("analyse", b"\xff\xfe"),
        ("analyse", TYPES),
        ("fill_docs", b"[1]"),
    ],
)
def test_a_damaged_line_of_results_is_named(name, line, finished, tmp_path, capsys):
    path = finished / "results.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + line)
    arguments = [finished]
    if name == "analyse":
        arguments = ["demo", "--workdir", tmp_path / "new", "--results", finished]
    said = refused(PROGRAMS[name].main, arguments, capsys)
    number = good.count(b"\n") + 1
    assert str(path) in said
    assert f"line {number}" in said
    assert said.endswith("run the same command again, which writes the file anew")
    assert not (tmp_path / "new").exists()


# --- several runs -------------------------------------------------------------------


@pytest.mark.parametrize("program", [report, fill_docs])
def test_the_same_folder_twice_is_refused(program, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    for again in (finished, "finished", finished / ".." / "finished"):
        said = refused(program.main, [finished, again], capsys)
        assert said == f"expected each folder once, got {again} twice: drop one"
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize("program", [report, fill_docs])
def test_what_is_no_run_is_told_with_what_to_do(program, finished, capsys):
    folder = finished.parent
    assert "got none: add DIR" in refused(program.main, [], capsys)
    said = refused(program.main, [folder], capsys)
    assert said.endswith(f"found runs below it: name {finished}")
    said = refused(program.main, [finished / "results.jsonl"], capsys)
    assert "found a file: name the folder" in said
    said = refused(program.main, [folder / "nowhere"], capsys)
    assert "found no such folder: run 'python -m experiments.run PRESET" in said


def test_pages_are_filled_in_a_folder_of_pages_only(finished, tmp_path, capsys):
    for folder in ("nowhere", "."):
        said = refused(fill_docs.main, [finished, "--docs", tmp_path / folder], capsys)
        assert f"--docs {tmp_path / folder}: expected pages" in said
    page = tmp_path / "methods" / "ewc.md"
    page.parent.mkdir()
    page.write_text("<!-- row: ewc -->\n<!-- end row -->\n")
    said = refused(fill_docs.main, [finished, "--docs", tmp_path], capsys)
    assert "expected finished rows that a page has a block for, got plain" in said
