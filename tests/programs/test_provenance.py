"""Published tables: every measured row says by which code, and one table shows one."""

import json
import re
import shutil

import pytest
import synthetic_run
import tiny

from sbr_jax.programs import cli
from sbr_jax.provenance.code_version import ROOT
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import cell
from sbr_jax.training import code_record, pipeline
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stages import Stages
from sbr_jax.typing import UserError
from tools import fill_docs, provenance
from tools.markdown_tables import MARK, page_tables
from tools.provenance import MANIFEST, PAGES, problems, read_manifest


def test_published_tables_show_one_version_of_the_code_or_mark_what_is_older():
    assert problems() == []
    manifest = read_manifest()
    tables = manifest.tables.values()
    found = [m for table in tables for line in table.lines for m in line]
    assert all(re.fullmatch("[0-9a-f]{10}", m.code) for m in found)
    assert all(re.fullmatch("[0-9a-f]{7}", m.commit) for m in found)
    assert manifest.to_json() == (ROOT / MANIFEST).read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path):
    """A copy of the pages and the manifest."""
    for pattern in (*PAGES, MANIFEST):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


def edit(site, page, old, new):
    text = (site / page).read_text(encoding="utf-8")
    assert re.search(old, text, re.M), old
    text = re.sub(old, new, text, count=1, flags=re.M)
    (site / page).write_text(text, encoding="utf-8")


