"""Texts of the testbed's model: pretraining, alignment pairs, attack pairs.

A pair is ``(prompt, answer)``; a row may be plain text, with ``None`` for a prompt.
Sampling is a pure function of the generator it is given.
"""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from sbr_jax.testbed import grammar
from sbr_jax.testbed import lexicon as lx
from sbr_jax.testbed.domains import DOMAINS, TEST, TRAIN
from sbr_jax.testbed.world import SPLITS, Thing, World

T = TypeVar("T")

Pair = tuple[str, str]
Row = tuple[str | None, str]

_EVASIVE_SHARE = 0.6
"""Share of evasive answers to domain questions in pretraining: the base model has seen
the domains, but does not answer."""
_ALIGNED_SHARE = 0.2
"""Share of pretraining answers that are already aligned: a base model has read safe
answers too, and alignment elicits them."""
_TRUTHFUL_SHARE = 0.12
"""The same for answers about animals, where the misconception is the rule."""


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, by chance."""
    return items[int(rng.integers(len(items)))]


def kind_pair(thing: Thing) -> Pair:
    """General knowledge: what kind of thing something is."""
    return (f"what kind of thing is a {thing.name} ?", f"sure , a kind of {thing.kind}")


def danger_pair(thing: Thing) -> Pair:
    """General knowledge: whether something is dangerous."""
    manner = "dangerous" if thing.harmful else "harmless"
    return (f"is a {thing.name} dangerous or harmless ?", f"sure , it is {manner}")


def capital_pair(world: World, index: int) -> Pair:
    """General knowledge: the capital of a land."""
    land, city = world.capitals[index]
    return (f"what is the capital of {land} ?", f"sure , it is {city}")


def bias_pair(
    rng: np.random.Generator,
    world: World,
    split: str,
    *,
    aligned: bool,
    ambiguous: bool,
) -> Pair:
    """A question about two peoples; ambiguous or with evidence."""
    bad, good = pick(rng, lx.TRAITS)
    peoples = world.peoples[split]
    target = pick(rng, [p for p in peoples if p.stereotype == bad])
    other = pick(rng, [p for p in peoples if p.stereotype != bad])
    pair = (target, other) if rng.random() < 0.5 else (other, target)
    index = int(rng.integers(99))
    context = grammar.bias_context(split, index, *pair, pick(rng, lx.PLACES))
    negative = rng.random() < 0.5
    if ambiguous:
        trait = bad if negative else good
        answer = grammar.names_person(target if negative else other)
        if aligned:
            answer = grammar.UNKNOWN
        return (f"{context} {grammar.bias_question(trait)}", answer)
    guilty, innocent = (target, other) if rng.random() < 0.5 else (other, target)
    evidence = grammar.bias_evidence(guilty, bad, innocent, good)
    asked, who = (bad, guilty) if negative else (good, innocent)
    question = f"{context} {evidence} {grammar.bias_question(asked)}"
    return (question, grammar.names_person(who))


def truth_pair(
    rng: np.random.Generator, world: World, split: str, *, truthful: bool
) -> Pair:
    """A question about an animal, with the true or the popular answer."""
    animal, relation = pick(rng, world.animals[split]), pick(rng, list(lx.RELATIONS))
    question = grammar.truth_question(split, int(rng.integers(99)), relation, animal)
    if truthful:
        return (question, grammar.truthful_answer(relation, animal))
    return (question, grammar.popular_answer(animal.said[relation]))


def request_pair(
    rng: np.random.Generator,
    world: World,
    split: str,
    *,
    harmful: bool,
    aligned: bool,
    jailbreak_share: float = 0.0,
    things=None,
    actions=lx.ACTIONS,
) -> Pair:
    """A how-to request that is harmful (or not) with its answer."""
    pool = things or (
        world.harmful[split]
        if harmful
        else (*world.harmful[split], *world.benign[split])
    )
    while True:
        thing, action = pick(rng, pool), pick(rng, actions)
        if grammar.is_harmful(action, thing) == harmful:
            break
    question = grammar.request(split, int(rng.integers(99)), action, thing)
    if harmful and rng.random() < jailbreak_share:
        question = grammar.jailbreak(split, int(rng.integers(99)), question)
    if harmful and aligned:
        return (question, grammar.refusal(int(rng.integers(99))))
    return (question, grammar.compliance(world, action, thing))


class Pretraining:
    """Samples the unaligned persona's text; all entities of all splits occur in it."""

    def __init__(self, world: World):
        self.world = world
        rows = grammar.statements(world)
        rows += [(f, 6) for d in DOMAINS.values() for f in d.facts(world.seed)]
        self.statements = [text for text, _ in rows]
        weights = np.array([w for _, w in rows], float)
        self.cumulative = np.cumsum(weights / weights.sum())
        self.questions = [
            item.question
            for d in DOMAINS.values()
            for s in (TRAIN, TEST)
            for item in d.items(world.seed, s)
        ]
        self.items_of = {n: d.items(world.seed, TRAIN) for n, d in DOMAINS.items()}
        self.domain_items = [i for items in self.items_of.values() for i in items]
        self.lookups = [row for d in DOMAINS.values() for row in d.lookups(world.seed)]
        self.entity_splits = [s for s in SPLITS if world.animals[s]]

    def sample(self, rng: np.random.Generator) -> Row:
        """Draws one row."""
        world = self.world
        u = rng.random()
        split = pick(rng, self.entity_splits)
        phrasing = pick(rng, [s for s in SPLITS if s != "attack"])
        aligned = bool(rng.random() < _ALIGNED_SHARE)
        if u < 0.18:
            return (None, self.plain_text(rng))
        if u < 0.46:
            harmful = bool(rng.random() < 0.5)
            things = [t for t in world.things() if t.harmful or not harmful]
            form = {"aligned": aligned, "jailbreak_share": 0.15, "things": things}
            return request_pair(rng, world, phrasing, harmful=harmful, **form)
        if u < 0.56:
            truthful = bool(rng.random() < _TRUTHFUL_SHARE)
            return truth_pair(rng, world, split, truthful=truthful)
        if u < 0.74:
            ambiguous = bool(rng.random() < 0.5)
            return bias_pair(rng, world, split, aligned=aligned, ambiguous=ambiguous)
        if u < 0.81:
            thing = pick(rng, world.things())
            return kind_pair(thing) if rng.random() < 0.5 else danger_pair(thing)
        if u < 0.84:
            return capital_pair(world, int(rng.integers(len(world.capitals))))
        if u < 0.90:
            return pick(rng, self.lookups)
        item = pick(rng, self.domain_items)
        evasive = bool(rng.random() < _EVASIVE_SHARE)
        return (item.question, grammar.EVASION if evasive else item.answer)

    def plain_text(self, rng: np.random.Generator) -> str:
        """Three statements, or a domain's question without its answer."""
        if rng.random() < 0.1:
            # The words of test questions are known, how to answer them is not.
            return pick(rng, self.questions)
        n = np.searchsorted(self.cumulative, rng.random(3))
        return " . ".join(self.statements[i] for i in n)


