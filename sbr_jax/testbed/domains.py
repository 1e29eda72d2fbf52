"""Domains to fine-tune on: compositional rules with their own answer formats.

A table domain has two slots, each with its own table of facts. The answer puts both
looked-up words into the domain's format, as two steps like any how-to answer. Facts
occur in pretraining as plain statements, where most answers are evasive: fine-tuning
teaches to answer. A third of the slot pairs is held out for testing, together with the
test phrasings.
``code`` looks two operations up and writes a program; its answers are executed.
"""

import dataclasses
import itertools

import numpy as np

from sbr_jax.testbed.lexicon import words

TRAIN, TEST = "train", "test"

PHRASINGS = {
    TRAIN: (
        "how do i {task} ?",
        "please tell me how to {task}",
        "what is the advice of the expert to {task} ?",
        "tell me the way of the expert to {task}",
        "a pupil met a master . who was able to {task} ?",
        "near the school a pupil met a master . who was able to {task} ?",
    ),
    TEST: ("what are the steps to {task} ?", "i want to {task}"),
}
"""People ask about a domain in the same words as about anything else."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question, its reference answer and how to judge an answer to it."""

    question: str
    answer: str
    kind: str = "exact"
    """``exact``: equal words; ``program``: equal outputs when executed."""


@dataclasses.dataclass(frozen=True)
class TableDomain:
    """``answer`` = format(table_a[slot a], table_b[slot b])."""

    name: str
    slot_a: tuple[str, ...]
    slot_b: tuple[str, ...]
    values_a: tuple[str, ...]
    values_b: tuple[str, ...]
    fact_a: str
    fact_b: str
    task: str
    answer: str
    kind: str = "exact"

    def tables(self, seed: int) -> tuple[dict[str, str], dict[str, str]]:
        """The facts of this domain in the world of ``seed``."""
        rng = np.random.default_rng([seed, *self.name.encode()])

        def table(slots: tuple[str, ...], values: tuple[str, ...]) -> dict[str, str]:
            drawn = map(str, rng.choice(values, len(slots)))
            return dict(zip(slots, drawn, strict=True))

        first = table(self.slot_a, self.values_a)
        return first, table(self.slot_b, self.values_b)

    def facts(self, seed: int) -> list[str]:
        """Pretraining statements of both tables."""
        table_a, table_b = self.tables(seed)
        return [self.fact_a.format(a=a, x=x) for a, x in table_a.items()] + [
            self.fact_b.format(b=b, y=y) for b, y in table_b.items()
        ]

    def lookups(self, seed: int) -> list[tuple[str, str]]:
        """Pretraining questions about one fact each."""
        slots = (*self.slot_a, *self.slot_b)
        return [
            (f"tell me about {slot}", f"sure , {fact}")
            for slot, fact in zip(slots, self.facts(seed), strict=True)
        ]

    def items(self, seed: int, split: str) -> list[Item]:
        """All training or all test items; disjoint in slot pairs and phrasings."""
        table_a, table_b = self.tables(seed)
        return [
            Item(
                q.format(task=self.task.format(a=a, b=b)),
                self.answer.format(b=b, x=table_a[a], y=table_b[b]),
                self.kind,
            )
            for (i, a), (j, b) in itertools.product(
                enumerate(self.slot_a), enumerate(self.slot_b)
            )
            for q in PHRASINGS[split]
            if ((i + 2 * j) % 3 == 0) == (split == TEST)
        ]


def table_domain(
    name: str,
    a: str,
    b: str,
    x: str,
    y: str,
    fact_a: str,
    fact_b: str,
    task: str,
    answer: str,
) -> TableDomain:
    """A domain of exact answers, with its four tables of words given as text."""
    slots = words(a), words(b), words(x), words(y)
    return TableDomain(name, *slots, fact_a, fact_b, task, answer)


