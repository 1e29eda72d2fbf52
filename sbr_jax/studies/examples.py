"""Examples of the testbed by kind, and the refusal direction between them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.analysis.coupling import mean_cosine, refusal_log_odds
from sbr_jax.analysis.directions import difference_of_means
from sbr_jax.data import TokenDataset, encode_chat
from sbr_jax.models import Model
from sbr_jax.studies.options import WorldOptions
from sbr_jax.studies.testbed import kinds_of, world_of
from sbr_jax.testbed import corpus, evalsets, grammar
from sbr_jax.testbed.evalsets import Request
from sbr_jax.testbed.suite import MAX_LENGTH
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree

CALIBRATION, HELD_OUT = "calibration", "probe"
"""Splits for subspaces, and for measurements."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Token data sets whose kind is known.

    Attributes:
        kinds: examples by kind of safe behaviour, with different prompts; every kind
            has the same even number.
        refusing: held-out harmful requests with refusals.
        complying: the same requests with compliant answers.
        harmless: held-out harmless requests: benign ones, and look-alikes about
            harmful things.
    """

    kinds: Mapping[str, TokenDataset]
    refusing: TokenDataset
    complying: TokenDataset
    harmless: TokenDataset


def build_examples(tokenizer: Any, options: WorldOptions, *, examples: int) -> Examples:
    """Builds the examples from the testbed's world.

    ``examples`` is the largest number in each half of a kind. Kinds of harm that no
    defence sees are left out.
    """
    world, (seen, _, _) = world_of(options), kinds_of(options)
    things = [t for t in world.harmful[CALIBRATION] if t.kind in seen]
    rng = np.random.default_rng([world.seed, 59])
    drawn = (rng, world, CALIBRATION)
    makers: dict[str, Callable[[], tuple[str, str]]] = {
        "refusal": lambda: corpus.request_pair(
            *drawn, harmful=True, aligned=True, jailbreak_share=0.25, things=things
        ),
        "truth": lambda: corpus.truth_pair(*drawn, truthful=True),
        "bias": lambda: corpus.bias_pair(*drawn, aligned=True, ambiguous=True),
        "helpful": lambda: corpus.request_pair(*drawn, harmful=False, aligned=True),
    }
    rows = {kind: distinct(make, 2 * examples) for kind, make in makers.items()}
    half = min(len(found) // 2 for found in rows.values())
    items = evalsets.make_evalset(world, HELD_OUT, kinds=seen)
    refused = [
        (r.prompt, grammar.refusal(world, i)) for i, r in enumerate(items.harmful)
    ]
    return Examples(
        kinds={k: _encode(tokenizer, found[: 2 * half]) for k, found in rows.items()},
        refusing=_encode(tokenizer, refused),
        complying=_encode(tokenizer, _answered(items.harmful)),
        harmless=_encode(tokenizer, _answered((*items.helpful, *items.look_alike))),
    )


def request_sets(
    tokenizer: Any, options: WorldOptions
) -> dict[str, dict[str, TokenDataset]]:
    """Held-out requests, `harmful` and `harmless`, by set.

    Kinds of harm that no defence sees are a set of their own.
    """
    world, (seen, unseen, _) = world_of(options), kinds_of(options)
    items = evalsets.make_evalset(world, HELD_OUT, kinds=seen)
    harmful = {"direct": items.harmful, "behind a jailbreak": items.jailbreak}
    if unseen:
        other = evalsets.make_evalset(world, HELD_OUT, kinds=unseen)
        harmful["of unseen kinds"] = other.harmful
    harmless = {"helpful": items.helpful, "look-alikes": items.look_alike}
    return {
        side: {name: _encode(tokenizer, _answered(rows)) for name, rows in sets.items()}
        for side, sets in {"harmful": harmful, "harmless": harmless}.items()
    }


def _answered(requests: Sequence[Request]) -> list[tuple[str, str]]:
    return [(r.prompt, r.answer) for r in requests]


def _encode(tokenizer: Any, rows: Sequence[tuple[str, str]]) -> TokenDataset:
    return encode_chat(tokenizer, rows, MAX_LENGTH)


def distinct(make: Callable[[], tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Draws rows until ``count`` prompts differ, or no new ones come.

    >>> distinct(iter([("a", "1"), ("a", "2"), ("b", "3")]).__next__, 2)
    [('a', '1'), ('b', '3')]
    """
    found: dict[str, str] = {}
    for _ in range(40 * count):
        prompt, answer = make()
        found.setdefault(prompt, answer)
        if len(found) == count:
            break
    return list(found.items())


def direction(
    model: Model, base: PyTree, adapter: PyTree, examples: Examples
) -> np.ndarray:
    """The refusal direction ``[L + 1, D]`` of the held-out requests."""
    return difference_of_means(
        model.apply_fn, base, adapter, examples.refusing, examples.harmless
    )


def with_direction(study: Study, examples: Examples) -> Study:
    """Makes a study also measure the refusal direction at every evaluation.

    Its metrics gain `direction_cosine` (to the aligned model's direction) and
    `refusal_log_odds`.
    """
    model = study.model
    aligned = direction(model, model.params, None, examples)

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        now = direction(model, base, adapter, examples)
        return {
            **study.evaluate(base, adapter),
            "direction_cosine": mean_cosine(aligned, now),
            "refusal_log_odds": refusal_log_odds(
                model, base, adapter, examples.refusing, examples.complying
            ),
        }

    return dataclasses.replace(
        study, evaluate=evaluate, fingerprint=f"{study.fingerprint}+direction"
    )
