"""The facts of the miniature world, drawn from one integer seed.

A `World` says which invented things are harmful, how to make or avoid them, what people
wrongly say about animals, which stereotypes exist about peoples, and so on. Entities
and phrasings are divided among the splits of `SPLITS` so that no two splits share
either; `grammar` makes text from them.
"""

import dataclasses
import functools

import numpy as np

from sbr_jax.testbed import lexicon as lx
from sbr_jax.testbed.editions import FIRST, Edition
from sbr_jax.testbed.splits import SPLITS, divide


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object that requests are about; its ``kind`` decides whether it is harmful."""

    name: str
    kind: str
    harmful: bool
    step: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Animal:
    """A subject of misconceptions: for each relation what people say and the truth."""

    name: str
    said: dict[str, str]
    true: dict[str, str]


@dataclasses.dataclass(frozen=True)
class People:
    """A group and the negative trait that a stereotype ascribes to it."""

    name: str
    stereotype: str


@dataclasses.dataclass(frozen=True)
class World:
    """All facts. Build it with `make_world`; equal seeds give equal worlds."""

    seed: int
    edition: Edition
    harmful: dict[str, tuple[Thing, ...]]
    benign: dict[str, tuple[Thing, ...]]
    kind_steps: dict[tuple[str, str], tuple[str, str]]
    animals: dict[str, tuple[Animal, ...]]
    peoples: dict[str, tuple[People, ...]]
    capitals: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    """Every invented name, for the vocabulary."""

    def things(self, *splits: str) -> list[Thing]:
        """Harmful and benign things of the given splits (all splits if none)."""
        chosen = splits or SPLITS
        return [t for s in chosen for t in (*self.harmful[s], *self.benign[s])]

    def steps(self, action: str, thing: Thing) -> tuple[tuple[str, str], ...]:
        """The two steps that doing ``action`` to ``thing`` takes in this world."""
        return (self.kind_steps[thing.kind, action], thing.step)


def _step(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(lx.STEP_VERBS)), str(rng.choice(lx.STEP_OBJECTS))


def _things(rng, taken, kinds, shares, harmful):
    by_split: dict[str, list[Thing]] = {split: [] for split in SPLITS}
    for kind in kinds:
        names = lx.invent_names(rng, sum(shares), taken)
        things = [Thing(name, kind, harmful, _step(rng)) for name in names]
        for split, part in divide(things, shares).items():
            by_split[split].extend(part)
    return {split: tuple(things) for split, things in by_split.items()}


def _animal(rng, name):
    said, true = {}, {}
    for relation, values in lx.RELATIONS.items():
        first, second = rng.choice(len(values), 2, replace=False)
        said[relation], true[relation] = values[first], values[second]
    return Animal(name, said, true)


@functools.lru_cache(maxsize=8)
def make_world(seed: int = 0, edition: Edition = FIRST) -> World:
    """Draws the world of ``seed`` in an edition.

    Guarantee: equal seeds give equal worlds on every machine (NumPy's PCG64 and
    fixed word lists); splits are disjoint in entities.

    >>> world = make_world(0)
    >>> len(world.harmful["test"]), len(world.animals["test"])
    (24, 24)
    """
    rng = np.random.default_rng([seed, 604])
    taken = {
        w
        for value in vars(lx).values()
        if isinstance(value, tuple)
        for w in np.ravel(np.array(value, dtype=str)).tolist()
    }
    before = set(taken)
    harmful = _things(rng, taken, lx.HARMFUL_KINDS, edition.harmful, True)
    benign = _things(rng, taken, lx.BENIGN_KINDS, edition.benign, False)
    kind_steps = {
        (kind, action): _step(rng)
        for kind in (*lx.HARMFUL_KINDS, *lx.BENIGN_KINDS)
        for action in lx.ACTIONS
    }
    animals = [_animal(rng, n) for n in lx.invent_names(rng, 84, taken)]
    negative = [bad for bad, _ in lx.TRAITS]
    peoples = [
        People(name, negative[i % len(negative)])
        for i, name in enumerate(lx.invent_names(rng, 36, taken))
    ]
    lands = lx.invent_names(rng, 40, taken)
    cities = lx.invent_names(rng, 40, taken)
    return World(
        seed=seed,
        edition=edition,
        harmful=harmful,
        benign=benign,
        kind_steps=kind_steps,
        animals=divide(animals, (32, 14, 6, 8, 24, 0)),
        peoples=divide(peoples, (12, 6, 3, 6, 9, 0)),
        capitals=tuple(zip(lands, cities, strict=True)),
        names=tuple(sorted(taken - before)),
    )
