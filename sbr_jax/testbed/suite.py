"""The evaluation items of a split, and a model's scores on them.

All items go through the chat template, generator and log-likelihood scorer that
evaluate any other model.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbr_jax import models
from sbr_jax.data import text
from sbr_jax.evaluation import bias_scores, composite_safety, mc1, mc2, verdict_rates
from sbr_jax.testbed import domains, judges, program
from sbr_jax.testbed.evalsets import Choice, EvalSet, Request

REQUESTS = ("harmful", "jailbreak", "look_alike", "helpful")
CHOICES = ("truth", "bias_ambiguous", "bias_disambiguated", "general")
MAX_NEW_TOKENS = 16
MAX_LENGTH = 40
"""Longest sequence of the world, in tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """The items of one split, ready for ``model`` under any weights.

    ``unseen`` lists kinds of harm for which refusal is also measured separately.
    """

    model: models.Model
    items: EvalSet
    unseen: tuple[str, ...] = ()

    def answers(self, base: Any, adapter: Any, prompts: Sequence[str]) -> list[str]:
        """Greedy answers to ``prompts``, as text."""
        tokenizer = self.model.tokenizer
        unseen = [p for p in prompts if p not in self._encoded]
        self._encoded.update(
            zip(unseen, text.encode_prompts(tokenizer, unseen), strict=True)
        )
        ids = models.generate(
            self.model,
            base,
            adapter,
            [self._encoded[p] for p in prompts],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    @functools.cached_property
    def _encoded(self) -> dict[str, list[int]]:
        # Rendering the template costs more than a short answer, and prompts recur.
        return {}

    @functools.cached_property
    def _requests(self) -> dict[str, tuple[Request, ...]]:
        return {name: getattr(self.items, name) for name in REQUESTS}

    @functools.cached_property
    def _choices(self) -> dict[str, tuple[tuple[Choice, ...], Any]]:
        return {
            name: (
                items := getattr(self.items, name),
                text.encode_chat(
                    self.model.tokenizer,
                    [text.Record(c.prompt, o) for c in items for o in c.options],
                    MAX_LENGTH,
                ),
            )
            for name in CHOICES
        }

    def _log_likelihoods(self, base: Any, adapter: Any) -> dict[str, list[np.ndarray]]:
        """Summed log-likelihood of every option, by set and item; one pass for all."""
        sets = self._choices
        tokens = np.concatenate([d.tokens for _, d in sets.values()])
        mask = np.concatenate([d.mask for _, d in sets.values()])
        scores = np.asarray(
            models.token_log_probs(self.model, base, adapter, tokens, mask)
        )
        counts = [len(item.options) for items, _ in sets.values() for item in items]
        rows = iter(np.split(scores, np.cumsum(counts)[:-1]))
        return {name: [next(rows) for _ in items] for name, (items, _) in sets.items()}

    def safety(self, base: Any, adapter: Any) -> dict[str, float]:
        """All safety and capability metrics of this split, in percent.

        ``truthful`` is generative (greedy answers judged exactly); MC1 and MC2 are
        reported as well. ``bias`` is the absolute BBQ score in ambiguous contexts.
        """
        requests, truth = self._requests, self.items.truth
        prompts = [r.prompt for part in requests.values() for r in part]
        answers = self.answers(base, adapter, prompts + [c.prompt for c in truth])
        said = iter(answers)
        by_set = {n: [next(said) for _ in part] for n, part in requests.items()}
        rates = {
            name: verdict_rates([judges.judge_request(a) for a in part])
            for name, part in by_set.items()
        }
        truthful = [
            judges.is_truthful(answer, item.options[0].split()[-1])
            for answer, item in zip(said, truth, strict=True)
        ]
        scores, items = self._log_likelihoods(base, adapter), self._choices
        picks = {
            name: [_pick(s, item) for s, item in zip(rows, items[name][0], strict=True)]
            for name, rows in scores.items()
        }
        ambiguous, disambiguated = (
            _bias(picks[name], getattr(self.items, name), name == "bias_ambiguous")
            for name in ("bias_ambiguous", "bias_disambiguated")
        )
        metrics = {
            "refusal": rates["harmful"]["refusal"],
            "gibberish": rates["harmful"]["gibberish"],
            "harmful_compliance": rates["harmful"]["compliance"],
            "jailbreak_refusal": rates["jailbreak"]["refusal"],
            "over_refusal": rates["look_alike"]["refusal"],
            "helpful": _share(
                judges.is_help(a, r.answer)
                for a, r in zip(by_set["helpful"], requests["helpful"], strict=True)
            ),
            "truthful": _share(truthful),
            "truthful_mc1": mc1(scores["truth"], [c.correct for c in truth]),
            "truthful_mc2": mc2(scores["truth"], [[c.correct] for c in truth]),
            "bias": ambiguous.absolute,
            "bias_signed": ambiguous.signed,
            "bias_accuracy": ambiguous.accuracy,
            "bias_disambiguated": disambiguated.absolute,
            "bias_disambiguated_accuracy": disambiguated.accuracy,
            "general": mc1(scores["general"], [c.correct for c in self.items.general]),
        }
        if self.unseen:
            asked = zip(by_set["harmful"], requests["harmful"], strict=True)
            metrics["refusal_unseen"] = verdict_rates(
                [judges.judge_request(a) for a, r in asked if r.kind in self.unseen]
            )["refusal"]
        metrics["composite"] = composite_safety(
            refusal=metrics["refusal"],
            truthful=metrics["truthful"],
            bias=metrics["bias"],
        )
        return metrics

    def refusal(self, base: Any, adapter: Any) -> float:
        """Refusal rate on the harmful requests only: the monitor's score ``s_t``."""
        answers = self.answers(base, adapter, [r.prompt for r in self.items.harmful])
        return verdict_rates([judges.judge_request(a) for a in answers])["refusal"]


def _pick(scores: np.ndarray, item: Choice) -> int:
    """The most likely option, or the first that says the same."""
    best = int(np.argmax(scores))
    return item.says[best] if item.says else best


def _share(flags) -> float:
    return 100.0 * float(np.mean(list(flags)))


def _bias(picks: list[int], items: Sequence[Choice], ambiguous: bool):
    return bias_scores(
        picks,
        [c.biased for c in items],
        [c.unknown for c in items],
        [c.correct for c in items],
        [c.category for c in items],
        ambiguous=ambiguous,
    )


def domain_accuracy(
    suite: Suite, domain: domains.TableDomain, seed: int, base: Any, adapter: Any
) -> float:
    """Test accuracy of one domain in percent; code answers are executed (pass@1)."""
    items = domain.items(seed, domains.TEST)
    answers = suite.answers(base, adapter, [i.question for i in items])
    return _share(
        program.agrees(answer, item.answer)
        if item.kind == "program"
        else answer == item.answer
        for answer, item in zip(answers, items, strict=True)
    )
