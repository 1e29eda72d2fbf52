"""Searches for suffixes during alignment, so that it is trained against its own.

Before each further round of alignment, GCG looks for suffixes of a few harmful requests
of the split `train` that make the current model begin to comply. The budget is small:
all that matters is that alignment sees such suffixes at all.
"""

from typing import Any

import jax
import numpy as np

from sbr_jax import models
from sbr_jax.attacks import ascii_tokens, gcg, gcg_prompts, round_trips
from sbr_jax.testbed import corpus, grammar
from sbr_jax.testbed import lexicon as lx
from sbr_jax.typing import PyTree

PLACEHOLDER = "."
"""The word that fills a suffix before the search."""
REQUESTS, LENGTH, STEPS, CANDIDATES = 16, 20, 8, 64
TARGET_WORDS = 6
"""Words of the compliant answer that the search aims at: its first step."""


class SuffixSearch:
    """GCG against a model's weights, for a fixed draw of harmful requests."""

    def __init__(self, model: models.Model, pretraining: corpus.Pretraining):
        """Draws the requests once, so that one compiled program serves every round."""
        world = pretraining.world
        rng = np.random.default_rng([world.seed, 71])
        self.model, self.pairs = model, []
        for i in range(REQUESTS):
            thing = corpus.pick(rng, world.harmful["train"])
            action = corpus.pick(rng, lx.HARMFUL_ACTIONS)
            prompt = grammar.request(world, "train", i, action, thing)
            answer = grammar.compliance(world, action, thing)
            self.pairs.append((prompt, " ".join(answer.split()[:TARGET_WORDS])))

    def __call__(self, params: PyTree, number: int) -> list[str]:
        """The suffixes found against ``params``; ``number`` is the round's."""
        tokenizer: Any = self.model.tokenizer
        prompts, targets = zip(*self.pairs, strict=True)
        found = gcg(
            self.model.apply_fn,
            params,
            None,
            gcg_prompts(tokenizer, list(prompts), LENGTH, PLACEHOLDER),
            tokenizer(list(targets), add_special_tokens=False)["input_ids"],
            key=jax.random.key(number),
            allowed=ascii_tokens(tokenizer, self.model.config.vocab_size),
            initial_token=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
            suffix_length=LENGTH,
            steps=STEPS,
            candidates=CANDIDATES,
            round_trip=round_trips(tokenizer),
            extend_fn=models.make_extend_fn(self.model.config, self.model.hardware),
        )
        return tokenizer.batch_decode(found.best_suffixes)
