"""The small chat model of the preset `realtext`: trained from scratch and measured.

The folder is written at the end, by rename: a killed run leaves none. Its
`training.json` records what was read, dropped and reached, in counts and hashes. No row
is printed or copied.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax import checks, models
from sbr_jax.data import (
    TokenDataset,
    concatenate,
    encode_chat,
    encode_prompts,
    leaks,
)
from sbr_jax.errors import option
from sbr_jax.evaluation import KeywordJudge, tasks
from sbr_jax.evaluation.benchmarks import Ask, PreparedBenchmark
from sbr_jax.evaluation.benchmarks import prepare as prepare_benchmark
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.studies._held_out import held_out_scores
from sbr_jax.studies.realtext.corpus import (
    KEYWORDS,
    LENGTHS,
    Exchange,
    batches,
    fingerprint,
    kept_out,
    make_tokenizer,
    read_corpus,
)
from sbr_jax.testbed.build import full_step
from sbr_jax.transforms.schedules import learning_rate_schedule
from sbr_jax.typing import PyTree, UserError

CONTEXT = 2048
"""Fits the longest behaviour of HarmBench; training texts fill at most a quarter."""
WIDTH, LAYERS, HEADS = 192, 6, 6
STEPS, LEARNING_RATE = 1200, 3e-3
MEASURED, NEW_TOKENS = 300, 24
"""Most prompts of a benchmark after training, and tokens of an answer."""


def model_config(tokenizer: Any) -> models.ModelConfig:
    """The model's shape: 3.4 M parameters with the full vocabulary."""
    return models.ModelConfig(
        vocab_size=len(tokenizer),
        width=WIDTH,
        mlp_width=WIDTH * 8 // 3,
        layers=LAYERS,
        heads=HEADS,
        context=CONTEXT,
        bos=tokenizer.bos_token_id,
        eos=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
    )


