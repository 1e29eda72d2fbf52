"""The report: tables and figures of what a run holds, a sentence for what it lacks."""

import copy
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import synthetic_run

from sbr_jax.programs import report
from sbr_jax.reporting import figures, tables
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import cell, main_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_run.write(tmp_path_factory.mktemp("run") / "made-up")


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, ids, and whether elements are closed."""

    VOID = ("meta", "hr", "br", "link", "img", "input")

    def __init__(self, path):
        super().__init__()
        self.fetched, self.ids, self.open, self.names = [], [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        for key in ("src", "href", "xlink:href", "data"):
            if key in attrs and not attrs[key].startswith("#"):
                self.fetched.append(attrs[key])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained(folder):
    assert report.main([str(folder), "--quiet"]) == 0
    page = Page(folder / "report.html")
    assert page.fetched == []
    assert "script" not in page.names
    assert "@import" not in page.text
    assert page.names.count("svg") == page.text.count('role="img"') == 6
    assert "prefers-color-scheme:dark" in page.text
    assert set(re.findall(r"url\(#([^)]+)\)", page.text)) <= set(page.ids)


@pytest.mark.thorough
def test_several_runs_share_a_page_and_the_same_results_give_the_same(
    folder, tmp_path, capsys
):
    other = synthetic_run.write(tmp_path / "other", methods=("plain",))
    outputs = [tmp_path / name / "both.html" for name in "ab"]
    for output in outputs:
        given = [str(folder), str(other), "--output", str(output)]
        assert report.main([*given, "--figures", str(tmp_path / "png")]) == 0
    assert "safeanchor-exact" in capsys.readouterr().out
    assert Page(outputs[0]).text == Page(outputs[1]).text
    assert outputs[0].with_suffix(".md").read_text().startswith("# made-up\n")
    assert (tmp_path / "png" / "made-up-trajectory.png").stat().st_size > 10_000


# --- tables ---------------------------------------------------------------------------


def test_table_numbers(run):
    values = np.array([line[-1] for line in run.metric("plain", "composite")])
    found = cell(run, "plain", "composite")
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std(ddof=1))
    kept = cell(run, "plain", "retention").mean
    assert kept == pytest.approx(100 * values.mean() / run.base["composite"])
    learnt = cell(run, "plain", "accuracy_learned").mean
    assert learnt > cell(run, "plain", "domain_accuracy").mean + 5
    assert cell(run, "safeanchor", "triggers").mean == 1.0
    assert cell(run, "plain", "triggers").text() == "–"
    assert [row[0] for row in main_table(run).rows] == ["start", *run.methods]
    made = tables.tables_of(run)
    assert len(made) == 5
    for table in made.values():
        assert all(len(row) == len(table.head) for row in table.rows)


def test_the_risk_probes_quality_is_shown_with_its_lowest_seed(tmp_path):
    folder = synthetic_run.write(tmp_path / "run", methods=("plain", "unified"))
    assert not tables.probe_table(read_run(folder)).rows
    values = (1.0, 0.9, 0.95)
    with (folder / "results.jsonl").open("a") as file:
        for seed, auroc in enumerate(values):
            quality = {"auroc": auroc, "calibration_error": 0.01}
            line = synthetic_run.line(
                "unified", seed, "subspace", None, -1, {}, quality
            )
            file.write(json.dumps(line) + "\n")
    (row,) = tables.probe_table(read_run(folder)).rows
    assert row == ("unified", f"{np.mean(values):.3f}", "0.900", "0.010")


def test_wide_tables_are_split_not_cut(run):
    parts = tables.split(main_table(run), 60)
    assert len(parts) > 1
    columns = [name for part in parts for name in part.head[1:]]
    assert columns == list(main_table(run).head[1:])


# --- what is missing, or wrong --------------------------------------------------------


def test_inert_projection_and_flat_spectrum_are_called_out(run, tmp_path):
    found = figures.warnings(run)
    assert [message.split(":")[0] for message in found] == ["safeanchor"]
    assert "inert" in found[0]
    flat = synthetic_run.write(
        tmp_path / "flat", methods=("safeanchor-exact",), decay=0.1
    )
    assert any("premise" in message for message in figures.warnings(read_run(flat)))


def test_kinds_that_are_inert_are_named_and_shares_have_columns(run):
    changed = copy.deepcopy(run.lines)
    for line in changed:
        if line["stage"] == "subspace" and line["method"] == "safeanchor-exact":
            line["diagnostics"]["alpha"]["k_proj"] = [0.97, 0.99, 1.0, 0.96]
            for name, share in (("held_out_share", 0.5), ("task_share", 0.25)):
                line["diagnostics"][name] = {"q_proj": [share] * 4}
            line["diagnostics"]["selectivity"] = {"q_proj": [2.0] * 4}
    found = dataclasses.replace(run, lines=changed)
    said = [x for x in figures.warnings(found) if x.startswith("safeanchor-exact")]
    assert said == [
        "safeanchor-exact: the projection is inert for k_proj (0.980) (mean α)."
    ]
    table = tables.projection_table(found)
    cells = dict(zip(table.head, table.rows[-1], strict=True))
    assert cells["method"] == "safeanchor-exact"
    names = ("held-out share", "task share", "selectivity")
    assert [cells[name] for name in names] == ["0.500", "0.250", "2.000"]


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("plain",), "composite": False, "seeds": (3,)},
        {"diagnostics": False, "domains": ("medical",), "seeds": (0,)},
        {"methods": ("plain", *(f"row-{i}" for i in range(12))), "seeds": (0,)},
    ],
    ids=["losses", "one-domain", "many-rows"],
)
def test_what_is_missing_is_said(tmp_path, options):
    folder = synthetic_run.write(tmp_path / "run", **options)
    if "composite" in options:
        (folder / "timings.jsonl").unlink()
        (folder / "config.json").unlink()
    assert report.main([str(folder), "--quiet"]) == 0
    page = Page(folder / "report.html")
    drawn = figures.drawings(read_run(folder))
    missing = [drawing for drawing in drawn if drawing.figure is None]
    assert page.names.count("svg") == len(drawn) - len(missing)
    for drawing in missing:
        assert drawing.caption.endswith(".")
        assert drawing.caption.replace("'", "&#x27;") in page.text


def test_an_unfinished_seed_is_left_out(tmp_path):
    folder = synthetic_run.write(tmp_path / "run")
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    run = read_run(folder)
    assert run.seeds("safeanchor-exact") == [0, 1]
    assert run.seeds("plain") == [0, 1, 2]
