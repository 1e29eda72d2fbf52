"""Files of programs: whole or not at all, and never over somebody else's."""

import functools

import numpy as np
import pytest
import synthetic_run
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sbr_jax import files
from sbr_jax.programs import analyse, attack_map, cli, export, report, sweep
from sbr_jax.reporting.attack_map import write
from sbr_jax.typing import UserError

MINE = "# my own notes\n\n## Results\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return synthetic_run.write(tmp_path_factory.mktemp("x") / "run", ("plain",), (0,))


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- somebody else's ------------------------------------------------------------------

TAKEN = {
    "the text beside the page": (["--output", "X.html"], "X.md"),
    "the page": (["--output", "X.html"], "X.html"),
    "a figure": (["--output", "a/X.html", "--figures", "."], "trajectory.png"),
}


@pytest.mark.parametrize(("arguments", "taken"), TAKEN.values(), ids=TAKEN)
def test_a_report_writes_over_nothing_of_others(
    arguments, taken, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken).write_text(MINE)
    before = names(tmp_path)
    assert report.main([str(finished), *arguments]) == cli.EXIT_USER
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"expected to write {taken}" in said.err
    assert (tmp_path / taken).read_text() == MINE
    assert names(tmp_path) - {"a"} == before


def test_a_page_does_not_go_where_its_text_does(finished, tmp_path, capsys):
    output = tmp_path / "r.MD"
    assert report.main([str(finished), "--output", str(output)]) == cli.EXIT_USER
    assert f"{tmp_path / 'r.html'}" in capsys.readouterr().err
    assert not names(tmp_path)


def test_a_report_is_written_anew_over_one_of_ours(finished, tmp_path):
    command = [str(finished), "--output", str(tmp_path / "X.html"), "--quiet"]
    command += ["--figures", str(tmp_path / "figures")]
    assert report.main(command) == 0
    first = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert all(files.is_ours(path) for path in first)
    # One of an earlier version is ours too.
    (tmp_path / "X.html").write_text("<title>run: safety report</title>")
    (tmp_path / "X.md").write_text("# run\n")
    assert report.main(command) == 0
    assert first == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_sweep_writes_no_table_over_another(tmp_path, capsys):
    (tmp_path / "table.md").write_text(MINE)
    command = ["testbed-orders", "--workdir", str(tmp_path), "--dry-run"]
    assert sweep.main(command) == cli.EXIT_USER
    assert "found one there, but no cell" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == MINE


@pytest.mark.parametrize("name", ["map.md", "map.html", "map.png"])
def test_a_map_is_drawn_over_nothing_of_others(name, tmp_path):
    (tmp_path / name).write_text(MINE)
    with pytest.raises(UserError, match=f"{name}, found something there"):
        write(tmp_path, {}, 10.0, 5.0)


# --- whole or not at all --------------------------------------------------------------


def test_a_full_disk_leaves_the_report_as_it_was(
    finished, tmp_path, capsys, small_files
):
    small_files(64)
    page, text = tmp_path / "X.html", tmp_path / "X.md"
    page.write_text(files.MARK)
    text.write_text("before")
    command = [str(finished), "--output", str(page), "--quiet"]
    assert report.main(command) == cli.EXIT_SYSTEM
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"'{page}'" in said
    assert "make room" in said
    assert (page.read_text(), text.read_text()) == (files.MARK, "before")
    assert names(tmp_path) == {"X.html", "X.md"}


LONG = "x" * 300
PLACES = [
    (report, "RUN", "--output", LONG),
    (report, "RUN", "--output", "r.html", "--figures", LONG),
    (report, LONG),
    (report, "RUN", "--output", "/proc/r.html"),
    (sweep, "testbed-orders", "--workdir", LONG),
    (analyse, "demo", "--workdir", LONG),
    (attack_map, LONG),
    (export, "demo", "--workdir", LONG, "--output", "o"),
]


@pytest.mark.parametrize("command", PLACES)
def test_a_place_that_cannot_be_is_one_line(
    command, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    program, *arguments = command
    arguments = [str(finished) if part == "RUN" else part for part in arguments]
    assert program.main(arguments) in (cli.EXIT_USER, cli.EXIT_SYSTEM)
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert LONG in said.err or "/proc" in said.err


def test_what_is_cut_short_leaves_no_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def cut(place):
        place.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, cut)
    assert (path.read_text(), names(tmp_path)) == ("before", {"a"})


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to("target")
    files.write_text(tmp_path / "link", "after")
    assert (tmp_path / "target").read_text() == "after"
    assert (tmp_path / "link").is_symlink()


# --- folders of exports ---------------------------------------------------------------

MODEL = {"config.json", "model.safetensors", "tokenizer.json"}


def write_model(folder):
    for name in MODEL:
        (folder / name).write_text(name)


@pytest.mark.parametrize("before", ["none", "empty", "killed"])
def test_a_folder_is_filled_once_all_is_there(before, tmp_path):
    folder, seen = tmp_path / "out", []
    if before != "none":
        folder.mkdir()
    if before == "killed":
        (folder / files.PARTIAL).mkdir()
        (folder / files.PARTIAL / "config.json").write_text("half")
    assert files.is_free(folder)

    def write(place):
        write_model(place)
        seen.extend(path.name for path in folder.iterdir())

    files.fill_folder(folder, write)
    assert seen == [files.PARTIAL]
    assert names(folder) == MODEL
    assert (folder / "config.json").read_text() == "config.json"
    assert not files.is_free(folder)


def test_weights_on_a_full_disk_are_one_line(tmp_path, capsys, small_files):
    small_files(64)

    def write(place):
        save_file({"a": np.zeros(1000)}, place / "model.safetensors")

    folder = tmp_path / "out"
    fill = functools.partial(files.fill_folder, folder, write, (SafetensorError,))
    code = cli.guarded(fill, interrupted="")
    assert code == cli.EXIT_SYSTEM
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"'{folder}'" in said
    assert files.is_free(folder)
    assert not names(folder)
