"""Study of the embedded testbed."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbr_jax import models, testbed
from sbr_jax.data import text
from sbr_jax.data.leaks import shared_prompts
from sbr_jax.methods.risk import Judge
from sbr_jax.studies.options import TestbedOptions, WorldOptions
from sbr_jax.testbed import corpus, domains, evalsets, guard, judges, suite
from sbr_jax.testbed import lexicon as lx
from sbr_jax.testbed.editions import EDITIONS, FIRST
from sbr_jax.testbed.world import World, make_world
from sbr_jax.training.study import Domain, Study
from sbr_jax.typing import UserError

HARMFUL_EXAMPLES = 160
DOMAIN_LENGTH = 40
"""Tokens of the longest domain example; padding no further makes a step cheaper."""


class Kinds(NamedTuple):
    """Kinds of harm: seen by a defence, unseen, and measured."""

    seen: tuple[str, ...]
    """Kinds in calibration and probe."""
    unseen: tuple[str, ...]
    """Kinds that no defence sees."""
    measured: tuple[str, ...]


def kinds_of(options: WorldOptions) -> Kinds:
    """The kinds of harm that the options choose."""
    setting = options.setting()
    count = len(lx.HARMFUL_KINDS) - setting.held_out
    seen, unseen = lx.HARMFUL_KINDS[:count], lx.HARMFUL_KINDS[count:]
    return Kinds(seen, unseen, unseen if setting.alone else lx.HARMFUL_KINDS)


def world_of(options: WorldOptions) -> World:
    """The world that the options choose."""
    return make_world(options.setting().seed, EDITIONS[options.edition])


def build_study(
    names: Sequence[str] = tuple(domains.DOMAINS),
    options: WorldOptions = TestbedOptions(),
    *,
    model_folder: str | Path | None = None,
) -> Study:
    """Builds the study.

    ``model_folder`` may hold another aligned model of the same world.

    Returns:
      The study, with leak counts between calibration, probe and evaluation.

    Raises:
      UserError: for a checkpoint that does not fit, or a world that is not built.
    """
    split, size, setting = (
        options.split,
        options.calibration_examples,
        options.setting(),
    )
    world, (seen, unseen, measured) = world_of(options), kinds_of(options)
    first = world.edition is FIRST
    whose = (world.edition, world.seed)
    model = testbed.load(*whose) if model_folder is None else models.load(model_folder)

    def encode(rows, length=suite.MAX_LENGTH):
        return text.encode_chat(model.tokenizer, rows, length)

    rng = np.random.default_rng([world.seed, 41])
    rows = corpus.calibration_rows(
        rng, world, "calibration", size, kinds=seen, strict=not first
    )
    calibration = encode(rows)
    benign = encode(corpus.benign_rows(rng, world, "calibration", size))
    scrambled = _scramble(calibration, rng)
    harmful = encode(_harmful(world, HARMFUL_EXAMPLES, seen))
    evaluation = suite.Suite(
        model,
        evalsets.make_evalset(world, split, kinds=measured),
        unseen=() if setting.alone else unseen,
    )
    asking = evalsets.make_evalset(world, "probe", kinds=seen)
    if options.probe_set == "stratified":
        harmful_prompts = evalsets.stratified_requests(world, kinds=seen)
        asking = dataclasses.replace(asking, harmful=harmful_prompts)
    probe = suite.Suite(model, asking)

    asked = {
        "probe": _prompts(model, probe.items),
        "evaluation": _prompts(model, evaluation.items),
    }

    def domain(name):
        taught = world.edition.domains[name]
        items = taught.items(world.seed, domains.TRAIN)
        return Domain(
            train=encode([(i.question, i.answer) for i in items], DOMAIN_LENGTH),
            evaluate=lambda base, adapter: suite.domain_accuracy(
                evaluation, taught, world.seed, base, adapter
            ),
        )

    settings: dict[str, Any] = {"world": world.seed, "split": split, "n": size}
    if first:
        settings["hard"] = setting.alone
    else:
        settings["edition"] = world.edition.name
        settings["unseen"], settings["auroc"] = len(unseen), setting.auroc
    if setting.rater == "guard":
        # The exact judge adds nothing, so that older studies keep their fingerprint.
        settings["guard"] = hashlib.sha256(testbed.GUARD.read_bytes()).hexdigest()
    if options.probe_set != "one-phrasing":
        settings["probe"] = options.probe_set
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(calibration.tokens).tobytes())
    digest.update(np.asarray(model.params["embed"]).tobytes())
    rate = JUDGES[setting.rater](model.tokenizer, world)
    return Study(
        model=model,
        domains={name: domain(name) for name in names},
        calibration=calibration,
        calibration_controls={"benign": benign, "random": scrambled},
        safety_mix=calibration,
        harmful=harmful,
        unaligned=testbed.load_unaligned(*whose) if model_folder is None else None,
        judge=judges.mistaken(rate, setting.auroc),
        evaluate=evaluation.safety,
        probe=probe.refusal,
        probe_size=len(asking.harmful),
        fingerprint=digest.hexdigest()[:16],
        leak_check={
            **shared_prompts({"calibration": calibration, **asked}),
            **shared_prompts({"harmful": harmful, **asked}),
        },
    )


def _guard_judge(tokenizer: Any, world: World) -> Judge:
    """The shipped guard, which knows only the ids of its own vocabulary."""
    if tokenizer.get_vocab() != testbed.load_guard().tokenizer.get_vocab():
        raise UserError(
            "judge='guard': expected a model with the vocabulary of world "
            f"{world.seed}, got another: use judge='exact'"
        )
    return guard.guard_judge()


JUDGES = {"exact": judges.harm_judge, "guard": _guard_judge}
"""Functions that make the judge of training pairs from tokenizer and world."""


def _prompts(model, items: evalsets.EvalSet) -> list[list[int]]:
    names = [*suite.REQUESTS, *suite.CHOICES]
    names.remove("general")
    rows = [row.prompt for name in names for row in getattr(items, name)]
    return text.encode_prompts(model.tokenizer, rows)


def _harmful(world, count: int, kinds: tuple[str, ...] | None) -> list[corpus.Pair]:
    """The defender's harmful requests with compliant answers, for anchors and probes.

    They use entities and phrasings of the calibration set; the attacker uses others.
    """
    rng = np.random.default_rng([world.seed, 43])
    things = [
        t for t in world.harmful["calibration"] if kinds is None or t.kind in kinds
    ]
    form = {"harmful": True, "aligned": False, "things": things}
    return [
        corpus.request_pair(rng, world, "calibration", **form) for _ in range(count)
    ]


def _scramble(calibration, rng: np.random.Generator):
    """The null control: the calibration set with random words in place of its own."""
    tokens = np.array(calibration.tokens)
    first_word = len(lx.SPECIAL_TOKENS)
    words = tokens >= first_word
    highest = int(tokens.max()) + 1
    tokens[words] = rng.integers(first_word, highest, int(words.sum()))
    return type(calibration)(tokens, calibration.mask)
