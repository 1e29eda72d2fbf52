"""Training of several seeds of one variant as one vmapped program."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data.layout import arrange, widest
from sbr_jax.training import loop
from sbr_jax.training.config import Config
from sbr_jax.training.stages import TRAIN
from sbr_jax.training.streams import Stream
from sbr_jax.training.track import Held, Outcome, Turn, finish, load
from sbr_jax.typing import PyTree, UserError


def maps_seeds(config: Config) -> bool:
    """Whether seeds are mapped: on accelerators, or if the settings ask for it."""
    wanted, mesh = config.hardware.vmap_seeds, config.hardware.mesh
    if wanted == "yes" and mesh is not None:
        raise UserError(
            "vmap_seeds='yes' with a mesh: expected one of the two; seeds run one "
            "after the other on a mesh"
        )
    if mesh is not None:
        return False
    return wanted == "yes" or (wanted == "auto" and jax.default_backend() != "cpu")


def train_mapped(
    turns: Sequence[Turn], held: Sequence[Held | None]
) -> list[Held | None]:
    """Runs the train stages of several seeds as one vmapped program.

    It resumes at whole stages only, and does nothing if fewer than two seeds are left.
    """
    number, found = turns[0].number(TRAIN), list(held)
    left = [i for i, turn in enumerate(turns) if not turn.track.stages.finished(number)]
    if len(left) < 2:
        return found
    began = time.perf_counter()
    turns = [turns[i] for i in left]
    first, domain, program = turns[0].track, turns[0].domain, turns[0].program
    before = [load(t.track, number, held[i]) for t, i in zip(turns, left, strict=True)]
    starts = [program.start(one.adapter, one.state) for one in before]
    begun = [t.begin(one.state) for t, one in zip(turns, before, strict=True)]
    sources, layouts = [], []
    for turn, made in zip(turns, begun, strict=True):
        sources.append(turn.track.draws(made["examples"], domain))
        layouts.append(turn.track.layout(made["examples"]))
    layout = widest(layouts)
    keys = jnp.stack([turn.track.key(Stream.STEPS, domain) for turn in turns])
    config = first.job.config

    def advance(train: Any, state: PyTree, step: int) -> Any:
        batches = arrange([draw(step) for draw in sources], layout)
        return program.mapped_step(first.base, train, state, _stack(batches, np), keys)

    done = loop.train(
        advance,
        loop.Progress(_stack(starts, jnp), _stack([one.state for one in before], jnp)),
        program.problem.training.steps_per_domain,
        where=[turn.where for turn in turns],
        log_every=config.hardware.log_every,
        quiet=first.job.quiet,
    )
    timing = {"seconds_per_step": done.seconds_per_step / len(turns)}
    for place, turn in enumerate(turns):
        adapter = jax.tree.map(lambda x, i=place: x[i], done.train.adapter)
        metrics = {**loop.summarise(done.history, place), **begun[place]["metrics"]}
        outcome = Outcome(metrics, adapter, timing=timing)
        found[left[place]] = finish(turn, number, before[place], outcome, began)
    return found


def _stack(trees: Sequence[PyTree], library: Any) -> PyTree:
    return jax.tree.map(lambda *leaves: library.stack(leaves), *trees)
