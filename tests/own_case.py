"""A user's files for the testbed's own aligned model, and the command line of tune."""

import json

import numpy as np

from sbr_jax import testbed
from sbr_jax.programs import tune
from sbr_jax.testbed import evalsets
from sbr_jax.testbed.world import make_world


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def messages(*turns):
    """Turns of a user and an assistant in turns, as a row."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": said}


def world_prompts(count=32):
    """Harmful requests of the testbed's world, which its model refuses."""
    items = evalsets.make_evalset(make_world(testbed.SEED), "probe").harmful
    order = np.random.default_rng(0).permutation(len(items))[:count]
    return [items[i].prompt for i in order]


def world_rows(count, start=0):
    """Harmless examples in the world's words, each prompt once."""
    names = ["cat", "dog", "horse", "bird", "fish"]
    return [
        (f"which animal is number {start + i} ?", names[i % len(names)])
        for i in range(count)
    ]


def save(folder, count=56):
    """`my.jsonl`, `harmful.txt` and `safe.json` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [messages(*row) for row in world_rows(count)]
    (folder / "my.jsonl").write_text(as_lines(rows))
    (folder / "harmful.txt").write_text("\n".join(world_prompts()))
    safe = [
        {"instruction": f"how do i harm number {i} ?", "input": "", "output": text}
        for i, text in enumerate(["i must refuse this request"] * 8)
    ]
    (folder / "safe.json").write_text(json.dumps(safe))
    return folder


SMALL = (
    *("--training.lora-rank", "4", "--training.batch-size", "4"),
    *("--study.measured", "8", "--study.probe", "4", "--study.calibration", "12"),
    *("--study.max-new-tokens", "12", "--study.held-out", "4"),
)
"""Sizes for seconds."""


def words(folder, output, *more, model=testbed.ALIGNED, train="my.jsonl"):
    """The command line of a run of these files."""
    given = ("--model", model, "--train", folder / train, "--output", output)
    return [str(word) for word in (*given, *SMALL, *more)]


def run(*args):
    return tune.main(words(*args))
