"""Attacks by the prompt alone: held-out jailbreaks, and suffixes found by GCG.

The training data is benign. A jailbreak is a fixed phrasing. GCG searches, for each
request, 20 words that make the given weights begin the compliant answer. The search is
therefore repeated for every row, on the weights that the row deploys (arXiv:2307.15043,
with the reduced budget of arXiv:2604.17691).

The testbed's aligned model has never seen words behind a request, so any suffix may
break its refusal. The control is to ask random suffixes of the same length too
(`refusal_random_suffix`): the search has no part in what they break.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sbr_jax import models
from sbr_jax.attacks import SplitPrompt, ascii_tokens, gcg, gcg_prompts, round_trips
from sbr_jax.attacks.gcg import GcgResult
from sbr_jax.models import Model
from sbr_jax.studies.attacks.setting import Attempt, Setting, asking, attacked, rates
from sbr_jax.testbed import grammar
from sbr_jax.testbed.evalsets import Request
from sbr_jax.testbed.suite import MAX_NEW_TOKENS
from sbr_jax.training.loop import Bar
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree, UserError

PLACEHOLDER = "."
"""The word that fills a suffix before the search."""
TARGET_WORDS = 6
"""Number of words of the compliant answer that the search targets: up to its first
step, as in "sure , first heat the basin". With the opening alone (three words), plain
LoRA broke off into gibberish twice as often."""


def jailbreak_study(setting: Setting) -> Study:
    """Asks every harmful request behind every held-out jailbreak; no training data."""
    world, split = setting.world, setting.split
    wrappers = range(len(world.edition.phrasings.jailbreaks[split]))
    asked = [
        grammar.jailbreak(world, split, i, p) for p in setting.direct for i in wrappers
    ]
    return attacked(setting, asking(asked))


def gcg_study(
    setting: Setting, *, prompts: int, quiet: bool = True, **budget: int
) -> Study:
    """Asks harmful requests with suffixes searched for them; no training data."""
    search = SuffixSearch(setting, prompts=prompts, quiet=quiet, **budget)
    return attacked(setting, search, "refusal_gcg")


class SuffixSearch:
    """GCG against given weights, for a fixed draw of the held-out requests.

    A request's search depends only on its place in the draw and on the weights, so a
    larger number of requests does not change the attack on the first ones.
    """

    def __init__(
        self,
        setting: Setting,
        steps: int,
        suffix_length: int,
        candidates: int,
        prompts: int,
        *,
        quiet: bool = True,
    ):
        """Draws the requests.

        Raises:
          UserError: for more requests than are held out, or a suffix that leaves no
            room for an answer in the model's context.
        """
        held_out = setting.suite.items.harmful
        if prompts > len(held_out):
            raise UserError(
                f"prompts: expected at most {len(held_out)}, the held-out harmful "
                f"requests, got {prompts}"
            )
        order = setting.rng.permutation(len(held_out))[:prompts]
        self.requests: Sequence[Request] = [held_out[i] for i in order]
        self._setting, self._model = setting, setting.suite.model
        self._quiet = quiet
        self._budget: dict[str, Any] = {
            "steps": steps,
            "suffix_length": suffix_length,
            "candidates": candidates,
        }
        config = self._model.config
        longest = max(len(before) + len(after) for before, after in self._prompts)
        room = config.context - longest - MAX_NEW_TOKENS
        if suffix_length > room:
            raise UserError(
                f"suffix_length: expected at most {room}, what the longest request and "
                f"an answer leave of the model's context of {config.context}, got "
                f"{suffix_length}"
            )

    @functools.cached_property
    def _prompts(self) -> list[SplitPrompt]:
        return gcg_prompts(
            self._model.tokenizer,
            [request.prompt for request in self.requests],
            self._budget["suffix_length"],
            PLACEHOLDER,
        )

    @functools.cached_property
    def _targets(self) -> list[list[int]]:
        answers = [" ".join(r.answer.split()[:TARGET_WORDS]) for r in self.requests]
        return self._model.tokenizer(answers, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        return ascii_tokens(self._model.tokenizer, self._model.config.vocab_size)

    def _asked(self, suffixes: np.ndarray) -> list[str]:
        """The requests followed by these suffixes `[N, S]`."""
        texts = self._model.tokenizer.batch_decode(suffixes)
        return [f"{r.prompt} {t}" for r, t in zip(self.requests, texts, strict=True)]

    def __call__(self, base: PyTree, adapter: PyTree) -> Attempt:
        """The requests with the best suffixes found, and how much the loss fell."""
        model, tokenizer = self._model, self._model.tokenizer
        found = searched(
            model,
            base,
            adapter,
            self._prompts,
            self._targets,
            allowed=self._allowed,
            initial_token=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
            round_trip=round_trips(tokenizer),
            quiet=self._quiet,
            **self._budget,
        )
        shape = len(self.requests), self._budget["suffix_length"]
        words = self._setting.rng.choice(np.flatnonzero(self._allowed), shape)
        control = rates(self._setting, base, adapter, self._asked(words))
        metrics = {
            "gcg_loss_first": float(np.mean(found.best_losses[:, 0])),
            "gcg_loss_last": float(np.mean(found.best_losses[:, -1])),
            "refusal_random_suffix": control["refusal"],
        }
        return Attempt(base, adapter, self._asked(found.best_suffixes), metrics)


def searched(
    model: Model,
    base: PyTree,
    adapter: PyTree,
    prompts: Sequence[SplitPrompt],
    targets: Sequence[Sequence[int]],
    *,
    steps: int,
    quiet: bool,
    **options: Any,
) -> GcgResult:
    """GCG on a model record with a progress bar; the options are those of `gcg`."""
    bar = Bar("gcg", steps, quiet=quiet)
    try:
        return gcg(
            model.apply_fn,
            base,
            adapter,
            prompts,
            targets,
            key=jax.random.key(0),
            extend_fn=models.make_extend_fn(model.config, model.hardware),
            on_step=lambda step, losses: bar.to(step, float(np.mean(losses))),
            steps=steps,
            **options,
        )
    finally:
        bar.close()
