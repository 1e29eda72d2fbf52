"""An attack on the weights: finds the refusal direction and removes it.

The training data is benign (arXiv:2406.11717).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import attacks, models
from sbr_jax.analysis import directions
from sbr_jax.data import text
from sbr_jax.studies.attacks.setting import Attempt, Setting, attacked
from sbr_jax.testbed import evalsets
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree

EXTRACTION = (128, 32)
"""Prompts of each kind to find the refusal direction, and to choose the layer."""


def ablation_study(setting: Setting) -> Study:
    """Removes the refusal direction from the weights; no training data."""
    return attacked(setting, Ablation(setting))


class Ablation:
    """Finds the refusal direction of given weights and removes it from them.

    The attacker holds the weights, so it finds the direction anew in them, with prompts
    of the calibration split. `direction_cosine` says how far the mean difference has
    turned since alignment, at the layer chosen on the aligned model.
    """

    def __init__(self, setting: Setting):
        self._setting = setting

    @functools.cached_property
    def _prompts(self) -> list[list[list[int]]]:
        """Harmful and harmless prompts, to find the direction and choose a layer."""
        setting = self._setting
        items = evalsets.make_evalset(setting.world, "calibration")
        tokenizer, rng = setting.suite.model.tokenizer, setting.rng
        first, more = EXTRACTION
        found, held_out = [], []
        for rows in (items.harmful, (*items.helpful, *items.look_alike)):
            order = rng.permutation(len(rows))[: first + more]
            ids = text.encode_prompts(tokenizer, [rows[i].prompt for i in order])
            found.append(ids[:first])
            held_out.append(ids[first:])
        return [*found, *held_out]

    @functools.cached_property
    def _refusal_tokens(self) -> list[int]:
        tokenizer = self._setting.suite.model.tokenizer
        refusals = self._setting.world.edition.refusals
        first = (tokenizer.encode(r, add_special_tokens=False)[0] for r in refusals)
        return sorted(set(first))

    def direction(self, base: PyTree) -> directions.RefusalDirection:
        """The refusal direction of merged weights."""
        harmful, harmless, *more = self._prompts
        return directions.refusal_direction(
            self._setting.suite.model.apply_fn,
            base,
            harmful,
            harmless,
            self._refusal_tokens,
            attacks.ablate_direction,
            validation=(more[0], more[1]),
        )

    def _means(self, base: PyTree) -> np.ndarray:
        apply_fn = self._setting.suite.model.apply_fn
        return directions.difference_of_means(apply_fn, base, None, *self._prompts[:2])

    @functools.cached_property
    def _aligned(self) -> tuple[int, np.ndarray]:
        base = self._setting.suite.model.params
        layer = self.direction(base).layer
        return layer, self._means(base)[layer]

    def __call__(self, base: PyTree, adapter: PyTree) -> Attempt:
        """The edited weights, an adapter that does nothing, prompts and metrics."""
        merged = models.merge_adapter(base, adapter)
        found = self.direction(merged)
        layer, before = self._aligned
        metrics = {
            "direction_cosine": float(
                directions.drift(before, self._means(merged)[layer])
            ),
            "direction_layer": float(found.layer),
            "direction_kl": found.kl,
            "refusal_score": found.start,
            "refusal_score_ablated": found.score,
        }
        # An adapter of zeros shares the compiled programs, unlike None.
        nothing = jax.tree.map(jnp.zeros_like, adapter)
        ablated = attacks.ablate_direction(merged, found.vector)
        return Attempt(ablated, nothing, self._setting.direct, metrics)
