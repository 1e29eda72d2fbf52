"""Mistakes on the command line: one line, exit code 2, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbr_jax.programs import PROGRAMS, cli, main
from tools import fill_docs

RUN = "run demo --workdir W"
HARD = "run testbed --workdir W"
POISON = "attack testbed --workdir W --attack poison"
GCG = "attack testbed --workdir W --attack gcg"
ANALYSE = "analyse demo --workdir W"
SWEEP = "sweep testbed-table --workdir W"
EXPORT = "export demo --workdir W"
PLAN = "plan --model llama2-7b"
SLICE = f"{PLAN} --topology v5e:4x4"
CHAT = "run llama2-7b --workdir W --model M --data D"

MISTAKES = {
    # Programs and presets.
    "": "unknown program ''",
    "run": "expected a preset first, got none",
    "run --workdir W": "expected a preset first, got --workdir",
    "run demmo --workdir W": "unknown preset 'demmo'; nearest: demo",
    "attack": "expected a preset first, got none (known: testbed, testbed-hard, "
    "testbed-2, smollm2, llama2-7b)",
    "attack stories --workdir W": "unknown preset 'stories'",
    "analyse": "python -m experiments.analyse demo --help shows all settings",
    "export": "expected the run's preset, got none",
    "sweep": "expected a sweep, got none",
    "sweep testbed-tabel": "unknown sweep 'testbed-tabel'; nearest: testbed-tab",
    # Words of the parser.
    f"{RUN} --learning-rate 1": "nearest: --training.learning-rate",
    f"{RUN} --seed x": "--seed: expected [INT [INT ...]], got 'x'; see python -m",
    f"{RUN} --training.lora-rank=1 --training.lora_rank=1": "--training.lora-rank once",
    f"{RUN} --quiet True": "unexpected word 'True'; a switch is --NAME or --no-NAME",
    f"{RUN} --training.batch-size": "--training.batch-size: expected INT, got none",
    f"{RUN} - ---": "unknown option '---'",
    # Processes.
    f"{RUN} --jobs 0": "--jobs: expected auto, or from 1 to 1000, got 0",
    f"{RUN} --jobs 2 --only plain/0": "--jobs 2 with --only: expected one of the two",
    f"{RUN} --jobs 2 --mesh data=8": "--jobs 2 with a mesh: expected one process",
    f"{RUN} --only plain/0 --harness": "--only with --harness: expected a whole run",
    f"{RUN} --jobs 2 --distributed localhost:1,2,0": "--jobs is the work of one",
    f"{RUN} --harness --distributed localhost:1,2,0": "--harness is the work of one",
    f"{RUN} --only": "expected at least one variant and seed, got none",
    f"{RUN} --only plain/7": "unknown variant and seed 'plain/7'",
    f"{RUN} {'x' * 300}": f"unexpected word '{'x' * 300}'",
    "run demo --workdir=": "--workdir: expected a value, got ''",
    "run demo": "expected a folder for the results, got none: add --workdir runs/demo",
    # Methods, domains, seeds, mesh.
    f"{RUN} --methods": "expected at least one method, got none",
    f"{RUN} --methods safeanchor-exact:no-anchr": "nearest: safeanchor-exact:no-anchor",
    f"{RUN} --domains medcal": "unknown domain 'medcal'; nearest: medical",
    f"{RUN} --seed -1": "a whole number in [0, 4294967295], got -1; others",
    f"{RUN} --seed {2**32}": "[0, 4294967295], got 4294967296; others",
    f"{RUN} --mesh fsdp": "expected axis=size pairs",
    f"{RUN} --mesh fsdp=1 --hardware.mesh fsdp=2": "expected one mesh, got",
    f"{RUN} --distributed a:1,2,2": "expected a process from 0 to 1, got 2",
    f"{ANALYSE} --distributed auto": "this program is the work of one process",
    f"{RUN} --model gs://b/m": "expected a folder on a disk, got gs://b/m: mount",
    f"{RUN} --mesh fsdp=8 --training.batch-size 12": "fsdp = 8 divides, got 12",
    # Settings of each subtree: names, types, ranges.
    f"{RUN} --training.batch-size two": "expected INT, got 'two'",
    f"{RUN} --training.batch-size 0": "of at least 1, got 0",
    f"{RUN} --training.fisher-examples abc": "expected {None}|INT, got 'abc'",
    f"{RUN} --methods.plan.x 1": "unknown option '--methods.plan.x'",
    f"{RUN} --study.hrd": "unknown option '--study.hrd'; nearest: --study.hard",
    f"{HARD} --study.split foo": "expected {test,validation}, got 'foo'",
    f"{HARD}-hard --study.calibration-examples 4001": "[1, 4000], got 4001",
    # Folders, devices, lm-eval.
    f"{RUN} --data nowhere": "--data: the testbed makes its own data; drop it",
    "run stories --workdir W --data nowhere": "a folder with data sets",
    f"{RUN} --device.count 2": "only --dry-run has use for a device",
    "run demo --dry-run --device.tflops 0": "device.tflops",
    f"{RUN} --harness": "expected a folder with the tasks' data sets",
    f"{RUN} --harness bqq": "unknown task of --harness 'bqq'; nearest: bbq",
    f"{RUN} --harness-limit 3": "expected a number of at least 1 beside --harness",
    # Chat models: what they need, before anything is read.
    "run llama2-7b --workdir W": "expected --model FOLDER_OR_HUB_ID, got none",
    "run realtext --workdir W": "python -m experiments.realtext --data FOLDER",
    f"{CHAT} --methods safe-lora": "add --study.unaligned-folder FOLDER",
    f"{CHAT} --study.dtype int4": "expected {bfloat16,float32}, got 'int4'",
    # Attacks.
    "attack testbed --workdir W": "expected an attack, got none",
    "attack testbed --workdir W --attack poisn": "unknown attack 'poisn'; nearest: poi",
    f"{POISON} --ratio 1.5": "ratio: expected a number from 0 to 1",
    f"{POISON} --examples 0": "examples: expected at least 1",
    f"{POISON} --examples 99999999": "expected at most 100000, got 99999999",
    f"{POISON} --epochs 2 --training.steps-per-domain 2": "got both",
    f"{POISON} --steps 5": "--steps: the attack 'poison' searches nothing",
    f"{POISON} --domains legal": "--domains: the attack 'poison' is made on",
    "attack testbed --workdir W --attack jailbreak --epochs 50": "has no training data",
    # Analyses.
    "analyse demo": "add --workdir runs/demo-analysis",
    f"{ANALYSE} --analysis harm": "nearest: harm-types",
    "analyse stories --workdir W --analysis coupling": "a preset of the testbed",
    f"{ANALYSE} --examples 9999999": "to 500, got 9999999",
    f"{ANALYSE} --results nowhere": "expected the results of a run",
    # A model and files of one's own.
    "tune": "expected --train, got none: add --train my.jsonl",
    "tune --train a.jsonl": "expected --model, got none",
    "align": "expected --safety, got none: add --safety FILE",
    "align --safety a.jsonl": "expected --ordinary, got none",
    # Plans.
    "plan": "expected --model, got none: add --model llama2-7b",
    "plan --model llama2-7 --topology v5e:4x4": "unknown model 'llama2-7'; nearest",
    f"{SLICE} --mesh fsdp=4,tp=3": "expected sizes whose product is 16, the chips of",
    f"{SLICE} --mesh fsdp=16 --batch 24": "expected a batch_size that data x fsdp = 16",
    f"{SLICE} --mesh fsdp=8,tp=2 --accumulation 4": "accumulation = 4 divides, got 16",
    "plan --model qwen2.5-7b --topology v5e:4x4 --mesh tp=16": "expected tp to divide",
    "plan --model qwen2.5-7b --topology v5e:4x4 --batch 3": "found no mesh of 16 chips",
    f"{SLICE} --compare plain,sbr,plain": "expected each method once, got 'plain' tw",
    # Sweeps, exports, reports.
    f"{SWEEP} --jobs 9999999": "--jobs: expected from 1 to 1000, got 9999999",
    f"{SWEEP} --cells paper": "nearest: papers",
    EXPORT: "expected a folder, got none: add --output",
    f"{EXPORT} --output O": "expected the folder of a run, found no W/config.json",
    "report --nonsense": "unknown option '--nonsense'",
    "attack-map --nonsense": "unknown option '--nonsense'",
    "realtext": "expected --data, --output, got none",
    "smollm2 --output W --steps 0": "--steps: expected at least 1, got 0",
    f"smollm2 --output W --seed {2**32}": "expected seed to be a whole number",
    "smollm2 --output W --data nowhere": "expected a folder with data sets at nowhere",
    "run smollm2 --workdir W": "python -m experiments.smollm2 --output",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == cli.EXIT_USER
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert MISTAKES[line] in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_in_the_table(name):
    assert any(line.split()[:1] == [name] for line in MISTAKES)


def test_tools_complain_as_programs_do(capsys):
    assert fill_docs.main(["--nonsense"]) == cli.EXIT_USER
    assert "unknown option '--nonsense'" in capsys.readouterr().err


def test_a_process_fails_fast_with_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "demmo"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stdout) == (cli.EXIT_USER, "")
    assert done.stderr.startswith("error: unknown preset 'demmo'; nearest: demo")