def train(
    model: models.Model,
    data: TokenDataset,
    held_out: TokenDataset,
    *,
    steps: int,
    seed: int,
    quiet: bool = False,
) -> tuple[PyTree, list[tuple[int, float]]]:
    """Trains all weights on the rows' prompts and answers.

    The held-out loss is measured five times; the schedule is a cosine.

    Returns:
        The weights, and pairs of step number and held-out loss per answer token in
        nats.

    Raises:
        UserError: if the loss is no longer finite.
    """
    from rich.progress import Progress

    rate = learning_rate_schedule(
        LEARNING_RATE, steps, warmup_fraction=0.05, final_fraction=0.05
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1)
    )
    base = jax.tree.map(jnp.copy, model.params)
    opt_state = optimizer.init(base)
    lengths = np.sum(data.tokens != model.tokenizer.pad_token_id, axis=1)
    drawn = batches(data, lengths, seed)
    curve: list[tuple[int, float]] = []
    with Progress(disable=quiet) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            base, opt_state, _ = full_step(
                model.apply_fn, optimizer, base, opt_state, next(drawn)
            )
            progress.advance(task)
            if step % max(1, steps // 5) and step != steps:
                continue
            loss, _ = held_out_scores(model, held_out, base, None)
            if not math.isfinite(loss):
                raise UserError(
                    f"expected a finite held-out loss, got {loss} after step {step}: "
                    f"the training diverged; take another {option('seed')}"
                )
            curve.append((step, round(loss, 4)))
            progress.update(task, description=f"training, held-out loss {loss:.3f}")
    return base, curve


def prepare(folder: Path, benchmarks: Sequence[str]) -> list[PreparedBenchmark]:
    """Prepares the model's benchmarks: reads files, needs no model."""
    judge = KeywordJudge(KEYWORDS)
    found = [
        prepare_benchmark(
            name, folder, limit=MEASURED, judge=judge, max_new_tokens=NEW_TOKENS
        )
        for name in benchmarks
    ]
    # This one has the same origin as the training text; the others do not.
    length = {"max_new_tokens": NEW_TOKENS}
    near = Ask("beavertails-eval", folder, MEASURED, judge, False, None, length)
    items = near.items("beavertails_prompts", "eval")
    return [*found, near.judged(items, tasks.requests)]


def measure(
    model: models.Model, asked: Sequence[PreparedBenchmark]
) -> dict[str, float]:
    """Refusal and over-refusal rates of a trained model, in percent."""
    # A batch is as wide as its longest prompt, and some of HarmBench's are long.
    runner = ModelRunner(model, model.params, batch_size=16)
    found: dict[str, float] = {}
    for benchmark in asked:
        found |= benchmark(runner)
    # Keep rates by set, not by category within a set.
    return {name: round(x, 2) for name, x in found.items() if name.count("/") == 1}


def build(
    folder: Path,
    benchmarks: Sequence[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[models.Model, dict[str, Any]]:
    """Trains and measures the model of the preset `realtext`.

    Returns:
        The model, and the content of `training.json`: counts, hashes, rates.

    Raises:
        UserError: for missing files, prompts that leave no room for an answer, or a
            training that diverges.
    """
    seed, banned = checks.seed("seed", seed), kept_out(folder)
    parts = read_corpus(folder, banned, seed)
    sets = {
        "the corpus": [x for p in parts.values() for x in (*p.train, *p.held_out)],
        "what is kept out": [text for texts in banned.values() for text in texts],
    }
    leaks.refuse_leaks(leaks.shared(sets))
    tokenizer = make_tokenizer(
        text for p in parts.values() for x in p.train for text in (x.prompt, x.answer)
    )
    config, asked = model_config(tokenizer), prepare(folder, benchmarks)
    for benchmark in asked:
        room = config.context - NEW_TOKENS
        encode_prompts(tokenizer, benchmark.prompts, max_length=room)

    def encode(rows: Sequence[Exchange]) -> TokenDataset:
        pairs = [(row.prompt, row.answer) for row in rows]
        return encode_chat(tokenizer, pairs, LENGTHS[-1], too_long="truncate")

    learnt = {name: encode(part.train) for name, part in parts.items()}
    held_out = {name: encode(part.held_out) for name, part in parts.items()}
    held_out["all"] = concatenate(list(held_out.values()))
    start = models.init_params(jax.random.key(seed), config)
    weights, curve = train(
        models.make_model(config, start, tokenizer),
        concatenate(list(learnt.values())),
        held_out["all"],
        steps=steps,
        seed=seed,
        quiet=quiet,
    )
    model = models.make_model(config, weights, tokenizer)
    losses = {
        name: round(held_out_scores(model, data, weights, None)[0], 4)
        for name, data in held_out.items()
    }
    return model, {
        "program": "python -m experiments.realtext",
        "steps": steps,
        "seed": seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "vocabulary": len(tokenizer),
        "parts": {
            name: {
                "rows": len(data),
                "held_out": len(held_out[name]),
                "tokens": int(np.sum(data.tokens != tokenizer.pad_token_id)),
                "truncated": data.truncated,
                "dropped": {**parts[name].dropped, "too_long": data.dropped},
                "sha256": fingerprint("\n".join(row) for row in parts[name].train),
            }
            for name, data in learnt.items()
        },
        "kept_out": {
            name: {"prompts": len(texts), "sha256": fingerprint(texts)}
            for name, texts in banned.items()
        },
        "held_out_loss": losses,
        "curve": curve,
        "judge": KeywordJudge(KEYWORDS).describe(),
        "measured": measure(model, asked),
    }


def write(output: Path, model: models.Model, record: Mapping[str, Any]) -> None:
    """Writes the model's folder and its parents, or nothing at all."""
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, because a rename cannot cross file systems.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".realtext-") as at:
            folder = Path(at) / "model"
            models.save(folder, model)
            text = json.dumps(record, indent=2) + "\n"
            (folder / "training.json").write_text(text, encoding="utf-8")
            folder.rename(output)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
