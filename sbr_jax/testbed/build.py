"""Builds the shipped aligned model: ``python -m sbr_jax.testbed.build --output DIR``.

Two stages of ordinary training on text sampled from the world: pretraining, which
teaches the world *and* compliance with harm, misconceptions and stereotypes; then a
short alignment. About ten minutes on two cores. ``DIR/aligned`` is a Hugging Face
folder, ``DIR/alignment.safetensors`` what alignment changed: the package's assets.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax import losses, models
from sbr_jax.testbed import corpus
from sbr_jax.testbed.suite import MAX_LENGTH
from sbr_jax.testbed.tokenizer import make_tokenizer
from sbr_jax.testbed.world import World, make_world

PRETRAINING_STEPS, ALIGNMENT_STEPS = 2400, 80
PRETRAINING_RATE, ALIGNMENT_RATE = 4e-3, 3e-4
BATCH = 64

Sampler = Callable[[np.random.Generator], corpus.Row]


def model_config(tokenizer: Any) -> models.ModelConfig:
    """The shape of the shipped model: 0.9 M parameters, four layers of width 128."""
    return models.ModelConfig(
        vocab_size=len(tokenizer),
        width=128,
        mlp_width=344,
        layers=4,
        heads=4,
        context=64,
        bos=tokenizer.bos_token_id,
        eos=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
    )


class Encoder:
    """Words to padded ids, for the word-level tokenizer.

    The same ids as the tokenizer's chat template gives (a test says so), without its
    cost per row: pretraining encodes 150,000 rows.
    """

    def __init__(self, tokenizer: Any):
        self.ids = tokenizer.get_vocab()

    def row(self, row: corpus.Row) -> tuple[list[int], list[int]]:
        """Ids and answer mask of one row."""
        prompt, answer = row
        head = "<bos>" if prompt is None else f"<bos> <user> {prompt} <assistant>"
        start = [self.ids[w] for w in head.split()]
        rest = [self.ids[w] for w in f"{answer} <eos>".split()]
        return start + rest, [0] * len(start) + [1] * len(rest)

    def batch(self, rows: Sequence[corpus.Row]) -> dict[str, np.ndarray]:
        """Tokens and mask, padded to the world's longest sequence."""
        tokens = np.zeros((len(rows), MAX_LENGTH), np.int32)
        mask = np.zeros((len(rows), MAX_LENGTH), np.float32)
        for i, row in enumerate(rows):
            ids, answer = self.row(row)
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, answer
        return {"tokens": tokens, "mask": mask}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def full_step(apply_fn, optimizer, base, opt_state, batch):
    """One step of all weights on token losses: ``(base, opt_state, loss)``."""

    def loss(base):
        logits = apply_fn(base, None, batch["tokens"])
        return jnp.mean(
            losses.token_cross_entropy(logits, batch["tokens"], batch["mask"])
        )

    value, gradient = jax.value_and_grad(loss)(base)
    # Optax counts in integers and promotes them: let it, also in strict mode.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, opt_state, base)
    return optax.apply_updates(base, updates), opt_state, value


def train(
    model: models.Model,
    base: Any,
    sampler: Sampler,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    title: str = "training",
) -> Any:
    """Full-parameter training on freshly sampled rows.

    Args:
      model: gives ``apply_fn`` and the tokenizer.
      base: weights to start from (donated).
      sampler: draws one row.
      steps: optimizer steps of `BATCH` rows.
      learning_rate: peak of a cosine schedule with 100 steps of warm-up.
      seed: of the sampler.
      title: shown beside the progress bar.

    Returns:
      The trained weights.
    """
    from rich.progress import Progress

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, steps // 4), steps, learning_rate * 0.05
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
    )
    opt_state = optimizer.init(base)
    encoder, rng = Encoder(model.tokenizer), np.random.default_rng([seed, 29])
    with Progress() as progress:
        task = progress.add_task(title, total=steps)
        for step in range(steps):
            batch = encoder.batch([sampler(rng) for _ in range(BATCH)])
            base, opt_state, loss = full_step(
                model.apply_fn, optimizer, base, opt_state, batch
            )
            if step % 100 == 99:
                progress.update(
                    task, completed=step + 1, description=f"{title} {float(loss):.3f}"
                )
                progress.console.log(f"{title} {step + 1} loss {float(loss):.4f}")
    return base


def build(
    world: World,
    *,
    pretraining_steps: int = PRETRAINING_STEPS,
    alignment_steps: int = ALIGNMENT_STEPS,
    start: Any = None,
) -> tuple[models.Model, Any]:
    """Pretrains and aligns a model of ``world``.

    Args:
      world: what the model learns.
      pretraining_steps: steps of the first stage.
      alignment_steps: steps of the second stage.
      start: pretrained weights, to skip the first stage.

    Returns:
      The aligned model, and the weights before alignment.
    """
    pretraining = corpus.Pretraining(world)
    tokenizer = make_tokenizer(world)
    config = model_config(tokenizer)
    base = models.init_params(jax.random.key(world.seed), config)
    model = models.make_model(config, base, tokenizer)
    if start is None:
        start = train(
            model,
            base,
            pretraining.sample,
            steps=pretraining_steps,
            learning_rate=PRETRAINING_RATE,
            seed=world.seed,
            title="pretraining",
        )
    aligned = train(
        model,
        jax.tree.map(jnp.copy, start),
        functools.partial(corpus.alignment_row, pretraining=pretraining),
        steps=alignment_steps,
        learning_rate=ALIGNMENT_RATE,
        seed=world.seed + 1,
        title="alignment",
    )
    return models.make_model(config, aligned, tokenizer), start


def save_alignment(path: pathlib.Path, aligned: Any, unaligned: Any) -> None:
    """Writes what alignment added to each matrix of the layers, in half precision."""
    from safetensors.numpy import save_file

    after, before = aligned["layers"], unaligned["layers"]
    steps = {
        name: np.asarray(after[name] - before[name], np.float16)
        for name in after
        if after[name].ndim == 3
    }
    save_file(steps, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pretrained", type=pathlib.Path, help="also keep the model before alignment"
    )
    args = parser.parse_args()
    model, pretrained = build(make_world(args.seed))
    models.save(args.output / "aligned", model)
    save_alignment(args.output / "alignment.safetensors", model.params, pretrained)
    if args.pretrained:
        config = model_config(model.tokenizer)
        models.save(
            args.pretrained, models.make_model(config, pretrained, model.tokenizer)
        )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
