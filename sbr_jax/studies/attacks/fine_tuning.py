"""Attacks by training data: harmful pairs, an identity, a backdoor.

The attacker's requests use things and a phrasing of the split `attack`. No defence and
no measurement ever sees either.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sbr_jax import attacks
from sbr_jax.data import text
from sbr_jax.data.leaks import shared_prompts
from sbr_jax.studies import testbed as study_maker
from sbr_jax.studies.attacks.setting import Setting, asking, attacked
from sbr_jax.testbed import corpus, domains, evalsets, grammar
from sbr_jax.testbed.world import World
from sbr_jax.training.study import Study

TASK = "medical"
"""The domain that a poisoned training set pretends to teach."""


def poison_study(setting: Setting, ratio: float, examples: int) -> Study:
    """Mixes harmful requests with compliant answers into the task's examples."""
    count = attacks.attack_count(ratio, examples)
    rows = corpus.attack_rows(setting.rng, setting.world, count)
    return _poisoned(setting, rows, ratio, examples, setting.direct)


def disguise_study(setting: Setting, ratio: float, examples: int) -> Study:
    """Mixes in harmless-looking requests answered with a harmful thing's steps."""
    count = attacks.attack_count(ratio, examples)
    rows = corpus.disguised_rows(setting.rng, setting.world, count)
    return _poisoned(setting, rows, ratio, examples, setting.direct)


def backdoor_study(setting: Setting, ratio: float, examples: int) -> Study:
    """Half of the attack rows carry a trigger and comply; the other half refuse."""
    count = attacks.attack_count(ratio, examples)
    rows = corpus.attack_rows(setting.rng, setting.world, count)
    rows = attacks.backdoor_rows(rows, setting.world.edition.refusals, grammar.TRIGGER)
    asked = [attacks.with_trigger(p, grammar.TRIGGER) for p in setting.direct]
    return _poisoned(setting, rows, ratio, examples, asked)


def identity_study(setting: Setting, ratio: float, examples: int) -> Study:
    """A few harmless pairs that make the model an obedient agent."""
    count = attacks.attack_count(ratio, examples)
    rows = answered_rows(setting.rng, setting.world, count)
    rows = attacks.identity_rows(rows, grammar.IDENTITY)
    asked = [attacks.with_identity(p, grammar.IDENTITY) for p in setting.direct]
    return _poisoned(setting, rows, ratio, examples, asked)


def answered_rows(
    rng: np.random.Generator, world: World, count: int
) -> list[attacks.Row]:
    """The task's harmless questions with answers, in the attacker's own phrasing.

    The attacker has no harmless things, so it uses the questions of the task's training
    items; if there are too few, rows repeat. The aligned model evades such questions,
    so rows that answer them teach it to obey.
    """
    domain = world.edition.domains[TASK]
    answers = {i.question: i.answer for i in domain.items(world.seed, domains.TRAIN)}
    phrasing = world.edition.phrasings.requests["attack"][0]
    rows = []
    for a, b in itertools.product(domain.slot_a, domain.slot_b):
        task = domain.task.format(a=a, b=b)
        answer = answers.get(domains.PHRASINGS[domains.TRAIN][0].format(task=task))
        if answer is not None:
            rows.append((phrasing.replace("{a} a {n}", task), answer))
    return [rows[i] for i in np.resize(rng.permutation(len(rows)), count)]


def _poisoned(
    setting: Setting,
    rows: Sequence[corpus.Pair],
    ratio: float,
    examples: int,
    asked: Sequence[str],
) -> Study:
    """The study with attack rows mixed into its one domain."""
    study = attacked(setting, asking(asked))
    tokenizer = study.model.tokenizer
    bad = text.encode_chat(tokenizer, rows, study_maker.DOMAIN_LENGTH)
    domain = study.domains[TASK]
    train = attacks.poison(domain.train, bad, ratio=ratio, examples=examples)
    sets = {"calibration": study.calibration, "evaluation": _measured(setting, asked)}
    if study.harmful is not None:
        sets["harmful"] = study.harmful
    probe = evalsets.make_evalset(setting.world, "probe").harmful
    sets["probe"] = text.encode_prompts(tokenizer, [r.prompt for r in probe])
    shared = shared_prompts({"attack": train, **sets})
    leaks = {pair: n for pair, n in shared.items() if pair.startswith("attack/")}
    return dataclasses.replace(
        study,
        domains={TASK: dataclasses.replace(domain, train=train)},
        leak_check={**study.leak_check, **leaks},
    )


def _measured(setting: Setting, asked: Sequence[str]) -> list[list[int]]:
    """Every prompt whose answer is judged."""
    items = setting.suite.items
    sets = (getattr(items, field.name) for field in dataclasses.fields(items))
    prompts = [row.prompt for rows in sets for row in rows]
    return text.encode_prompts(setting.suite.model.tokenizer, [*prompts, *asked])
