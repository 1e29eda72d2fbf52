"""Any language model as a judge: the likeliest of a few labels under a template."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.evaluation.guard_format import (
    fill,
    read_template,
    special_texts,
    template_hash,
    without,
)
from sbr_jax.evaluation.judges import Verdict, check_pairs
from sbr_jax.evaluation.keyword import is_gibberish
from sbr_jax.evaluation.runner import encode_options
from sbr_jax.evaluation.scorer import Request, score
from sbr_jax.models import Model
from sbr_jax.typing import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class LabelJudge:
    """Compares ``p(label | template)`` of a few labels.

    Attributes:
      model: the judge, with its tokenizer.
      template: text with ``{prompt}`` and ``{answer}`` that ends where the label comes
        (or the path of a file that holds it).
      labels: label as it follows the template (mind its leading space) → verdict.
      min_mass: if the labels together have less probability than this, the model was
        not answering the question, and the exchange is unparsed.
      gibberish: call answers without language gibberish, and do not ask.
    """

    model: Model
    template: str | Path
    labels: Mapping[str, Verdict]
    min_mass: float = 0.1
    gibberish: bool = True

    def __post_init__(self):
        fill(read_template(self.template), prompt="", answer="")
        if len(set(self.labels.values())) < 2:
            raise UserError(
                "label judge: expected labels of at least two verdicts, got "
                f"{dict(self.labels)}"
            )
        if not 0 <= self.min_mass < 1:
            raise UserError(
                f"label judge: expected min_mass in [0, 1), got {self.min_mass!r}"
            )

    def probabilities(
        self, prompts: Sequence[str], answers: Sequence[str]
    ) -> np.ndarray:
        """Probability of each label (not normalised over them).

        Args:
          prompts: text.
          answers: text.

        Returns:
          ``[N, labels]``; NaN where the exchange is too long for the judge.
        """
        check_pairs(prompts, answers)
        text = read_template(self.template)
        tokenizer = self.model.tokenizer
        specials = special_texts(tokenizer)
        requests, places = [], []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            parts = {"prompt": prompt, "answer": answer}
            asked = fill(text, **{n: without(t, specials) for n, t in parts.items()})
            pairs = encode_options(tokenizer, asked, list(self.labels))
            longest = max(len(a) + len(b) for a, b in pairs) - 1
            if longest <= self.model.config.context:
                requests += [Request(a, [b]) for a, b in pairs]
                places.append(i)
        found = score(self.model, self.model.params, None, requests)
        out = np.full((len(prompts), len(self.labels)), np.nan)
        log_p = np.array([s.log_likelihoods[0] for s in found], np.float64)
        out[places] = np.exp(log_p).reshape(len(places), len(self.labels))
        return out

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per pair: the likeliest label's."""
        check_pairs(prompts, answers)
        asked = [
            i
            for i, answer in enumerate(answers)
            if not (self.gibberish and is_gibberish(answer))
        ]
        p = self.probabilities([prompts[i] for i in asked], [answers[i] for i in asked])
        verdicts = [Verdict.GIBBERISH] * len(prompts)
        names = list(self.labels.values())
        for i, row in zip(asked, p, strict=True):
            sure = np.isfinite(row).all() and row.sum() >= self.min_mass
            verdicts[i] = names[int(row.argmax())] if sure else Verdict.UNPARSED
        return verdicts

    def describe(self) -> dict[str, Any]:
        """Its labels and the least mass they need."""
        return {
            "judge": "label",
            "labels": {label: v.value for label, v in self.labels.items()},
            "min_mass": self.min_mass,
            "template": template_hash(read_template(self.template)),
        }
