"""Every benchmark runs at tiny sizes without its peer, and says which one is missing.

No time is compared with anything: speed is never a test.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import pytest
from tiers import few

from benchmarks import measure, shapes, worker

ROOT = Path(__file__).parents[2]
MISSING = "missing, so ours alone"
COMMANDS = {  # options of a short run, and whether it has a peer
    "lora_step": (["--domains", "prose", "--layers", "1"], True),
    "fisher": ([], True),
    "methods": ([], False),
    "projection": ([], False),
    "quantize": ([], False),
    "generation": ([], True),
    "gcg": (["--steps", "1"], True),
    "seeds": ([], False),
    "startup": ([], False),
    "growth": (["--axes", "rank"], False),
}


@pytest.fixture(autouse=True)
def _as_on_the_command_line():
    """These programs run with JAX as it comes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", few(COMMANDS, ["lora_step", "startup"]))
def test_command_prints_its_table_and_writes_its_lines(name, tmp_path, capsys):
    extra, has_peer = COMMANDS[name]
    lines = tmp_path / "lines.jsonl"
    options = ["--smoke", "--rounds", "2", "--json", str(lines), *extra]
    options += ["--peers", str(tmp_path / "python")]
    importlib.import_module(f"benchmarks.{name}").main(options)
    told = capsys.readouterr().out
    assert (MISSING in told) == has_peer
    assert re.search(rf"^{name}: .+ cores", told, re.MULTILINE)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["benchmark"] == name
        assert {"jax", "python"} <= row["versions"].keys()
        assert row["machine"]["cores"] >= 1
        assert row["seconds" if "seconds" in row else "seconds_per_step"] > 0


def test_make_bench_runs_all_commands_and_the_page_explains_them():
    text = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^BENCH \?= (.+)$", text, re.MULTILINE)
    assert sorted(listed.split()) == sorted(COMMANDS)
    page = (ROOT / "docs" / "speed.md").read_text()
    for name in COMMANDS:
        assert f"`{name}`" in page


def test_turns_go_in_both_orders_and_ratios_are_taken_inside_a_turn():
    log = []
    runs = {name: lambda name=name: log.append(name) or len(log) for name in "ab"}
    found = measure.interleave(runs, 4)
    assert "".join(log) == "abbaabba"
    assert found == {"a": [1, 4, 5, 8], "b": [2, 3, 6, 7]}
    assert measure.ratio([2.0, 9.0], [1.0, 3.0]) == measure.Ratio(2.5, 2.0, 3.0)


def test_a_child_that_ends_says_why():
    child = worker.Worker(sys.executable, "no_such_module", {})
    with child, pytest.raises(worker.WorkerError, match="No module named"):
        child.ask("run")


@pytest.mark.parametrize("name", shapes.DOMAINS)
def test_drawn_lengths_are_those_that_the_page_states(name):
    lengths = shapes.DOMAINS[name]
    found = shapes.draw(lengths, 4096, 0, 100)
    assert found["tokens"].shape[1] == lengths.longest >= found["length"].max()
    assert abs(found["length"].mean() / lengths.mean - 1) < 0.05
    answers = found["mask"].sum(axis=1)
    least, most, mean = lengths.answer
    assert answers.min() >= least
    assert answers.max() <= most
    assert abs(answers.mean() / mean - 1) < 0.1
    # The steps that are measured are no worse than usual for a peer that pads to them.
    few = shapes.draw(lengths, 64, shapes.SEED, 100)
    longest = [b["length"].max() for b in shapes.batches_of(few, 16)]
    wanted = {"label": 150, "choice": 282, "prose": 261}[name]
    assert abs(sum(longest) / len(longest) / wanted - 1) < 0.05
    assert abs(few["length"].mean() / lengths.mean - 1) < 0.05
    # The answer ends the example, so packing leaves no token out.
    last = found["mask"].shape[1] - found["mask"][:, ::-1].argmax(axis=1)
    assert (last == found["length"]).all()


def test_products_of_a_step_are_counted_for_tokens_and_answers():
    shape = shapes.Shape(8, 16, 2, 2, 1, 32)
    batch = shapes.dense(1, 4, 0, 32)
    frozen = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    adapted = 2 * (16 + 12 + 12 + 16)
    linear = 4 * 2 * (4 * frozen + 6 * adapted)
    attention = 12 * 8 * 2 * 16 / 2
    assert shapes.step_flops(shape, 2, batch) == linear + attention + 4 * 8 * 32 * 3
