"""SIGTERM to a process alone: it saves itself, and goes on to the same bytes."""

import json
import os
import signal

import pytest
from run_folder_case import go, results

from sbr_jax.distributed import Terminated, stopping
from sbr_jax.programs import cli
from sbr_jax.training import track

STEPS = 5
HISTORY = "stages/*/0/01-train/partial-*/history.json"


def run(folder):
    return go(folder, ("lisa",), steps_per_domain=STEPS, checkpoint_every=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def signalled(monkeypatch):
    """Sends SIGTERM to this process when a step's batch is drawn."""

    def at(number, times=1):
        draw = track.batch

        def drawn(dataset, size, seed, step):
            if step == number:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)
            return draw(dataset, size, seed, step)

        monkeypatch.setattr(track, "batch", drawn)

    return at


def steps_of(folder):
    return [json.loads(path.read_text())["step"] for path in folder.glob(HISTORY)]


@pytest.mark.parametrize("step", [0, 2])
def test_a_signalled_run_saves_itself_and_continues(
    step, whole, tmp_path, signalled, monkeypatch, capsys
):
    signalled(step)
    assert cli.guarded(lambda: run(tmp_path), interrupted="interrupted") == 143
    assert capsys.readouterr().err == "interrupted\n"
    assert steps_of(tmp_path) == [step + 1]
    monkeypatch.undo()
    run(tmp_path)
    assert results(tmp_path) == results(whole)
    assert not stopping.is_held()


def test_a_second_signal_is_not_waited_for(tmp_path, signalled):
    signalled(2, times=2)
    assert cli.guarded(lambda: run(tmp_path), interrupted="") == 143
    assert steps_of(tmp_path) == []


def test_a_damaged_checkpoint_is_named_and_skipped(
    whole, tmp_path, signalled, monkeypatch
):
    for step in (1, 2):
        signalled(step)
        with pytest.raises(Terminated), cli.terminal.terminable():
            run(tmp_path)
        monkeypatch.undo()
    assert sorted(steps_of(tmp_path)) == [2, 3]
    newest = max(tmp_path.glob("stages/lisa/0/01-train/partial-*"))
    file = max(newest.glob("tree/**/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"?" + file.read_bytes()[1:])
    said = rf"expected {newest}.* found another file: going on from step 2"
    with pytest.warns(UserWarning, match=said):
        run(tmp_path)
    assert results(tmp_path) == results(whole)
