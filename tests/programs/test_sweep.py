"""Sweeps: planned, run seed by seed, continued after a kill, put into one table."""

import dataclasses
import itertools
import json
import re

import jax
import pytest
from tiny_preset import PRESET, STUDY

from sbr_jax import recipes
from sbr_jax.methods import METHODS, Hyperparameters
from sbr_jax.programs import attack_job, job, sweep, sweep_state
from sbr_jax.programs.sweep_state import Part
from sbr_jax.recipes import tuning
from sbr_jax.recipes.sweeps import SWEEPS
from sbr_jax.training.records import write_record
from sbr_jax.training.run_folder import RunFolder, run_of
from sbr_jax.training.stage_records import Line, write_result

ORDERS = {
    "forward": {
        "preset": "testbed",
        "methods": ("plain",),
        "domains": ("medical", "legal"),
    },
    "backward": {
        "preset": "testbed",
        "methods": ("plain",),
        "domains": ("legal", "medical"),
    },
}


@pytest.fixture
def tiny_testbed(monkeypatch):
    """The preset testbed over the tiny study, and two sweeps of it."""
    preset = dataclasses.replace(PRESET, name="testbed")
    monkeypatch.setattr(recipes, "load", lambda name: preset)
    monkeypatch.setitem(SWEEPS, "orders", ORDERS)
    refused = {
        "preset": "testbed",
        "methods": ("safeanchor-exact",),
        "changes": {"methods": {"safeanchor_exact": {"max_rank": 1000}}},
    }
    monkeypatch.setitem(SWEEPS, "refusing", {"bad": refused, "good": ORDERS["forward"]})


def arguments(name, folder, *more):
    return [name, "--workdir", str(folder), *more]


# --- the jobs -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_is_in_order(name, tmp_path):
    found = sweep.make_sweep(sweep.Arguments(name, tmp_path, seeds=2))
    assert list(found.jobs) == list(SWEEPS[name])
    # All of a seed comes before the next.
    turns = [found.jobs[part.cell].seeds.index(part.seed) for part in found.parts]
    assert turns == sorted(turns)
    assert len(found.parts) == len(set(found.parts))
    for cell, made in found.jobs.items():
        assert made.workdir == tmp_path / cell
        first = SWEEPS[name][cell].get("first_seed", 0)
        assert made.seeds == (first, first + 1)
        assert isinstance(made, attack_job.AttackJob) == (
            "attack" in SWEEPS[name][cell]
        )
    assert not list(tmp_path.iterdir())


def test_the_named_sweeps_cover_what_they_promise(tmp_path):
    table = SWEEPS["testbed-table"]
    published = [sweep.make_cell(table[c], tmp_path, (0,)) for c in table][:2]
    rows = [row for made in published for row in made.methods]
    assert set(METHODS) <= set(rows)
    assert len(rows) == len(set(rows))
    assert all(made.config.methods == Hyperparameters() for made in published)
    if tuning.BEST:
        tuned = sweep.make_cell(table["tuned"], tmp_path, (0,))
        assert set(tuned.methods) == set(tuning.BEST)
        for row, value in tuning.BEST.items():
            own = getattr(tuned.config.methods, row.replace("-", "_"))
            assert getattr(own, tuning.GRID[row][0]) == value
    orders = {cell["domains"] for cell in SWEEPS["testbed-orders"].values()}
    assert orders == set(itertools.permutations(("medical", "legal", "code")))
    cells = SWEEPS["testbed-map"]
    ratio, rate, epochs = 0.1, 0.001, 20
    made = sweep.make_cell(
        cells[f"ratio-{ratio}-rate-{rate}-epochs-{epochs}"], tmp_path, (0,)
    )
    assert made.ratio == ratio
    assert made.config.training.learning_rate == rate
    # Every example is seen 20 times, whatever the default number of steps.
    training = made.config.training
    assert training.steps_per_domain == -(
        -epochs * made.examples // training.batch_size
    )


def test_baselines_are_tuned_apart_from_the_table(tmp_path):
    for row, (option, values) in tuning.GRID.items():
        defaults = getattr(Hyperparameters(), row.replace("-", "_"))
        assert values[0] == getattr(defaults, option), row
        assert len(values) > 2
        assert tuning.BEST.get(row) in (None, *values[1:])
    for fields in SWEEPS["testbed-tuning"].values():
        made = sweep.make_cell(fields, tmp_path, (0, 1))
        assert made.study.split == "validation"
        assert min(made.seeds) >= 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "testbed", "method": ()}, "unknown field of a cell 'method'"),
        ({"preset": "testbed", "methods": ("plan",)}, "unknown method"),
        ({"preset": "testbed", "changes": {"x": {}}}, "unknown change of a cell 'x'"),
        ({"preset": "testbed", "changes": {"training": {"x": 1}}}, "not know x"),
    ],
)
def test_a_cell_that_cannot_be_meant_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.make_cell(fields, tmp_path, (0,))


def test_list_names_every_cell(capsys):
    assert sweep.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*SWEEPS, "legal-code-medical"))


# --- what is done, and what is left ---------------------------------------------------


