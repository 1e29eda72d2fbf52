"""The map of poisoned runs: what counts as holding, and what the files say."""

import json

import pytest

from sbr_jax.programs import attack_map
from sbr_jax.reporting import attack_map as drawn
from sbr_jax.reporting.attack_map import Outcome, Place


def write_run(folder, ratio, rate, steps, rows, attack="poison"):
    """A finished run of one domain: row to (harmful score, accuracy) by seed."""
    folder.mkdir(parents=True)
    config = {
        "attack": {"name": attack, "ratio": ratio, "examples": 240},
        "settings": {
            "learning_rate": rate,
            "steps_per_domain": steps,
            "batch_size": 16,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for row, seeds in rows.items():
        for seed, (harm, accuracy) in enumerate(seeds):
            metrics = {"harmful_score": harm, "accuracy/medical": accuracy}
            lines.append(
                {
                    "method": row,
                    "seed": seed,
                    "stage": "evaluate",
                    "domain": "medical",
                    "index": 0,
                    "metrics": metrics,
                    "diagnostics": {},
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text)
    (folder / "timings.jsonl").write_text("")


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


def test_cells_and_means_over_seeds(folder):
    found = drawn.read_outcomes(folder)
    assert list(found) == ["plain", "sbr", "asft"]
    assert set(found["sbr"]) == {Place(1e-3, 20, 0.1), Place(3e-4, 5, 1.0)}
    assert found["sbr"][Place(1e-3, 20, 0.1)] == Outcome(2.0, 97.0)


def test_a_row_that_learns_nothing_does_not_hold(folder):
    found = drawn.read_outcomes(folder)
    rows = {r[0].strip("`"): r for r in drawn.summary_table(found, 10, 5).rows}
    # Cells, holds, harmed, not learnt, open.
    assert rows["plain"][1:6] == ("2", "0", "2", "0", "0")
    assert rows["sbr"][1:6] == ("2", "1", "1", "0", "0")
    # At ratio 1 there is no task to learn.
    assert rows["asft"][1:6] == ("2", "1", "0", "1", "0")
    assert rows["sbr"][6:] == ("16.0", "30.0")
    stricter = drawn.summary_table(found, 1, 5).rows
    assert {r[0].strip("`"): r[2] for r in stricter}["sbr"] == "0"


def test_the_files(folder, capsys):
    assert attack_map.main([str(folder)]) == 0
    assert "`sbr`" in capsys.readouterr().out
    assert (folder / "map.png").stat().st_size > 5000
    text = (folder / "map.md").read_text()
    assert "| `sbr` | 0.001 | 20 | 2.0 / 97 | – |" in text
    assert "Where does each defence break?" in (folder / "map.html").read_text()


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    assert attack_map.main([str(tmp_path / "nowhere")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert attack_map.main([str(tmp_path / "empty")]) == 2
    assert "none that is finished" in capsys.readouterr().err
    write_run(folder / "d", 0.1, 1e-3, 300, {"plain": [(1.0, 1.0)]})
    assert attack_map.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "expected one run for each cell" in error
    assert len(error.strip().splitlines()) == 1


def test_what_was_learnt_needs_something_to_compare_with():
    place = Place(1e-3, 20, 0.1)
    assert drawn.verdict(Outcome(9.9, 0.0), None, place, 10, 5) == "open"
    assert drawn.verdict(Outcome(10.0, 0.0), None, place, 10, 5) == "harmed"
    all_harm = place._replace(ratio=1.0)
    assert drawn.verdict(Outcome(9.9, 0.0), None, all_harm, 10, 5) == "holds"
    plain = Outcome(0.0, 100.0)
    assert drawn.verdict(plain, plain, place, 10, 0) == "holds"


@pytest.mark.parametrize("value", ["nan", "-1", "101"])
@pytest.mark.parametrize("word", ["--limit", "--cost"])
def test_bounds_that_mean_nothing_are_refused(folder, value, word, capsys):
    assert attack_map.main([str(folder), word, value]) == 2
    assert f"{word}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("examples", [None, 0, "240"])
def test_a_damaged_config_is_named(folder, examples, capsys):
    path = folder / "a" / "config.json"
    config = json.loads(path.read_text())
    config["attack"]["examples"] = examples
    path.write_text(json.dumps(config))
    assert attack_map.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "a/config.json: expected numbers" in error
    assert len(error.strip().splitlines()) == 1


def test_a_map_that_cannot_be_written_is_one_line(folder, capsys):
    (folder / "map.md").mkdir()
    assert attack_map.main([str(folder)]) == 2
    assert "found something there" in capsys.readouterr().err
    # Over a map of ours nothing is asked before.
    (folder / "map.html").write_text("made by sbr_jax")
    assert attack_map.main([str(folder)]) == 2
    assert "cannot write the map" in capsys.readouterr().err
