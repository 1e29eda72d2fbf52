"""The report: tables and figures of what a run holds, a sentence for what it lacks."""

import html.parser
import json
import re

import numpy as np
import pytest
import synthetic_run

from sbr_jax.analysis import spectrum, stability
from sbr_jax.programs import report
from sbr_jax.reporting import figures, theme
from sbr_jax.reporting.report import build
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import (
    accuracy_table,
    cell,
    main_table,
    probe_table,
    projection_table,
    split,
    trajectory_table,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_run.write(tmp_path_factory.mktemp("run") / "made-up")


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, ids, and whether elements are closed."""

    VOID = ("meta", "hr", "br", "link", "img", "input")

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.open, self.names = [], [], [], []

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


def read_page(path):
    page = Page()
    text = path.read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert not page.open
    return page, text


def test_page_is_self_contained(folder):
    assert report.main([str(folder), "--quiet"]) == 0
    page, text = read_page(folder / "report.html")
    assert page.fetched == []
    assert "script" not in page.names
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.names.count("svg") == 6
    assert text.count('role="img"') == 6
    assert "prefers-color-scheme:dark" in text
    used = set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(page.ids)


def test_the_same_results_give_the_same_page(folder, tmp_path):
    pages = [tmp_path / "a" / "r.html", tmp_path / "b" / "r.html"]
    for path in pages:
        build([folder], path)
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert (tmp_path / "a" / "r.md").read_text().startswith("# made-up\n")


def test_table_numbers(run):
    values = np.array([line[-1] for line in run.metric("plain", "composite")])
    found = cell(run, "plain", "composite")
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std(ddof=1))
    kept = cell(run, "plain", "retention").mean
    assert kept == pytest.approx(100 * values.mean() / run.base["composite"])
    learnt, at_end = (
        cell(run, "plain", "accuracy_learned"),
        cell(run, "plain", "domain_accuracy"),
    )
    assert learnt.mean > at_end.mean + 5
    assert cell(run, "safeanchor", "triggers").mean == 1.0
    assert cell(run, "plain", "triggers").text() == "–"
    table = main_table(run)
    assert [row[0] for row in table.rows] == ["start", *run.methods]
    assert all(len(row) == len(table.head) for row in table.rows)
    for other in (trajectory_table(run), accuracy_table(run), projection_table(run)):
        assert other.rows
        assert all(len(row) == len(other.head) for row in other.rows)


def test_the_risk_probes_quality_is_shown_with_its_lowest_seed(tmp_path):
    folder = synthetic_run.write(tmp_path / "run", methods=("plain", "unified"))
    assert not probe_table(read_run(folder)).rows
    values = (1.0, 0.9, 0.95)
    with (folder / "results.jsonl").open("a") as file:
        for seed, auroc in enumerate(values):
            quality = {"auroc": auroc, "calibration_error": 0.01}
            line = {"method": "unified", "seed": seed, "stage": "subspace", "index": -1}
            line |= {"domain": None, "metrics": {}, "diagnostics": quality}
            file.write(json.dumps(line) + "\n")
    (row,) = probe_table(read_run(folder)).rows
    assert row == ("unified", f"{np.mean(values):.3f}", "0.900", "0.010")


def test_wide_tables_are_split_not_cut(run):
    parts = split(main_table(run), 60)
    assert len(parts) > 1
    columns = [name for part in parts for name in part.head[1:]]
    assert columns == list(main_table(run).head[1:])


def test_inert_projection_and_flat_spectrum_are_called_out(run, tmp_path):
    found = figures.warnings(run)
    assert [message.split(":")[0] for message in found] == ["safeanchor"]
    assert "inert" in found[0]
    flat = synthetic_run.write(
        tmp_path / "flat", methods=("safeanchor-exact",), decay=0.1
    )
    assert any("premise" in message for message in figures.warnings(read_run(flat)))


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("plain",)},
        {"methods": ("plain",), "composite": False, "seeds": (3,)},
        {"diagnostics": False},
        {"domains": ("medical",), "seeds": (0,)},
        {"methods": ("plain", *(f"row-{i}" for i in range(12)))},
    ],
    ids=["no-subspace", "losses", "no-diagnostics", "one-domain", "many-rows"],
)
def test_what_is_missing_is_said(tmp_path, options):
    folder = synthetic_run.write(tmp_path / "run", **options)
    assert report.main([str(folder), "--quiet"]) == 0
    page, text = read_page(folder / "report.html")
    run = read_run(folder)
    drawn = figures.drawings(run)
    missing = [drawing for drawing in drawn if drawing.figure is None]
    assert page.names.count("svg") == len(drawn) - len(missing)
    for drawing in missing:
        assert drawing.caption.endswith(".")
        assert drawing.caption.replace("'", "&#x27;") in text


def test_an_unfinished_seed_is_left_out(tmp_path):
    folder = synthetic_run.write(tmp_path / "run")
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    run = read_run(folder)
    assert run.seeds("safeanchor-exact") == [0, 1]
    assert run.seeds("plain") == [0, 1, 2]
    (folder / "timings.jsonl").unlink()
    (folder / "config.json").unlink()
    assert report.main([str(folder), "--quiet"]) == 0


def test_several_runs_share_a_page(folder, tmp_path, capsys):
    other = synthetic_run.write(tmp_path / "other", methods=("plain",))
    output = tmp_path / "out" / "both.html"
    arguments = [str(folder), str(other), "--output", str(output)]
    assert report.main([*arguments, "--figures", str(tmp_path / "png")]) == 0
    page, _ = read_page(output)
    assert len(page.ids) == len(set(page.ids))
    assert (tmp_path / "png" / "made-up-trajectory.png").stat().st_size > 10_000
    assert "safeanchor-exact" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.jsonl").write_text("{half a li")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "results.jsonl").write_text("")
    for folder in ("", tmp_path / "nowhere", empty, broken, unfinished):
        assert report.main([str(folder)] if folder else []) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: expected ")
        assert captured.err.count("\n") == 1
    assert list(empty.iterdir()) == []


def test_rank_and_shares():
    values = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    assert spectrum.rank_for_energy(values, energy=0.9).tolist() == [3, 1, 0]
    assert spectrum.rank_for_energy(values[:1], [100.0]).tolist() == [4]
    assert np.all(np.diff(spectrum.cumulative_share(values), axis=-1) >= 0)
    assert spectrum.participation_ratio(values).tolist()[1:] == [1.0, 0.0]


def test_distances_from_angles_match_projectors():
    rng = np.random.default_rng(0)
    a, b = (np.linalg.qr(rng.standard_normal((12, 3)))[0] for _ in range(2))
    angles = np.arccos(np.clip(np.linalg.svd(a.T @ b)[1], 0, 1))
    gap = np.linalg.norm(a @ a.T - b @ b.T) / np.sqrt(2)
    assert stability.chordal_distance(angles) == pytest.approx(gap)
    assert stability.overlap(angles) == pytest.approx(np.sum((a.T @ b) ** 2) / 3)


def test_chance_overlap_is_what_random_subspaces_share():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        a, b = (np.linalg.qr(rng.standard_normal((32, 4)))[0] for _ in range(2))
        found.append(np.sum((a.T @ b) ** 2) / 4)
    assert np.mean(found) == pytest.approx(stability.chance_overlap(4, 32), rel=0.05)


def test_every_palette_colour_has_a_dark_twin():
    assert set(theme.LIGHT) == set(theme.DARK)
    assert len(set(theme.LIGHT.values())) == len(theme.LIGHT)
