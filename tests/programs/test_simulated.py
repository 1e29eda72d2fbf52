"""A CPU that stands for several devices: its threads, and the documented command."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from sbr_jax.programs import cli

ROOT = pathlib.Path(__file__).parents[2]
FLAG = "--xla_force_host_platform_device_count"
ASKED = {
    "nobody": ({}, 1, None),
    "the variable": ({"JAX_NUM_CPU_DEVICES": "8"}, 8, 16),
    "the flag": ({"XLA_FLAGS": f"--xla_dump_to=x {FLAG}=4"}, 4, 8),
    "no number": ({"JAX_NUM_CPU_DEVICES": "many"}, 1, None),
    "threads of one's own": ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "9"}, 8, 9),
}


@pytest.mark.parametrize(("given", "count", "threads"), ASKED.values(), ids=ASKED)
def test_simulated_devices_get_threads_of_their_own(given, count, threads, monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC"):
        monkeypatch.setenv(name, "")  # So that it is put back, whatever is set here.
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cli.simulated_devices() == count
    cli.make_room_for_devices()
    assert os.environ.get("NPROC") == (None if threads is None else str(threads))


@pytest.mark.parametrize("given", [None, "2"])
def test_lapack_gets_one_thread_unless_told_otherwise(given, monkeypatch):
    name = "OPENBLAS_NUM_THREADS"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    cli.decompose_in_one_thread()
    assert os.environ[name] == (given or "1")


def test_a_program_is_loaded_without_lapack():
    """Its threads are counted when it is loaded: too early, and the setting is lost."""
    code = "import sys, sbr_jax.programs.run; print('scipy.linalg' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr[-2000:]


@pytest.mark.thorough
def test_the_documented_command_runs_on_few_cores(tmp_path):
    text = (ROOT / "docs/meshes.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^(JAX_PLATFORMS=cpu .*)$", text, re.M)
    words = shlex.split(line)
    given = dict(word.split("=", 1) for word in words if re.match(r"JAX_\w+=", word))
    place = words.index("-m")
    words = [sys.executable, *words[place:]]
    words[words.index("--workdir") + 1] = str(tmp_path / "run")
    words += ["--methods", "plain", "--seed", "0", "--domains", "medical", "--quiet"]
    words += ["--training.steps-per-domain", "4"]
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        words, env=clean | given, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} >= {"base", "train"}
