"""Differences between rows, seed by seed, against scipy's own paired test."""

import json
import re

import numpy as np
import pytest
import synthetic_run
from scipy import stats

from sbr_jax.reporting.columns import per_seed
from sbr_jax.reporting.paired import LEARNT, paired_table
from sbr_jax.reporting.runs import read_run

ROWS = ("plain", "safeanchor", "lean")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "made-up"
    return read_run(synthetic_run.write(folder, methods=ROWS))


def numbers(text):
    return [float(x) for x in re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", text).groups()]


def test_differences_and_intervals_are_those_of_a_paired_t_test(run):
    table = paired_table(run)
    ends = {m: per_seed(run, m, "composite") for m in ROWS}
    score = {m: (per_seed(run, m, "lowest"), per_seed(run, m, LEARNT)) for m in ROWS}
    best = max(ROWS, key=lambda m: np.mean(score[m]))
    assert [row[0] for row in table.rows] == [m for m in ROWS if m != best]
    assert table.notes[0].startswith(f"{best}, the best row by lowest and when learnt")
    place = table.head.index("composite") - 2
    for name, seeds, *cells in table.rows:
        assert int(seeds) == len(ends[name])
        test = stats.ttest_rel(ends[best], ends[name])
        interval = test.confidence_interval(0.95)
        wanted = [np.mean(ends[best] - ends[name]), interval.low, interval.high]
        np.testing.assert_allclose(numbers(cells[place]), wanted, atol=0.051)


def edited(folder, change):
    """A made-up run with each line changed, or dropped where that gives None."""
    path = synthetic_run.write(folder, methods=ROWS) / "results.jsonl"
    lines = [change(json.loads(x)) for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines if x is not None))
    return read_run(folder)


def test_the_lowest_is_of_all_domains_not_of_the_last(tmp_path):
    def dip(line):
        place = (line["method"], line["seed"], line["stage"], line["index"])
        if place == ("lean", 1, "evaluate", 0):
            line["metrics"]["composite"] = 12.5
        return line

    run = edited(tmp_path / "run", dip)
    ends = run.metric("lean", "composite")[:, -1]
    assert per_seed(run, "lean", "lowest").tolist() == [ends[0], 12.5, ends[2]]


def test_a_row_that_learns_nothing_is_not_the_best(tmp_path):
    def numb(line):
        if line["method"] == "plain" and line["stage"] == "evaluate":
            for key in line["metrics"]:
                line["metrics"][key] = 0.0 if key.startswith("accuracy/") else 100.0
        return line

    table = paired_table(edited(tmp_path / "run", numb))
    assert "plain" in {row[0] for row in table.rows}


def test_only_seeds_of_both_rows_count_and_one_tells_nothing(tmp_path):
    gone = {("plain", 2), ("lean", 1), ("lean", 2)}

    def without(line):
        return None if (line["method"], line["seed"]) in gone else line

    table = paired_table(edited(tmp_path / "run", without))
    assert {row[0]: row[1] for row in table.rows} == {"plain": "2"}


def test_one_row_has_nothing_to_differ_from(tmp_path):
    folder = synthetic_run.write(tmp_path / "run", methods=("plain",))
    assert not paired_table(read_run(folder)).rows