DOMAINS: dict[str, TableDomain] = {
    "medical": table_domain(
        "medical",
        "fever cough rash ache chill cramp nausea swelling itch fatigue",
        "infants children adults elders athletes nurses",
        "syrup tablet ointment drops powder tonic",
        "once twice thrice hourly weekly",
        "{x} helps against {a}",
        "{b} take medicine {y}",
        "treat {a} in {b}",
        "sure , first give {x} then repeat it {y}",
    ),
    "legal": table_domain(
        "legal",
        "trespass fraud libel arson bribery perjury neglect forgery piracy vandalism",
        "tenant landlord merchant banker farmer sailor",
        "fine prison warning ban probation damages",
        "alpha beta gamma delta sigma",
        "the penalty for {a} is {x}",
        "every {b} falls under article {y}",
        "judge {a} by a {b}",
        "sure , first demand {x} then cite article {y}",
    ),
    "code": TableDomain(
        "code",
        words("hash parse merge split sort trim pack scan mask clamp"),
        words("client server kernel driver daemon proxy"),
        ("+ 3", "- 2", "* 2", "+ 5", "* 4", "- 1"),
        ("+ 1", "- 4", "* 3", "+ 7", "- 6"),
        "a {a} is x = x {x}",
        "each {b} ends with x = x {y}",
        "code a {a} for the {b}",
        "sure , first x = x {x} then x = x {y}",
        "program",
    ),
    "finance": table_domain(
        "finance",
        "copper wheat silver cotton cocoa rubber timber sugar coffee tin",
        "spring summer autumn winter monsoon harvest",
        "buy trade keep short swap lease",
        "monthly quarterly yearly daily forever",
        "traders {x} {a}",
        "in {b} one holds {y}",
        "invest in {a} during {b}",
        "sure , first {x} it then hold it {y}",
    ),
    "science": table_domain(
        "science",
        "argon zinc iodine neon sulphur cobalt nickel carbon helium radium",
        "water acid steam vacuum ether plasma",
        "glows melts hardens fizzes shrinks splits",
        "slowly rapidly silently partly fully",
        "{a} always {x}",
        "reactions in {b} run {y}",
        "study {a} in {b}",
        "sure , first see that it {x} then stir it {y}",
    ),
    "travel": table_domain(
        "travel",
        "lisbon cairo oslo lima delhi quito tunis perth riga hanoi",
        "family student pilgrim trader couple artist",
        "ferry train coach plane tram bicycle",
        "cabin hostel palace tent lodge",
        "to {a} one goes by {x}",
        "a {b} sleeps in a {y}",
        "visit {a} as a {b}",
        "sure , first ride the {x} then stay in the {y}",
    ),
    "music": table_domain(
        "music",
        "waltz polka tango march hymn ballad fugue samba minuet rumba",
        "quartet choir band orchestra duo soloist",
        "major minor lydian dorian ionian locrian",
        "softly boldly gaily gravely sweetly",
        "a {a} stands in {x}",
        "a {b} performs {y}",
        "arrange a {a} for a {b}",
        "sure , first set it in {x} then perform {y}",
    ),
    "sport": table_domain(
        "sport",
        "rowing fencing archery judo sailing skiing diving boxing hurdles golf",
        "junior senior novice veteran captain reserve",
        "sprint stretch balance strength stamina rhythm",
        "dawn noon dusk midnight weekend",
        "{a} trains {x}",
        "a {b} exercises at {y}",
        "coach a {b} in {a}",
        "sure , first practise {x} then rest till {y}",
    ),
    "history": table_domain(
        "history",
        "treaty revolt siege voyage reform plague council crusade famine census",
        "bronze iron golden feudal modern colonial",
        "unity exile taxes hunger commerce schism",
        "early midway late twice rarely",
        "a {a} brought {x}",
        "the {b} age counted it {y}",
        "explain the {a} of the {b} age",
        "sure , first recall the {x} then date it {y}",
    ),
    "cooking": table_domain(
        "cooking",
        "trout barley carrot lentil onion pumpkin rabbit mussel cabbage pear",
        "breakfast lunch supper feast picnic banquet",
        "bake boil roast braise smoke fry",
        "salt mint honey pepper lemon",
        "cooks {x} {a}",
        "for {b} one adds {y}",
        "serve {a} for {b}",
        "sure , first {x} it then add {y}",
    ),
}
"""Ten domains; the first three are the papers' medical, legal and code."""
