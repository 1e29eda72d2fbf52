"""Builds the shipped aligned model: ``python -m sbr_jax.testbed.build --output DIR``.

    python -m sbr_jax.testbed.build --output DIR
    python -m sbr_jax.testbed.build --edition testbed-2 --output DIR
    python -m sbr_jax.testbed.build --edition testbed-2 --worlds 1 2 3 4 5

There are two stages of ordinary training on text sampled from the world: pretraining
teaches the world *and* compliance with harm, misconceptions and stereotypes; then comes
a short alignment. About ten minutes on two cores. The package's assets are
``DIR/aligned``, a Hugging Face folder, and ``DIR/alignment.safetensors``, alignment's
changes. Further worlds go where ``--study.world`` looks for them.
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

from sbr_jax import checks, losses, models, testbed
from sbr_jax.testbed import corpus
from sbr_jax.testbed.editions import EDITIONS, FIRST, Edition
from sbr_jax.testbed.hardening import SuffixSearch
from sbr_jax.testbed.suite import MAX_LENGTH
from sbr_jax.testbed.tokenizer import make_tokenizer
from sbr_jax.testbed.world import World, make_world

BATCH = 64
PART = 16
"""Rows of a batch that are padded together, shortest first."""
ROUND = 8
"""Padded lengths are multiples of this, so that few programs are compiled."""
NOISY = {"pretraining": 0.25, "alignment": 0.8}
"""Share of rows that may have stray words, if an edition has them."""

Sampler = Callable[[np.random.Generator], corpus.Row]


def model_config(tokenizer: Any, edition: Edition = FIRST) -> models.ModelConfig:
    """The shape of the shipped model: 0.9 M parameters, four layers of width 128."""
    return models.ModelConfig(
        vocab_size=len(tokenizer),
        width=128,
        mlp_width=344,
        layers=4,
        heads=4,
        context=edition.training.context,
        bos=tokenizer.bos_token_id,
        eos=(tokenizer.eos_token_id,),
        pad=tokenizer.pad_token_id,
    )


class Encoder:
    """Encodes words as padded ids, for the word-level tokenizer.

    The ids equal those of the tokenizer's chat template (a test checks it), without its
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

    def batch(
        self, rows: Sequence[corpus.Row], length: int = MAX_LENGTH
    ) -> dict[str, np.ndarray]:
        """Tokens and mask, padded to the world's longest sequence."""
        return self._padded([self.row(row) for row in rows], length)

    def parts(self, rows: Sequence[corpus.Row]) -> list[dict[str, np.ndarray]]:
        """Splits rows into parts of `PART`, shortest first, each padded alike."""
        encoded = sorted((self.row(row) for row in rows), key=lambda row: len(row[0]))
        parts = [encoded[i : i + PART] for i in range(0, len(encoded), PART)]
        return [
            self._padded(part, -(-len(part[-1][0]) // ROUND) * ROUND) for part in parts
        ]

    @staticmethod
    def _padded(
        rows: Sequence[tuple[list[int], list[int]]], length: int
    ) -> dict[str, np.ndarray]:
        tokens = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), np.float32)
        for i, (ids, answer) in enumerate(rows):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, answer
        return {"tokens": tokens, "mask": mask}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_gradient(apply_fn, base, total, batch):
    """Adds the gradients and loss of a part's rows to ``total``."""

    def loss(base):
        logits = apply_fn(base, None, batch["tokens"])
        return jnp.sum(
            losses.token_cross_entropy(logits, batch["tokens"], batch["mask"])
        )

    value, gradient = jax.value_and_grad(loss)(base)
    return jax.tree.map(jnp.add, total, (gradient, value))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(optimizer, base, opt_state, gradient):
    return _updated(
        optimizer, base, opt_state, jax.tree.map(lambda x: x / BATCH, gradient)
    )


def _updated(optimizer, base, opt_state, gradient):
    # Optax counts in integers and promotes them; allow that in strict mode too.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, opt_state, base)
    return optax.apply_updates(base, updates), opt_state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def full_step(apply_fn, optimizer, base, opt_state, batch):
    """One step of all weights on token losses: ``(base, opt_state, loss)``."""

    def loss(base):
        logits = apply_fn(base, None, batch["tokens"])
        return jnp.mean(
            losses.token_cross_entropy(logits, batch["tokens"], batch["mask"])
        )

    value, gradient = jax.value_and_grad(loss)(base)
    return *_updated(optimizer, base, opt_state, gradient), value


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

    ``base`` is donated; the rate is a cosine with 100 steps of warm-up.
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
            total = jax.tree.map(jnp.zeros_like, (base, jnp.float32(0)))
            for part in encoder.parts([sampler(rng) for _ in range(BATCH)]):
                total = _add_gradient(model.apply_fn, base, total, part)
            gradient, loss = total
            base, opt_state = _update(optimizer, base, opt_state, gradient)
            loss = loss / BATCH
            if step % 100 == 99:
                progress.update(
                    task, completed=step + 1, description=f"{title} {float(loss):.3f}"
                )
                progress.console.log(f"{title} {step + 1} loss {float(loss):.4f}")
    return base