PARTS, LISA, CHOOSE, TUNE = (
    "experiments/README.md",
    "docs/methods/lisa.md",
    "docs/choose.md",
    "docs/tune.md",
)
RESULTS, CLAIMS, README = "docs/results.md", "docs/claims.md", "README.md"
NEW = "\n| row | a |\n| -- | -: |\n| `plain` | 45.7 |\n"
UNKNOWN = "expected measured rows of known code"
FAULTS = {
    "a mark too few": (PARTS, r"^(\| `safeanchor-exact:random`) †", r"\1", "run it"),
    "a mark too many": (RESULTS, r"^(\| `lean`)", r"\1 †", "marked with †"),
    "an unmarked number": (RESULTS, r"^(\| `sbr` .* 0\.0) †", r"\1", "poisoned"),
    "rows in another order": (
        RESULTS,
        r"^(\| `lisa`.*)\n(\| `safe-lora`.*)$",
        r"\2\n\1",
        "expected the row lisa",
    ),
    "a new table": (CHOOSE, r"\Z", NEW, UNKNOWN),
    "of another title": (CHOOSE, r"\Z", NEW.replace("row", "trained with"), UNKNOWN),
    "a trial of no commit": (TUNE, r"(measured once) at \w+", r"\1", UNKNOWN),
    "a table twice": (CHOOSE, r"\Z", f"\n<!-- table: stories -->{NEW}", "found twice"),
    "no sentence below": (PARTS, r"^† Measured.*\n", "", "a sentence with †"),
    "a figure with an idle mark": (
        README,
        r"^Composite safety in",
        "† Drawn from an older run. Composite safety in",
        "trajectory.png: marked with †",
    ),
    "a figure of unknown rows": (README, "trajectory", "another", "rows of figures/a"),
    "a quoted number": (CLAIMS, "89.8 ± 4.1 †", "89.8 ± 4.1", "4.1: only rows marked"),
    "another hash": (LISA, r"[0-9a-f]{10} \|$", "0123456789 |", "run it again"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told(site, fault):
    page, old, new, named = fault
    edit(site, page, old, new)
    told = problems(site)
    assert any(named in line for line in told), told


def test_a_row_measured_again_with_other_code_must_be_marked(site):
    """The kind behind it all: two rows of one table, only one of them run again."""
    found = json.loads((site / MANIFEST).read_text())
    (measured, *_) = found["tables"]["defences"]["lines"][0]
    assert measured["row"] == "plain"
    measured["code"] = "0123456789"
    (site / MANIFEST).write_text(json.dumps(found))
    (problem,) = problems(site)
    assert "`plain`: measured with other code than the version" in problem


# --- the command ----------------------------------------------------------------------


def test_the_command_names_the_rows_that_are_older_than_the_code(capsys):
    assert provenance.main([]) == 0
    told = capsys.readouterr().out
    assert "poison: plain" in told
    assert "expected" not in told


def test_the_code_at_hand_can_become_a_version(site, capsys, monkeypatch):
    monkeypatch.setattr(provenance, "code_hash", lambda row, study: "0123456789")
    assert provenance.main(["--tree", str(site), "--record", "abcdef0"]) == 0
    manifest = read_manifest(site)
    # Of every row ever recorded: a table of another version may show any.
    for study, rows in manifest.codes["abcdef0"].items():
        older = [codes.get(study, {}) for codes in manifest.codes.values()]
        assert set(rows) == set().union(*older)
    assert set(manifest.codes["abcdef0"]) == set().union(*manifest.codes.values())
    assert manifest.codes["abcdef0"]["testbed"]["plain"] == "0123456789"
    assert manifest.tables == read_manifest().tables
    assert problems(site) == []
    capsys.readouterr()


def test_a_folder_without_pages_is_refused(tmp_path, capsys):
    assert provenance.main(["--tree", str(tmp_path)]) == cli.EXIT_USER
    assert f"expected {MANIFEST} in it" in capsys.readouterr().err


# --- what a run records ---------------------------------------------------------------


def record(folder, row, *hashes, seeds=(0,)):
    for seed in seeds:
        for code in hashes:
            code_record.add(folder / "stages" / row.replace(":", "+") / str(seed), code)


def test_the_code_of_a_row_is_read_back(tmp_path):
    folder = synthetic_run.write(tmp_path / "run", ("plain", "ewc"), seeds=(0, 1))
    assert read_run(folder).code("ewc") is None
    record(folder, "ewc", "a" * 10)
    assert read_run(folder).code("ewc") is None  # Seed 1 is not known.
    record(folder, "ewc", "a" * 10, seeds=(0, 1))
    assert read_run(folder).code("ewc") == "a" * 10
    record(folder, "ewc", "b" * 10, seeds=(1,))
    assert read_run(folder).code("ewc") == "mixed"
    path = folder / "stages/ewc/1/code.json"
    assert json.loads(path.read_text()) == ["a" * 10, "b" * 10]
    path.write_text("{}")
    with pytest.raises(UserError, match="expected a list of hashes in"):
        read_run(folder).code("ewc")


def test_a_run_records_the_code_of_what_it_computes_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "evaluate_start", lambda *_: None)
    monkeypatch.setattr(pipeline, "run_group", lambda *_: None)
    monkeypatch.setattr(RunFolder, "publish", lambda *_: {})
    monkeypatch.setattr(Stages, "require_usable", lambda self: None)
    monkeypatch.setattr(Stages, "require_complete", lambda self: None)
    study, seeds = tiny.study(), tmp_path / "stages" / "plain"

    def go(code, *seeds):
        domains, settings = ["medical"], tiny.config()
        more = {"code": lambda row: code, "quiet": True}
        pipeline.run(study, ["plain"], seeds, tmp_path, settings, domains, **more)

    go("old", 0)
    monkeypatch.setattr(Stages, "finished", lambda self, number: self.seed == 0)
    go("new", 0, 1)  # Seed 0 is finished: nothing of it is computed anew.
    assert code_record.read(seeds / "0") == ["old"]
    assert code_record.read(seeds / "1") == ["new"]
    go("newer", 0, 1)  # Seed 1 was interrupted.
    assert code_record.read(seeds / "1") == ["new", "newer"]


def test_filled_rows_carry_their_hash_and_a_mark_where_they_are_older(site, tmp_path):
    folder = synthetic_run.write(tmp_path / "runs" / "x", ("plain", "ewc"), seeds=(0,))
    manifest = read_manifest(site)
    code = manifest.codes[manifest.version]["testbed"]["ewc"]
    record(folder, "plain", "0123456789")
    record(folder, "ewc", code)
    assert fill_docs.main([str(folder), "--docs", str(site / "docs")]) == 0
    assert problems(site) == []
    text = (site / "docs/methods/ewc.md").read_text(encoding="utf-8")
    (table,) = (t for t in page_tables(text) if "code" in t.head)
    assert [line[0] for line in table.lines] == [f"`plain` {MARK}", "`ewc`"]
    assert [line[-1] for line in table.lines] == ["0123456789", code]
    assert MARK in table.below


def fill_table(site, folder, table, *more, commit=("--commit", "abcdef0")):
    where = [str(folder), "--docs", str(site / "docs"), "--table", table]
    return fill_docs.main([*where, *commit, *more])


def test_rows_measured_again_come_into_a_named_table(site, tmp_path, capsys):
    folder = synthetic_run.write(tmp_path / "x", ("plain", "safeanchor"), seeds=(0, 1))
    manifest = read_manifest(site)
    record(folder, "plain", "0123456789", seeds=(0, 1))
    code = manifest.codes[manifest.tables["parts"].version]["testbed"]["safeanchor"]
    record(folder, "safeanchor", code, seeds=(0, 1))
    assert fill_table(site, folder, "parts", "--keep", "s / step") == 0
    assert "filled plain, safeanchor" in capsys.readouterr().out
    assert problems(site) == []
    text, run = (site / PARTS).read_text(encoding="utf-8"), read_run(folder)
    (table,) = (t for t in page_tables(text) if t.name == "parts")
    assert [line[0] for line in table.lines[1:3]] == [f"`plain` {MARK}", "`safeanchor`"]
    composite = cell(run, "safeanchor", "composite")
    assert table.lines[2][1] == composite.text()
    assert table.lines[2][3] == cell(run, "safeanchor", "refusal").text().split()[0]
    assert table.lines[2][-1] == "0.133"
    # Every other line is as it was.
    before = (ROOT / PARTS).read_text(encoding="utf-8").splitlines()
    changed = [x for x in text.splitlines() if x not in before]
    assert len(changed) == 2


def test_rows_of_unknown_code_stay_out_of_tables(site, tmp_path, capsys):
    folder = synthetic_run.write(tmp_path / "x", ("plain", "ewc"), seeds=(0,))
    record(folder, "ewc", "a" * 10, "b" * 10)
    for table, refused in {
        "parts": "expected the row plain by one known code, got none",
        "none": "table none: expected one of",
        "unified-parts": "expected a finished row of it, got ewc, plain",
    }.items():
        assert fill_table(site, folder, table) == cli.EXIT_USER
        assert refused in capsys.readouterr().err
    assert fill_table(site, folder, "parts", commit=()) == cli.EXIT_USER
    assert "add --commit" in capsys.readouterr().err
