"""The first testbed's texts, items and words are what they were, to the byte.

The digests were taken before a second edition shared the modules, of a world other than
the shipped one: its model would tell of a change in that.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from sbr_jax.testbed import corpus, domains, evalsets, guard
from sbr_jax.testbed.suite import CHOICES, REQUESTS
from sbr_jax.testbed.world import SPLITS, make_world

MEASURED = [s for s in SPLITS if s != "attack"]
KINDS = (None, ("narcotic", "slander"))


def _pretraining(seed):
    rng, source = np.random.default_rng(1), corpus.Pretraining(make_world(seed))
    return [source.sample(rng) for _ in range(1500)]


def _alignment(seed):
    rng, source = np.random.default_rng(2), corpus.Pretraining(make_world(seed))
    return [corpus.alignment_row(rng, source) for _ in range(800)]


def _sets(seed):
    rng, world = np.random.default_rng(3), make_world(seed)
    for kinds in KINDS:
        for split in ("calibration", "validation"):
            yield corpus.calibration_rows(rng, world, split, 120, kinds=kinds)
    yield corpus.benign_rows(rng, world, "calibration", 120)
    yield corpus.attack_rows(rng, world, 120)
    for case in guard.CASES:
        yield [guard.guard_row(rng, world, case, "calibration") for _ in range(20)]


def _items(seed):
    world = make_world(seed)
    for kinds in KINDS:
        for split in MEASURED:
            items = evalsets.make_evalset(world, split, kinds=kinds)
            for name in REQUESTS:
                rows = getattr(items, name)
                yield [(r.prompt, r.harmful, r.answer) for r in rows]
            for name in CHOICES:
                rows = getattr(items, name)
                yield [(c.prompt, c.options, c.correct, c.biased) for c in rows]
        rows = evalsets.stratified_requests(world, kinds=kinds)
        yield [(r.prompt, r.harmful, r.answer) for r in rows]


def _domains(seed):
    for name, domain in domains.DOMAINS.items():
        yield name, domain.facts(seed), domain.lookups(seed)
        for split in ("train", "test"):
            yield [(i.question, i.answer, i.kind) for i in domain.items(seed, split)]


def _words(seed):
    return corpus.vocabulary(make_world(seed))


def digest(rows: Iterable) -> str:
    """The first ten digits of a hash of plain values."""
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:10]


TEXTS = {
    f.__name__: f for f in (_pretraining, _alignment, _sets, _items, _domains, _words)
}
DIGESTS = {
    "_pretraining": "f3d9869706",
    "_alignment": "c1317be555",
    "_sets": "5fc9dfd20e",
    "_items": "283f31ffda",
    "_domains": "664384e96c",
    "_words": "e84f5c46a6",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_first_edition_says_what_it_said(name):
    assert digest(TEXTS[name](3)) == DIGESTS[name]