def fake_stages(folder, row, seed, stages, seconds=10.0, domains=2):
    """Finished stages of a run, as the pipeline leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"training": {}, "domains": ["medical", "legal"][:domains]}
    write_record(folder / "config.json", config)
    names = [(0, "subspace"), (1, "train"), (4, "evaluate"), (5, "train")]
    names += [(8, "evaluate")]
    for number, stage in names[:stages]:
        write_result(
            RunFolder(folder).stage(row, seed, number, stage),
            run_of(config),
            Line(row, seed, stage, None, -1, {}),
            {"seconds": seconds},
        )


def test_time_is_read_from_finished_stages(tmp_path):
    found = sweep.make_sweep(sweep.Arguments("testbed-orders", tmp_path, seeds=2))
    assert sweep_state.spent(found) == {}
    assert sweep_state.remaining(found.parts, {}) is None
    first, second = list(found.jobs)[:2]
    fake_stages(tmp_path / first, "plain", 0, 5)
    # One stage short of the last evaluation is not finished.
    fake_stages(tmp_path / first, "safeanchor-exact", 0, 4)
    fake_stages(tmp_path / second, "plain", 0, 5, seconds=20.0)
    times = sweep_state.spent(found)
    assert times == {
        Part(first, "plain", 0): (50.0, True),
        Part(first, "safeanchor-exact", 0): (40.0, False),
        Part(second, "plain", 0): (100.0, True),
    }

    def left(*part):
        return sweep_state.remaining([Part(*part)], times)

    assert left(first, "plain", 1) == 50  # the same row in the same cell
    assert left("another", "plain", 0) == 75  # the same row elsewhere
    assert left(second, "safeanchor-exact", 0) == 75  # anything
    assert left(first, "safeanchor-exact", 0) == 35  # less what is spent
    assert sweep_state.remaining([], times) == 0


def test_folders_of_other_settings_and_of_one_run_are_refused(tmp_path, capsys):
    cell = next(iter(SWEEPS["testbed-orders"]))
    for folder, said in (
        (tmp_path / cell, "other settings or domains"),
        (tmp_path, f"{tmp_path} is the folder of one run"),
    ):
        fake_stages(folder, "plain", 0, 1)
        assert sweep.main(arguments("testbed-orders", tmp_path, "--dry-run")) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


# --- running --------------------------------------------------------------------------


def test_a_sweep_is_continued_after_a_kill(tiny_testbed, tmp_path, monkeypatch, capsys):
    whole = job.execute
    calls = []

    def killed_at_the_second(made, study):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append((made.workdir.name, made.methods, made.seeds))
        whole(made, study)

    monkeypatch.setattr(job, "execute", killed_at_the_second)
    given = arguments("orders", tmp_path, "--seeds", "1")
    assert sweep.main([*given, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    assert (
        "2 of 2 variants and seeds left, time not known yet" in capsys.readouterr().out
    )

    assert sweep.main(given) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert calls == [("forward", ("plain",), (0,))]
    # A result appears before the sweep is through.
    first = (tmp_path / "table.md").read_text()
    assert "| plain | forward | 1 |" in first
    assert "backward" not in first

    calls.clear()
    monkeypatch.setattr(
        job,
        "execute",
        lambda made, study: (calls.append(made.workdir.name), whole(made, study)),
    )
    assert sweep.main(given) == 0
    assert calls == ["backward"]
    captured = capsys.readouterr()
    assert "| forward | plain | 1 of 1 | – |" in captured.out
    assert re.search(
        r"1 of 2 variants and seeds left, about \d+ (s|min)\b", captured.out
    )
    assert "[2/2] backward  plain  seed 0" in captured.err
    calls.clear()
    assert sweep.main([*given, "--quiet"]) == 0
    assert calls == []

    table = (tmp_path / "table.md").read_text()
    head = next(x for x in table.splitlines() if x.startswith("| method"))
    for title in ("composite", "domain acc.", "s / step", "step memory, MiB"):
        assert title in head
    rows = [x for x in table.splitlines() if x.startswith("| plain")]
    assert [row.split(" | ")[1] for row in rows] == ["forward", "backward"]
    memory = json.loads((tmp_path / "forward" / "memory.json").read_text())
    base = 4 * sum(x.size for x in jax.tree.leaves(STUDY.model.params))
    # The step reads all weights, so it takes more than they do.
    assert base < memory["plain"] < 2**30


def test_a_row_that_cannot_be_run_does_not_stop_the_others(
    tiny_testbed, tmp_path, capsys
):
    given = arguments("refusing", tmp_path, "--seeds", "1", "--quiet")
    assert sweep.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 of 2 could not be run, the first being bad, safeanchor-exact" in error
    assert "max_rank" in error
    assert "| plain | good |" in (tmp_path / "table.md").read_text()


def test_an_attack_cell_is_run_by_the_attack(tmp_path, monkeypatch):
    found = sweep.make_sweep(sweep.Arguments("testbed-map", tmp_path, seeds=1))
    ran = []
    monkeypatch.setattr(attack_job, "execute", ran.append)
    monkeypatch.setattr(job, "execute", lambda *_: pytest.fail("not an attack"))
    sweep.execute(found, quiet=True)
    assert len(ran) == len(found.parts)
    assert {made.attack for made in ran} == {"poison"}
    assert not (tmp_path / "table.md").exists()  # nothing was finished


def test_cells_in_processes_of_their_own(tmp_path, monkeypatch):
    found = sweep.make_sweep(sweep.Arguments("testbed-orders", tmp_path, seeds=3))
    commands = []

    class Ended:
        def __init__(self, command, **options):
            commands.append(command[1:])
            self.returncode = 2 if "code-legal-medical" in command else 0

        def poll(self):
            return self.returncode

    monkeypatch.setattr(sweep.subprocess, "Popen", Ended)
    with pytest.raises(ValueError, match="could not finish code-legal-medical;"):
        sweep.execute_cells(found, 2, quiet=True)
    assert len(commands) == 6
    known = {"--cells", "--seeds", "--quiet", "--workdir"}
    for command in commands:
        assert known < {word.partition("=")[0] for word in command}
    # What a process is told, the program understands.
    first = next(c for c in commands if "medical-legal-code" in c)
    parsed = sweep.cli.parse(sweep.Arguments, first[3:], "sweep")
    assert parsed.cells == ("medical-legal-code",)
    assert parsed.seeds == 3
