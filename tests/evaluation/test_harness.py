"""Our scorer inside the evaluation harness, and our tasks beside its own.

Needs the extra ``eval``; the comparison item by item also needs the small checkpoint
and the data beside the repository.
"""

import importlib.util
import os
from types import SimpleNamespace

if importlib.util.find_spec("lm_eval"):
    # Read when the libraries are imported: nothing here may ask the hub.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import checkpoints
import numpy as np
import pytest
from tiny_data import DATA, needs_data

from sbr_jax import models
from sbr_jax.data import load_evalset
from sbr_jax.evaluation import harness, harness_tasks, tasks
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.typing import UserError

lm_eval = pytest.importorskip("lm_eval")
# The harness and what it imports warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    checkpoints.needs_stories,
]
ITEMS = 200


@pytest.fixture(scope="module")
def runner():
    model = models.load(checkpoints.STORIES / "hf")
    return ModelRunner(model, model.params, too_long="left")


def agree(ours, theirs):
    """Item by item: the same option, from log-likelihoods equal up to rounding."""
    assert len(ours.items) == len(theirs.items) >= ITEMS
    worst = 0.0
    for mine, other in zip(ours.items, theirs.items, strict=True):
        a, b = (np.array(row["log_likelihoods"]) for row in (mine, other))
        # Ours are rounded to four digits in the record; sums are of size 10 to 1000
        # and the batches differ, so float32 rounding adds a few units of 1e-4.
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-3)
        worst = max(worst, float(np.abs(a - b).max()))
        near = np.sort(b)[-1] - np.sort(b)[-2] < 4e-3
        assert near or mine["pick"] == other["pick"]
    same = [
        m["pick"] == o["pick"] for m, o in zip(ours.items, theirs.items, strict=True)
    ]
    print(f"{len(same)} items, {sum(same)} equal picks, worst difference {worst:.1e}")
    return sum(same) / len(same)


# Errors of 1e-3 in a log-likelihood are 0.1 % of a share.
@needs_data
@pytest.mark.parametrize(("metric", "near"), [("mc1", 1e-6), ("mc2", 0.05)])
def test_truthfulqa_agrees(runner, metric, near):
    name = f"truthfulqa_{metric}"
    items = load_evalset(name, DATA)[:ITEMS]
    ours = tasks.truthfulqa_mc(runner, items, metric=metric)
    task = harness_tasks.truthfulqa_task(items, name=name)
    theirs = harness.evaluate_with_harness(runner, [task])[name]
    assert agree(ours, theirs) == 1.0
    # A tie with the right option is a win for the harness and none for us.
    accuracy = 100 * theirs.metrics["acc,none"]
    assert ours.metrics[metric] == pytest.approx(accuracy, abs=near)


@needs_data
def test_mmlu_agrees_with_examples_in_front(runner):
    subjects = ("astronomy", "anatomy")
    pools = [load_evalset("mmlu", DATA, split=split) for split in ("dev", "test")]
    solved, asked = (
        {s: [item for item in pool if item.group == s] for s in subjects}
        for pool in pools
    )
    shots = {s: solved[s][:1] for s in subjects}
    items = [item for s in subjects for item in asked[s][: ITEMS // 2]]
    ours = tasks.mmlu(runner, items, shots, shots=1)
    found = harness.evaluate_with_harness(
        runner,
        [
            harness_tasks.mmlu_task([i for i in items if i.group == s], shots[s])
            for s in subjects
        ],
    )
    rows = [row for s in subjects for row in found[f"mmlu_{s}"].items]
    assert agree(ours, SimpleNamespace(items=rows)) == 1.0
    for s in subjects:
        theirs = 100 * found[f"mmlu_{s}"].metrics["acc,none"]
        assert ours.metrics[f"accuracy/{s}"] == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(UserError, match="one subject"):
        harness_tasks.mmlu_task(items)


# --- the rest of the model's interface ---------------------------------------------


@pytest.fixture(scope="module")
def lm(runner):
    return harness.harness_model(runner)


def ask(*args):
    return SimpleNamespace(args=args)


def test_prompts_hold_one_bos(lm, runner):
    bos = runner.model.tokenizer.bos_token_id
    text = runner.model.tokenizer.bos_token + "Once upon"
    for ids in (lm.tok_encode("Once upon"), lm.tok_encode(text)):
        assert ids.count(bos) == 1
        assert ids[0] == bos
    assert bos not in lm.tok_encode("Once upon", add_special_tokens=False)


def test_answers_honour_their_settings(lm):
    greedy = {"until": ["."], "max_gen_toks": 20, "do_sample": False}
    warm = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    first, drawn, again = lm.generate_until(
        [
            ask("Once upon a", greedy),
            ask("Once upon a", warm),
            ask("Once upon a", greedy),
        ]
    )
    assert first == again
    assert "." not in first
    assert first.startswith(" time")
    assert drawn != first
    # Drawn answers depend on the seed and the prompt alone.
    assert lm.generate_until([ask("Once upon a", warm)]) == [drawn]


def test_rolling_log_likelihoods_cover_every_token_once(lm, runner):
    text = "Once upon a time there was a little dog named Tim who liked to play. " * 30
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > runner.model.config.context
    (short,) = lm.loglikelihood_rolling([ask("Once upon a time")])
    (direct,) = lm.loglikelihood([ask("", "Once upon a time")])
    assert short == pytest.approx(direct[0], abs=1e-4)
    (long,) = lm.loglikelihood_rolling([ask(text)])
    # A few nats a token, over all tokens rather than one window.
    assert -4 * len(ids) < long < -0.1 * len(ids)


def test_a_system_message_belongs_to_the_harness(runner):
    chatty = SimpleNamespace(model=runner.model, system="Be kind.")
    with pytest.raises(UserError, match="system_instruction"):
        harness.harness_model(chatty)
