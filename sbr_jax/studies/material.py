"""Examples of the testbed by kind, and the refusal direction that they span."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.typing import PyTree

CALIBRATION, HELD_OUT = "calibration", "probe"
"""Splits for subspaces, and for what is measured."""


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Token data sets whose kind is known.

    Attributes:
        kinds: kind of safe behaviour to its examples, all prompts different, equally
            many of each kind; an even number.
        refusing: held-out harmful requests with refusals.
        complying: the same requests with compliant answers.
        harmless: held-out harmless requests: benign ones, and look-alikes about
            harmful things.
    """

    kinds: Mapping[str, Any]
    refusing: Any
    complying: Any
    harmless: Any


def build_material(tokenizer: Any, *, hard: bool, examples: int) -> Material:
    """Builds it from the testbed's world.

    Args:
        tokenizer: of the testbed's model.
        hard: leave out the harm categories that `testbed-hard` holds out.
        examples: at most so many in each half of a kind.
    """
    from sbr_jax import testbed
    from sbr_jax.data import text
    from sbr_jax.studies.testbed import HELD_OUT_KINDS
    from sbr_jax.testbed import corpus, evalsets, grammar, suite
    from sbr_jax.testbed import lexicon as lx
    from sbr_jax.testbed.world import make_world

    world = make_world(testbed.SEED)
    out = HELD_OUT_KINDS if hard else ()
    seen = tuple(kind for kind in lx.HARMFUL_KINDS if kind not in out)
    things = [t for t in world.harmful[CALIBRATION] if t.kind in seen]
    rng = np.random.default_rng([world.seed, 59])
    makers = {
        "refusal": lambda: corpus.request_pair(
            rng,
            world,
            CALIBRATION,
            harmful=True,
            aligned=True,
            jailbreak_share=0.25,
            things=things,
        ),
        "truth": lambda: corpus.truth_pair(rng, world, CALIBRATION, truthful=True),
        "bias": lambda: corpus.bias_pair(
            rng, world, CALIBRATION, aligned=True, ambiguous=True
        ),
        "helpful": lambda: corpus.request_pair(
            rng, world, CALIBRATION, harmful=False, aligned=True
        ),
    }
    rows = {kind: distinct(make, 2 * examples) for kind, make in makers.items()}
    half = min(len(found) // 2 for found in rows.values())
    items = evalsets.make_evalset(world, HELD_OUT, kinds=seen)
    harmless = (*items.helpful, *items.look_alike)

    def encode(found: Sequence[tuple[str, str]]) -> Any:
        return text.encode_chat(tokenizer, found, suite.MAX_LENGTH)

    return Material(
        kinds={kind: encode(found[: 2 * half]) for kind, found in rows.items()},
        refusing=encode(
            [(r.prompt, grammar.refusal(i)) for i, r in enumerate(items.harmful)]
        ),
        complying=encode([(r.prompt, r.answer) for r in items.harmful]),
        harmless=encode([(r.prompt, r.answer) for r in harmless]),
    )


def request_sets(tokenizer: Any, *, hard: bool) -> dict[str, dict[str, Any]]:
    """Held-out requests by what they ask for, `harmful` and `harmless`.

    Args:
        tokenizer: of the testbed's model.
        hard: apart from the others, the harm categories that `testbed-hard` holds out.
    """
    from sbr_jax import testbed
    from sbr_jax.data import text
    from sbr_jax.studies.testbed import HELD_OUT_KINDS
    from sbr_jax.testbed import evalsets, suite
    from sbr_jax.testbed import lexicon as lx
    from sbr_jax.testbed.world import make_world

    world, out = make_world(testbed.SEED), HELD_OUT_KINDS if hard else ()
    seen = tuple(kind for kind in lx.HARMFUL_KINDS if kind not in out)
    items = evalsets.make_evalset(world, HELD_OUT, kinds=seen)
    harmful = {"direct": items.harmful, "behind a jailbreak": items.jailbreak}
    if hard:
        other = evalsets.make_evalset(world, HELD_OUT, kinds=out)
        harmful["of unseen kinds"] = other.harmful
    sets = {
        "harmful": harmful,
        "harmless": {"helpful": items.helpful, "look-alikes": items.look_alike},
    }
    return {
        side: {
            name: text.encode_chat(
                tokenizer, [(r.prompt, r.answer) for r in rows], suite.MAX_LENGTH
            )
            for name, rows in found.items()
        }
        for side, found in sets.items()
    }


def distinct(
    make: Callable[[], tuple[str, str]], count: int, patience: int = 40
) -> list[tuple[str, str]]:
    """Draws rows until so many have different prompts, or no new ones come.

    >>> distinct(iter([("a", "1"), ("a", "2"), ("b", "3")]).__next__, 2)
    [('a', '1'), ('b', '3')]
    """
    found: dict[str, str] = {}
    for _ in range(patience * count):
        prompt, answer = make()
        found.setdefault(prompt, answer)
        if len(found) == count:
            break
    return list(found.items())


def direction(
    model: Any, base: PyTree, adapter: PyTree, material: Material
) -> np.ndarray:
    """The refusal direction ``[L + 1, D]`` of the held-out requests."""
    from sbr_jax.analysis.directions import difference_of_means

    return difference_of_means(
        model.apply_fn, base, adapter, material.refusing, material.harmless
    )


def with_direction(study: Any, material: Material) -> Any:
    """The study that also measures the refusal direction at every evaluation.

    Its metrics gain `direction_cosine`, to the aligned model's direction, and
    `refusal_log_odds`.
    """
    from sbr_jax.analysis.coupling import mean_cosine, refusal_log_odds

    model = study.model
    aligned = direction(model, model.params, None, material)

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        now = direction(model, base, adapter, material)
        return {
            **study.evaluate(base, adapter),
            "direction_cosine": mean_cosine(aligned, now),
            "refusal_log_odds": refusal_log_odds(
                model, base, adapter, material.refusing, material.complying
            ),
        }

    return dataclasses.replace(
        study, evaluate=evaluate, fingerprint=f"{study.fingerprint}+direction"
    )
