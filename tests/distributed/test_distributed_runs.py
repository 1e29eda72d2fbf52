"""Several processes on eight devices do the real command's job as one would."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import distributed_child
import numpy as np
import pytest
from cloud_case import Cloud, wait_for

from sbr_jax import recipes
from sbr_jax.programs import main
from sbr_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]
CHILD = ROOT / "tests" / "distributed_child.py"
DEVICES = 8
RUN = ("run", "tiny", "--mesh", f"fsdp={DEVICES}")
PLAIN = ("--methods", "plain")
LIMIT = 480.0
"""Seconds after which a process that should have ended is a failure."""


def shared(devices):
    """Variables of a process with so many simulated devices."""
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # XLA sizes its pool by this, and devices that wait for each other fill it.
        "NPROC": "16",
        "SBR_JAX_WAIT": "120",
    }


def start(words, *, devices=DEVICES // 2, cwd=ROOT, child=CHILD, **environment):
    """One process of the real command, with simulated devices."""
    return subprocess.Popen(
        [sys.executable, str(child), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **shared(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def address():
    with socket.create_server(("", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


@contextlib.contextmanager
def together(*words, count=2, each=({}, {}), more=((), ())):
    """The processes of a job, two of which may differ; none is left behind."""
    where, devices = address(), DEVICES // count
    own = itertools.zip_longest(range(count), each, more)
    found = [
        start(
            [*RUN, *words, *(own_words or ()), "--distributed", f"{where},{count},{i}"],
            devices=devices,
            **(variables or {}),
        )
        for i, variables, own_words in own
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def ended(process):
    """Exit code and standard error of a process."""
    _, said = process.communicate(timeout=LIMIT)
    return process.returncode, said


def all_ended(*words, **options):
    """Exit codes and standard errors of all processes of a job."""
    with together(*words, **options) as processes:
        return [ended(process) for process in processes]


def read(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(folder):
    return (folder / "results.jsonl").read_bytes()


def plain(folder):
    """The lines of a run that one of `PLAIN` writes too."""
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    return b"".join(x for x in lines if json.loads(x)["method"] in ("base", "plain"))


@contextlib.contextmanager
def training(folder):
    """Two processes in the midst of the first domain, one step in half a second."""
    steps = folder.with_suffix(".steps")
    slow = {"SBR_JAX_PAUSE": "0.5", "SBR_JAX_STEPS": str(steps)}
    deadline = time.monotonic() + LIMIT
    each = (slow, {"SBR_JAX_PAUSE": "0.5"})
    with together("--workdir", folder, *PLAIN, each=each) as processes:
        # At the second, the first is compiled and done.
        while not steps.exists() or steps.stat().st_size < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        yield processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, all_ended("--workdir", folder)


def assert_close(one, two):
    """Equal JSON, numbers to 1e-5."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list):
        for x, y in zip(one, two, strict=True):
            assert_close(x, y)
    elif isinstance(one, float):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    else:
        assert one == two


@pytest.fixture
def alone(monkeypatch):
    """The command in the process of the tests, which has as many devices."""
    monkeypatch.setitem(recipes.MODULES, "tiny", "tiny")
    monkeypatch.setattr(recipes, "load", distributed_child.load)
    # The study of the child puts its own in place of it.
    monkeypatch.setattr(sharding, "place_batch", sharding.place_batch)
    return lambda *words: main([*map(str, (*RUN, *words))])


def test_two_processes_give_what_one_gives(whole, alone, tmp_path):
    folder, said = whole
    assert [code for code, _ in said] == [0, 0], said
    assert alone("--workdir", tmp_path) == 0
    assert_close(read(folder), read(tmp_path))


def test_the_first_writes_and_prints_and_the_other_keeps_a_log(whole):
    folder, said = whole
    assert said[0][1].count("  evaluate  ") == 2
    assert said[1][1] == ""
    log = (folder / "logs" / "host-01.log").read_text()
    assert log.count("  evaluate  ") == 2
    names = {path.name for path in folder.iterdir()}
    written = {"config.json", "results.jsonl", "summary.json", "timings.jsonl"}
    assert names == {*written, "stages", "logs", ".lock"}


def test_sigterm_to_one_stops_both_at_one_step_and_loses_nothing(whole, tmp_path):
    folder = tmp_path / "run"
    with training(folder) as processes:
        processes[1].send_signal(signal.SIGTERM)
        began = time.monotonic()
        found = [ended(process) for process in processes]
    assert [code for code, _ in found] == [143, 143], found
    assert time.monotonic() - began < 30
    assert found[0][1].splitlines()[-1].startswith("interrupted: finished stages are")
    (history,) = folder.glob("stages/plain/3/*-train/partial-*/history.json")
    assert 0 < json.loads(history.read_text())["step"] < 8
    assert [code for code, _ in all_ended("--workdir", folder, *PLAIN)] == [0, 0]
    assert (folder / "results.jsonl").read_bytes() == plain(whole[0])


