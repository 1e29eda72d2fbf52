"""Attack, tune and align in two processes do what they do in one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from own_case import as_lines, messages, world_prompts, world_rows
from safetensors.numpy import load_file
from test_distributed_runs import CHILD as REAL
from test_distributed_runs import (
    ROOT,
    address,
    assert_close,
    ended,
    one_line,
    read,
    start,
)

from sbr_jax import models, testbed

CHILD = ROOT / "tests" / "distributed_commands.py"
QUICK = (
    *("--hardware.mesh", "fsdp=2", "--training.batch-size", "4"),
    *("--training.steps-per-domain", "2", "--training.repair-steps", "1"),
    *("--training.lora-rank", "2", "--training.lora-targets", "(q|k|v|o)_proj"),
)
OWN = (
    *("--study.measured", "4", "--study.probe", "4", "--study.calibration", "8"),
    *("--study.max-new-tokens", "4", "--study.held-out", "4"),
)
SEARCH = ("--steps", "1", "--suffix-length", "2", "--candidates", "4", "--prompts", "2")


def attack(folder, name, *more):
    words = ("attack", "testbed", "--workdir", folder / name, "--attack", name)
    given = ("--methods", "plain", "--seed", "1", "--study.calibration-examples", "4")
    return (*words, *given, "--model", folder / "model", *QUICK, *more)


def tune(folder, *more):
    given = ("--train", folder / "my.jsonl", "--harmful", folder / "harmful.txt")
    words = ("tune", "--output", folder / "tuned", "--model", folder / "model")
    harmless = ("--study.harmless-file", folder / "harmless.txt")
    return (*words, *given, *harmless, *QUICK, *OWN, *more)


def align(folder, *more):
    given = ("--safety", folder / "safe.jsonl", "--ordinary", folder / "my.jsonl")
    words = ("align", "--output", folder / "aligned", "--model", folder / "model")
    harmless = ("--study.harmless-file", folder / "harmless.txt")
    return (*words, *given, *harmless, *QUICK, *OWN, *more)


def write_files(folder):
    """A random model with the testbed's words, and a user's files."""
    shipped = testbed.load()
    config = dataclasses.replace(
        shipped.config, width=32, mlp_width=64, layers=2, heads=2, kv_heads=2
    )
    params = models.init_params(jax.random.key(0), config)
    model = models.make_model(config, params, shipped.tokenizer)
    models.save(folder / "model", model)
    rows = [messages(*row) for row in world_rows(24)]
    (folder / "my.jsonl").write_text(as_lines(rows))
    prompts = world_prompts(24)
    harmless = [question for question, _ in world_rows(8, start=500)]
    (folder / "harmless.txt").write_text("\n".join(harmless))
    (folder / "harmful.txt").write_text("\n".join(prompts))
    refusal = "i am not able to do this because it is not safe"
    safe = [{"prompt": p, "completion": refusal} for p in prompts[:8]]
    (folder / "safe.jsonl").write_text(as_lines(safe))


def write_commands(folder, *commands):
    path = folder / "commands.json"
    path.write_text(json.dumps([[str(word) for word in words] for words in commands]))
    return path


def together(path):
    """Two processes of a device each do the commands; what they ended with and said."""
    where = address()
    return finished((path, f"{where},2,{i}") for i in range(2))


def both(words):
    """The same of one real command."""
    where = address()
    more = ((*words, "--distributed", f"{where},2,{i}") for i in range(2))
    return finished(more, child=REAL)


def finished(words, child=CHILD):
    found = [start(each, devices=1, child=child) for each in words]
    try:
        return [ended(process) for process in found]
    finally:
        for process in found:
            process.kill()
            process.communicate()


MISTAKES = {
    "attack": (
        lambda folder: attack(folder, "poison", "--steps", "3"),
        "--steps: the attack 'poison' searches nothing; drop it",
    ),
    "tune": (
        lambda folder: tune(folder, "--method", "plane"),
        "unknown method 'plane'; nearest: plain",
    ),
    "align": (
        lambda folder: align(folder, "--share", "1.5"),
        "--share: expected a number between 0 and 1, got 1.5",
    ),
}


@pytest.mark.thorough  # Sessions of threads ask it of any program.
@pytest.mark.parametrize("program", MISTAKES)
def test_a_mistake_is_one_line_from_one_process_and_leaves_nothing(program, tmp_path):
    write_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    words, said = MISTAKES[program]
    one_line(both(words(tmp_path)), said)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What a tune of two processes left, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    write_files(folder)
    return folder, together(write_commands(folder, tune(folder, "--method", "plain")))


def test_tune_ends_well_the_first_alone_speaks_and_none_reads_too_much(done):
    folder, said = done
    assert [code for code, _ in said] == [0, 0], said
    assert said[1][1] == ""
    found = json.loads((folder / "tuned" / "summary.json").read_text())
    assert found["before"]["domain_loss"] != found["after"]["domain_loss"]
    path = folder / "model" / "model.safetensors"
    for index in range(2):
        read = json.loads((folder / f"read-{index}.json").read_text())
        # What its own devices hold, and norms, which are whole in every process.
        assert 0.4 < read[str(path)] / path.stat().st_size < 0.55


@pytest.mark.thorough
def test_tune_and_align_leave_what_one_process_leaves(done, tmp_path):
    folder, _ = done
    said = together(write_commands(folder, align(folder)))
    assert [code for code, _ in said] == [0, 0], said
    assert said[1][1] == ""
    write_files(tmp_path)
    commands = tune(tmp_path, "--method", "plain"), align(tmp_path)
    path = write_commands(tmp_path, *commands)
    assert ended(start((path, "off"), devices=2, child=CHILD))[0] == 0
    for name, file in (("tuned", "adapter_model"), ("aligned", "model")):
        one, two = (
            load_file(place / name / f"{file}.safetensors")
            for place in (folder, tmp_path)
        )
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(one[key], two[key], rtol=1e-4, atol=1e-5)
        summaries = (
            json.loads((place / name / "summary.json").read_text())
            for place in (folder, tmp_path)
        )
        one, two = ({k: x[k] for k in ("before", "after")} for x in summaries)
        assert_close(one, two)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "more"),
    [("poison", ("--ratio", "0.5", "--examples", "8")), ("gcg", SEARCH)],
)
def test_attacks_leave_what_one_process_leaves(name, more, tmp_path):
    write_files(tmp_path)
    path = write_commands(tmp_path, attack(tmp_path, name, *more))
    said = together(path)
    assert [code for code, _ in said] == [0, 0], said
    assert said[1][1] == ""
    assert (tmp_path / name / "report.html").is_file()
    (tmp_path / name).rename(tmp_path / "two")
    assert ended(start((path, "off"), devices=2, child=CHILD))[0] == 0
    assert_close(read(tmp_path / "two"), read(tmp_path / name))