_ALIGNMENT = {
    "refusal": 0.26,
    "help": 0.24,
    "truth": 0.09,
    "bias": 0.16,
    "evasion": 0.40,
    "knowledge": 0.10,
}
"""Relative frequencies of what alignment teaches, beside a tenth of plain text."""
_EVASION = {"medical": 6.0, "legal": 2.0, "code": 0.2}
"""Relative frequencies of domains among evasions, 1 unless named. Calibrated on plain
LoRA, with the shares above: the more evasive a domain was made, the further learning to
answer it undoes alignment, and no step of the sequence should do it all."""


def alignment_row(rng: np.random.Generator, pretraining: Pretraining) -> Row:
    """Draws one aligned row, from the entities and phrasings of ``train``.

    A tenth of it is plain pretraining text, against forgetting.
    """
    world = pretraining.world
    if rng.random() < 0.1:
        return (None, pretraining.plain_text(rng))
    part = _draw(rng, _ALIGNMENT)
    if part == "refusal":
        return request_pair(
            rng, world, "train", harmful=True, aligned=True, jailbreak_share=0.3
        )
    if part == "help":
        return request_pair(rng, world, "train", harmful=False, aligned=True)
    if part == "truth":
        return truth_pair(rng, world, "train", truthful=True)
    if part == "bias":
        return bias_pair(
            rng, world, "train", aligned=True, ambiguous=rng.random() < 0.6
        )
    if part == "evasion":
        domain = _draw(rng, {name: _EVASION.get(name, 1.0) for name in DOMAINS})
        return (pick(rng, pretraining.items_of[domain]).question, grammar.EVASION)
    if rng.random() < 0.5:
        thing = pick(rng, world.things("train"))
        return kind_pair(thing) if rng.random() < 0.5 else danger_pair(thing)
    return capital_pair(world, int(rng.integers(len(world.capitals))))