@pytest.mark.thorough
def test_four_processes_of_two_devices_give_what_two_of_four_give(whole, tmp_path):
    found = all_ended("--workdir", tmp_path / "run", count=4)
    assert [code for code, _ in found] == [0] * 4, found
    assert_close(read(whole[0]), read(tmp_path / "run"))
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == [f"host-{i:02}.log" for i in (1, 2, 3)]


@pytest.mark.thorough
def test_one_process_continues_what_two_began(whole, alone, tmp_path):
    folder = tmp_path / "run"
    with training(folder) as processes:
        processes[0].send_signal(signal.SIGTERM)
        assert [ended(process)[0] for process in processes] == [143, 143]
    assert alone("--workdir", folder, *PLAIN) == 0
    expected = [json.loads(line) for line in plain(whole[0]).splitlines()]
    assert_close(expected, read(folder))


@pytest.mark.thorough
def test_twenty_kills_of_either_process_change_no_byte(whole, tmp_path):
    rng, kills, folders = random.Random(0), 0, 0
    slow = {"SBR_JAX_PAUSE": "0.3"}
    while kills < 20:
        folder, codes = tmp_path / str(folders), None
        while codes != (0, 0):
            # Starts and compilations are killed as well as steps and evaluations.
            wait, victim = rng.uniform(3, 30), rng.randrange(2)
            with together("--workdir", folder, each=(slow, slow)) as processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[victim].wait(wait if kills < 20 else LIMIT)
                killed = processes[victim].poll() is None
                if killed:
                    kills += 1
                    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
                    processes[victim].send_signal(number)
                codes, said = zip(*map(ended, processes), strict=True)
            # Left alone they finish; a partner that is awaited in vain says so with 2.
            assert killed or codes == (0, 0), said
            # JAX's own client aborts where its service is gone: 134 to a launcher.
            ends = (signal.SIGABRT, signal.SIGKILL, signal.SIGTERM)
            known = {0, 2, 134, 137, 143, *(-end for end in ends)}
            assert set(codes) <= known, said
        assert results(folder) == results(whole[0])
        folders += 1


@pytest.mark.thorough
def test_a_launch_on_two_workers_is_stopped_once_and_gives_the_same_table(
    whole, tmp_path
):
    workers, folder = Cloud(tmp_path), tmp_path / "run"
    (tmp_path / "real").touch()
    steps = tmp_path / "steps"
    environment = {
        **shared(DEVICES // 2),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_GRACE": "60",
        "TPU_PATIENCE": "60",
        "SBR_JAX_PAUSE": "0.3",
        "SBR_JAX_STEPS": str(steps),
    }
    command = [*RUN, "--workdir", folder, *PLAIN]
    words = map(str, ("--", "python", CHILD, *command))
    process = workers.start("launch", *words, **environment)
    try:
        # Both workers tell their steps; the first one compiles.
        wait_for(lambda: steps.exists() and steps.stat().st_size >= 4, LIMIT)
        pid = (tmp_path / "worker-1" / "sbr_jax.run" / "pid").read_text()
        os.killpg(int(pid), signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        workers.run("launch", "--stop")
    assert process.returncode == 0, printed
    assert workers.acts[:2] == ["run", "run"]
    assert (folder / "results.jsonl").read_bytes() == plain(whole[0])
    for number in (0, 1):
        log = (tmp_path / "logs" / f"worker-{number}.log").read_text()
        codes = re.findall(r"^exit (\d+)$", log, re.MULTILINE)
        assert codes == ["143", "0"]


def test_a_host_that_is_absent_is_named(tmp_path, monkeypatch, capsys):
    """It is told before there is anything of JAX: in the process of the tests."""
    monkeypatch.setenv("SBR_JAX_WAIT", "1")
    words = ["run", "demo", "--workdir", str(tmp_path)]
    assert main([*words, "--distributed", f"{address()},2,0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 came within 1 s; missing: process 1: start the same command" in line
    assert not list(tmp_path.iterdir())


def one_line(found, said):
    """Both ended with code 2, and the first alone said why."""
    assert [code for code, _ in found] == [2, 2], found
    (line,) = found[0][1].splitlines()
    assert said in line
    assert found[1][1] == ""


@pytest.mark.thorough
def test_hosts_with_folders_of_their_own_are_refused(tmp_path):
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
    began = time.monotonic()
    each = [{"cwd": place} for place in places]
    one_line(
        all_ended("--workdir", "run", each=each), "sees another folder of that name"
    )
    assert time.monotonic() - began < 60
