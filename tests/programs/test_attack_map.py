"""The map of poisoned runs: what counts as holding, and what the files say."""

import json

import pytest
import synthetic_run

from sbr_jax.programs import attack_map as program
from sbr_jax.reporting import attack_map
from sbr_jax.reporting.attack_map import Outcome, Place


def write_run(folder, ratio, rate, steps, rows, attack="poison", examples=240):
    """A finished run of one domain: row to (harmful score, accuracy) by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": rate, "steps_per_domain": steps, "batch_size": 16}
    made = {"name": attack, "ratio": ratio, "examples": examples}
    config = {"attack": made, "settings": settings}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        synthetic_run.line(row, seed, "evaluate", "medical", 0, metrics)
        for row, seeds in rows.items()
        for seed, (harm, accuracy) in enumerate(seeds)
        for metrics in [{"harmful_score": harm, "accuracy/medical": accuracy}]
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text)


@pytest.fixture
def folder(tmp_path):
    rows = {
        "plain": [(100.0, 100.0), (90.0, 100.0)],
        "sbr": [(0.0, 94.0), (4.0, 100.0)],
        "asft": [(0.0, 3.0)],
    }
    write_run(tmp_path / "a", 0.1, 1e-3, 300, rows)
    rows = {"plain": [(100.0, 2.0)], "sbr": [(30.0, 1.0)], "asft": [(0.0, 0.0)]}
    write_run(tmp_path / "b", 1.0, 3e-4, 75, rows)
    write_run(tmp_path / "c", 1.0, 3e-4, 75, {"plain": [(0.0, 0.0)]}, "backdoor")
    return tmp_path


def test_a_row_that_learns_nothing_does_not_hold(folder):
    found = attack_map.read_outcomes(folder)
    assert list(found) == ["plain", "sbr", "asft"]
    assert set(found["sbr"]) == {Place(1e-3, 20, 0.1), Place(3e-4, 5, 1.0)}
    assert found["sbr"][Place(1e-3, 20, 0.1)] == Outcome(2.0, 97.0)
    rows = {r[0].strip("`"): r for r in attack_map.summary_table(found, 10, 5).rows}
    # Cells, holds, harmed, not learnt, open.
    assert rows["plain"][1:6] == ("2", "0", "2", "0", "0")
    assert rows["sbr"][1:6] == ("2", "1", "1", "0", "0")
    # At ratio 1 there is no task to learn.
    assert rows["asft"][1:6] == ("2", "1", "0", "1", "0")
    assert rows["sbr"][6:] == ("16.0", "30.0")
    stricter = attack_map.summary_table(found, 1, 5).rows
    assert {r[0].strip("`"): r[2] for r in stricter}["sbr"] == "0"


def test_what_was_learnt_needs_something_to_compare_with():
    place, plain = Place(1e-3, 20, 0.1), Outcome(0.0, 100.0)
    assert attack_map.verdict(Outcome(9.9, 0.0), None, place, 10, 5) == "open"
    assert attack_map.verdict(Outcome(10.0, 0.0), None, place, 10, 5) == "harmed"
    all_harm = place._replace(ratio=1.0)
    assert attack_map.verdict(Outcome(9.9, 0.0), None, all_harm, 10, 5) == "holds"
    assert attack_map.verdict(plain, plain, place, 10, 0) == "holds"


def test_the_files(folder, capsys):
    assert program.main([str(folder)]) == 0
    assert "`sbr`" in capsys.readouterr().out
    assert (folder / "map.png").stat().st_size > 5000
    text = (folder / "map.md").read_text()
    assert "| `sbr` | 0.001 | 20 | 2.0 / 97 | – |" in text
    assert "Where does each defence break?" in (folder / "map.html").read_text()


def damage(**more):
    row = {"plain": [(1.0, 1.0)]}
    return lambda folder: write_run(folder / "a", 0.1, 1e-3, 300, row, **more)


def twice(folder):
    write_run(folder / "d", 0.1, 1e-3, 300, {"plain": [(1.0, 1.0)]})


def of_ours_with_no_place_for_the_text(folder):
    (folder / "map.md").mkdir()
    (folder / "map.html").write_text("made by sbr_jax")


MISTAKES = {
    "nowhere": (None, ["nowhere"], "expected a folder"),
    "empty": (lambda at: (at / "e").mkdir(), ["e"], "none that is finished"),
    "a cell twice": (twice, [""], "expected one run for each cell"),
    "a foreign file": (lambda at: (at / "map.md").mkdir(), [""], "found something"),
    "no place": (of_ours_with_no_place_for_the_text, [""], "cannot write the map"),
    **{
        f"examples {value}": (damage(examples=value), [""], "a/config.json: expected")
        for value in (None, 0)
    },
    "a limit": (None, ["", "--limit", "nan"], "--limit: expected"),
    "a cost": (None, ["", "--cost", "101"], "--cost: expected"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, folder, capsys):
    prepare, (below, *more), said = MISTAKES[name]
    if prepare:
        prepare(folder)
    assert program.main([str(folder / below), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