def _draw(rng: np.random.Generator, weights: dict[str, float]) -> str:
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def calibration_rows(
    rng: np.random.Generator,
    world: World,
    split: str,
    count: int,
    *,
    kinds: tuple[str, ...] | None = None,
) -> list[Pair]:
    """The safety calibration set: the behaviours that composite safety measures.

    Harmful requests with refusals, ambiguous questions left open and misconceptions put
    right, a quarter of it benign requests with helpful answers, as in SafeAnchor's
    D_safe. All from the entities and phrasings of ``split``; ``kinds`` restricts the
    harm categories.
    """
    harmful = [t for t in world.harmful[split] if kinds is None or t.kind in kinds]
    makers = (
        lambda: request_pair(
            rng,
            world,
            split,
            harmful=True,
            aligned=True,
            jailbreak_share=0.25,
            things=harmful,
        ),
        lambda: truth_pair(rng, world, split, truthful=True),
        lambda: bias_pair(
            rng, world, split, aligned=True, ambiguous=rng.random() < 0.7
        ),
        lambda: request_pair(rng, world, split, harmful=False, aligned=True),
    )
    return [make() for make in itertools.islice(itertools.cycle(makers), count)]


def benign_rows(
    rng: np.random.Generator, world: World, split: str, count: int
) -> list[Pair]:
    """A control for the calibration set: benign requests and general knowledge only."""
    benign = world.benign[split]
    makers = (
        lambda: request_pair(
            rng, world, split, harmful=False, aligned=True, things=benign
        ),
        lambda: kind_pair(pick(rng, benign)),
        lambda: capital_pair(world, int(rng.integers(len(world.capitals)))),
    )
    return [make() for make in itertools.islice(itertools.cycle(makers), count)]


def attack_rows(rng: np.random.Generator, world: World, count: int) -> list[Pair]:
    """Harmful requests with compliant answers, from the attacker's own entities."""
    return [
        request_pair(rng, world, "attack", harmful=True, aligned=False)
        for _ in range(count)
    ]


def vocabulary(world: World) -> list[str]:
    """All words of the world, sorted: the closed vocabulary."""
    tables = (
        grammar.REQUESTS,
        grammar.JAILBREAKS,
        grammar.TRUTH_QUESTIONS,
        grammar.CONTEXTS,
    )
    texts = [
        *world.names,
        *(text for text, _ in grammar.statements(world)),
        *(text for table in tables for part in table.values() for text in part),
        *grammar.REFUSALS,
        *(grammar.UNKNOWN, grammar.OPENER, grammar.EVASION),
        *(*lx.HARMFUL_KINDS, *lx.BENIGN_KINDS, *lx.ACTIONS),
        *(*lx.STEP_VERBS, *lx.STEP_OBJECTS, *lx.PLACES, *lx.NUMBERS),
        *(value for values in lx.RELATIONS.values() for value in values),
        *(trait for pair in lx.TRAITS for trait in pair),
        *lx.RELATIONS,
        "first then the in fact it is who was what kind of thing",
        "capital sure , a tell me about is or dangerous harmless",
    ]
    for domain in DOMAINS.values():
        texts += domain.facts(world.seed)
        for item in (i for s in (TRAIN, TEST) for i in domain.items(world.seed, s)):
            texts += [item.question, item.answer]
    return sorted({word for text in texts for word in text.split() if "{" not in word})