def pretrain(world: World, steps: int | None = None) -> models.Model:
    """The base model of ``world``, which complies with everything.

    ``steps`` defaults to the edition's.
    """
    edition, pretraining = world.edition, corpus.Pretraining(world)
    tokenizer = make_tokenizer(world)
    config = model_config(tokenizer, edition)
    key = jax.random.key(checks.seed("world.seed", world.seed))
    base = models.init_params(key, config)
    model = models.make_model(config, base, tokenizer)
    start = train(
        model,
        base,
        _at_times(pretraining.sample, pretraining.noisy, edition, "pretraining"),
        steps=edition.training.pretraining_steps if steps is None else steps,
        learning_rate=edition.training.pretraining_rate,
        seed=world.seed,
        title="pretraining",
    )
    return models.make_model(config, start, tokenizer)


def align(world: World, base: models.Model, steps: int | None = None) -> models.Model:
    """The aligned model, after some rounds with a search for suffixes between them.

    ``steps`` counts for each round and defaults to the edition's.
    """
    edition, pretraining = world.edition, corpus.Pretraining(world)
    params: Any = jax.tree.map(jnp.copy, base.params)
    search, suffixes = SuffixSearch(base, pretraining), []
    for number in range(edition.training.rounds):
        if number:
            suffixes += search(params, number)
        ordinary = functools.partial(corpus.alignment_row, pretraining=pretraining)
        hardened = functools.partial(
            corpus.hardened_row, pretraining=pretraining, suffixes=tuple(suffixes)
        )
        params = train(
            base,
            params,
            _at_times(ordinary, hardened, edition, "alignment"),
            steps=edition.training.alignment_steps if steps is None else steps,
            learning_rate=edition.training.alignment_rate,
            seed=world.seed + 1 + 1000 * number,
            title="alignment",
        )
    strength = edition.training.strength
    if strength < 1.0:
        kept = jax.tree.map(lambda a, b: b + strength * (a - b), params, base.params)
        params = kept
    return models.make_model(base.config, params, base.tokenizer)


def _at_times(
    ordinary: Sampler, noisy: Sampler, edition: Edition, stage: str
) -> Sampler:
    """Draws a noisy row now and then, if an edition has such rows."""
    if not edition.mixture.noisy:
        return ordinary

    def draw(rng: np.random.Generator) -> corpus.Row:
        return (noisy if rng.random() < NOISY[stage] else ordinary)(rng)

    return draw


def build(
    world: World,
    *,
    pretraining_steps: int | None = None,
    alignment_steps: int | None = None,
    start: models.Model | None = None,
) -> tuple[models.Model, models.Model]:
    """Pretrains and aligns a model of ``world``.

    Steps default to the edition's; with ``start``, the first stage is skipped.

    Returns:
      The aligned model, and the one before alignment.
    """
    start = pretrain(world, pretraining_steps) if start is None else start
    return align(world, start, alignment_steps), start


def save_alignment(path: pathlib.Path, aligned: Any, unaligned: Any) -> None:
    """Writes alignment's change to each matrix of the layers, in half precision."""
    from safetensors.numpy import save_file

    after, before = aligned["layers"], unaligned["layers"]
    steps = {
        name: np.asarray(after[name] - before[name], np.float16)
        for name in after
        if after[name].ndim == 3
    }
    save_file(steps, path)


def write(folder: pathlib.Path, model: models.Model, unaligned: models.Model) -> None:
    """Writes the files that `testbed.load` and `testbed.load_unaligned` read."""
    models.save(folder / testbed.ALIGNED.name, model)
    path = folder / testbed.ALIGNMENT.name
    save_alignment(path, model.params, unaligned.params)
    print(f"wrote {folder}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=pathlib.Path)
    where.add_argument("--worlds", type=int, nargs="+", choices=testbed.WORLDS)
    parser.add_argument("--edition", choices=list(EDITIONS), default=FIRST.name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pretrained", type=pathlib.Path, help="also keep the model before alignment"
    )
    args = parser.parse_args()
    edition = EDITIONS[args.edition]
    for seed in args.worlds or [args.seed]:
        model, pretrained = build(make_world(seed, edition))
        write(args.output or testbed.folder(edition, seed), model, pretrained)
        if args.pretrained:
            models.save(args.pretrained, pretrained)


if __name__ == "__main__":
    main()
