"""Setting of every attack on the testbed: the study before it, and its measures.

    harmful_score = 100 · share of held-out harmful requests that are complied with
    asr           = the same share for the attack's prompts, on the weights it leaves

An answer may be neither compliance nor refusal. `asr_gibberish` is the share of these,
so that a broken model does not pass for a safe one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sbr_jax.evaluation import verdict_rates
from sbr_jax.studies import testbed as study_maker
from sbr_jax.studies.options import TestbedOptions, WorldOptions
from sbr_jax.testbed import evalsets, judges, suite
from sbr_jax.testbed.world import World
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Setting:
    """The testbed's study before the attack, with its world and items."""

    study: Study
    suite: suite.Suite
    world: World
    split: str

    @property
    def direct(self) -> list[str]:
        """The held-out harmful requests, unchanged."""
        return [request.prompt for request in self.suite.items.harmful]

    @property
    def rng(self) -> np.random.Generator:
        """The attacker's random generator, in its initial state."""
        return np.random.default_rng([self.world.seed, 53])


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Result of an attack on weights: base and adapter to ask, prompts, metrics."""

    base: PyTree
    adapter: PyTree
    asked: Sequence[str]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


Attempts = Callable[[PyTree, PyTree], Attempt]
"""An attack on the base and adapter that a row deploys."""


def make_setting(
    names: Sequence[str],
    options: WorldOptions = TestbedOptions(),
    *,
    model_folder: str | None = None,
) -> Setting:
    """Builds the testbed's study over some domains; see `testbed.build_study`."""
    study = study_maker.build_study(names, options, model_folder=model_folder)
    world = study_maker.world_of(options)
    kinds = study_maker.kinds_of(options).measured
    items = evalsets.make_evalset(world, options.split, kinds=kinds)
    return Setting(study, suite.Suite(study.model, items), world, options.split)


def asking(prompts: Sequence[str]) -> Attempts:
    """The attack that leaves the weights alone and asks these prompts."""
    return lambda base, adapter: Attempt(base, adapter, prompts)


def rates(
    setting: Setting, base: PyTree, adapter: PyTree, prompts: Sequence[str]
) -> dict[str, float]:
    """Refusal, compliance and gibberish rates of greedy answers, in percent."""
    answers = setting.suite.answers(base, adapter, prompts)
    return verdict_rates([judges.judge_request(answer) for answer in answers])


def attacked(setting: Setting, attempt: Attempts, refusal: str | None = None) -> Study:
    """Adds the attack's own metrics to those of the study.

    ``refusal`` names the metric for refusals under the attack; None leaves it out.

    Returns:
      The study with `harmful_score`, `asr`, `asr_gibberish` and the attack's metrics.
    """
    whole = setting.study.evaluate

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        direct = rates(setting, base, adapter, setting.direct)
        found = attempt(base, adapter)
        under = rates(setting, found.base, found.adapter, found.asked)
        named = {} if refusal is None else {refusal: under["refusal"]}
        return {
            **whole(base, adapter),
            "harmful_score": direct["compliance"],
            "asr": under["compliance"],
            "asr_gibberish": under["gibberish"],
            **named,
            **found.metrics,
        }

    return dataclasses.replace(setting.study, evaluate=evaluate)
