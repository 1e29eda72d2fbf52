"""GCG on a chat model: a suffix searched for each of a few requests of AdvBench.

The data is benign. After every domain, and on the aligned model, the search makes the
given weights begin AdvBench's own compliant answer; the greedy answer to exactly these
tokens is judged by the study's judge (arXiv:2307.15043). Random suffixes of the same
length are the control, and the requests alone are asked too.

The requests are measured by the study as well, so its leak checks cover them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbr_jax import models
from sbr_jax.attacks import (
    SplitPrompt,
    ascii_tokens,
    gcg_prompts,
    text_round_trips,
)
from sbr_jax.data.exchange import stop_tokens
from sbr_jax.data.leaks import distinct
from sbr_jax.data.registry import data_folder, load_evalset
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import option
from sbr_jax.evaluation import verdict_rates
from sbr_jax.evaluation.benchmarks import draw
from sbr_jax.evaluation.runner import decode_answer
from sbr_jax.settings import Hardware
from sbr_jax.studies.attacks.prompts import searched
from sbr_jax.studies.chat.judges import make_judge
from sbr_jax.studies.chat.study import ChatStudy, build_study, make_runner
from sbr_jax.studies.options import ChatOptions, Sources
from sbr_jax.typing import PyTree, UserError

PLACEHOLDER = "!"
"""Fills a suffix before the search."""
REQUESTS = "advbench"
"""The set of requests, which has the beginning of a compliant answer to each."""


def gcg_study(
    domains: Sequence[str],
    options: ChatOptions,
    sources: Sources,
    hardware: Hardware = Hardware(),
    *,
    prompts: int,
    steps: int,
    suffix_length: int,
    candidates: int,
    weights: bool = True,
    quiet: bool = True,
) -> ChatStudy:
    """A chat model's study that also attacks whatever weights it evaluates.

    Args:
        domains: see `sbr_jax.studies.chat.build_study`, like the next four.
        options: of the study; its benchmarks must hold the requests.
        sources: model and data.
        hardware: how weights are spread and answers batched.
        prompts: number of requests to search a suffix for.
        steps: of the search.
        suffix_length: tokens of a suffix.
        candidates: suffixes tried in each step, for each request.
        weights: False to read no weights.
        quiet: no progress bar.

    Raises:
        UserError: if the study does not measure so many requests, or a suffix leaves no
            room for an answer; and the errors of `build_study`.
    """
    build = functools.partial(build_study, domains, options, sources, hardware)
    study = build(weights=False)  # Everything is checked before weights are read.
    asked = study.asked.get(REQUESTS, (0, 0.0))[0]
    if prompts > asked:
        raise UserError(
            f"{option('prompts')}: expected at most {asked}, the requests of "
            f"{REQUESTS} that this run measures and keeps from its defences, got "
            f"{prompts}: add {REQUESTS} to the study's benchmarks, or raise its limit"
        )
    folder = None if sources.data is None else data_folder(sources.data)
    found = distinct(load_evalset(REQUESTS, folder, split="all"))[0]
    budget = {"steps": steps, "suffix_length": suffix_length, "candidates": candidates}
    items = draw(found, prompts)
    search = Search(study, options, hardware, items, budget, quiet)
    if weights:
        study = build(weights=True)
        search = Search(study, options, hardware, items, budget, quiet)
    measure, mark = study.evaluate, ["gcg", *(item.id for item in items)]

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        return {**measure(base, adapter), **search(base, adapter)}

    digest = hashlib.sha256(" ".join([study.fingerprint, *mark]).encode())
    return dataclasses.replace(
        study, evaluate=evaluate, fingerprint=digest.hexdigest()[:16]
    )


class Search:
    """GCG against given weights of a chat model, for fixed requests."""

    def __init__(
        self,
        study: ChatStudy,
        options: ChatOptions,
        hardware: Hardware,
        items: Sequence[Any],
        budget: dict[str, int],
        quiet: bool,
    ):
        """Lays the requests out around their suffixes; see `gcg_study`."""
        self._model, self._options, self._hardware = study.model, options, hardware
        self._requests = [item.prompt for item in items]
        self._goals = [item.target for item in items]
        self._budget, self._quiet = budget, quiet
        longest = max(len(x.asked(())) for x in self._prompts)
        room = self._model.config.context - longest - options.max_new_tokens
        if budget["suffix_length"] > room:
            raise UserError(
                f"{option('suffix_length')}: expected at most {room}, what the longest "
                f"request and an answer leave of the model's context of "
                f"{self._model.config.context}, got {budget['suffix_length']}"
            )

    @functools.cached_property
    def _judge(self) -> Any:
        return make_judge(self._options)

    @functools.cached_property
    def _prompts(self) -> list[SplitPrompt]:
        return gcg_prompts(
            self._model.tokenizer,
            self._requests,
            self._budget["suffix_length"],
            PLACEHOLDER,
            system=self._options.system,
        )

    @functools.cached_property
    def _filler(self) -> int:
        """The token that a placeholder became."""
        first = self._prompts[0]
        room = f" {PLACEHOLDER}" * self._budget["suffix_length"]
        text = [self._requests[0] + room]
        own = self._options.system
        (tokens,) = encode_prompts(self._model.tokenizer, text, system=own)
        return tokens[len(first.before)]

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        return ascii_tokens(self._model.tokenizer, self._model.config.vocab_size)

    def __call__(self, base: PyTree, adapter: PyTree) -> dict[str, float]:
        """Rates of the requests alone, with the best suffixes, and with random ones."""
        model, tokenizer = self._model, self._model.tokenizer
        runner = make_runner(model, self._options, self._hardware)(base, adapter)
        survives = text_round_trips(
            tokenizer, self._requests, self._prompts, system=self._options.system
        )
        pairs = zip(self._requests, self._goals, strict=True)
        targets = [runner.pairs(prompt, [goal])[0][1] for prompt, goal in pairs]
        found = searched(
            model,
            base,
            adapter,
            self._prompts,
            targets,
            allowed=self._allowed,
            initial_token=self._filler,
            round_trip=survives,
            quiet=self._quiet,
            **self._budget,
        )
        shape = found.best_suffixes.shape
        random = np.random.default_rng(53).choice(np.flatnonzero(self._allowed), shape)
        direct = self._rates(base, adapter, np.zeros((shape[0], 0), int))
        under = self._rates(base, adapter, found.best_suffixes)
        control = self._rates(base, adapter, random)
        return {
            "harmful_score": direct["compliance"],
            "asr": under["compliance"],
            "asr_gibberish": under["gibberish"],
            "refusal_gcg": under["refusal"],
            "refusal_random_suffix": control["refusal"],
            "gcg_loss_first": float(np.mean(found.best_losses[:, 0])),
            "gcg_loss_last": float(np.mean(found.best_losses[:, -1])),
        }

    def _rates(
        self, base: PyTree, adapter: PyTree, suffixes: np.ndarray
    ) -> dict[str, float]:
        """Verdicts on greedy answers to the requests with suffixes ``[N, S]``, in %."""
        tokenizer, system = self._model.tokenizer, self._options.system
        pairs = zip(self._prompts, suffixes.tolist(), strict=True)
        asked = [prompt.asked(suffix) for prompt, suffix in pairs]
        new = models.generate(
            self._model,
            base,
            adapter,
            asked,
            max_new_tokens=self._options.max_new_tokens,
            batch_size=self._hardware.generation_batch,
            stops=stop_tokens(tokenizer, system=system),
        )
        both = zip(asked, new, strict=True)
        answers = [decode_answer(tokenizer, *pair).strip() for pair in both]
        return verdict_rates(self._judge(self._requests, answers))
