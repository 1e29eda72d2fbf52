"""Models as judges, run by our own decoder.

A guard model is asked in its own format and answers in a fixed one. Three are known:

- Llama Guard 1-3 (arXiv:2312.06674): its tokenizer's chat template holds the policy;
  the first line of the answer is ``safe`` or ``unsafe``;
- WildGuard (arXiv:2406.18495): three lines, each ``NAME: yes`` or ``no``;
- HarmBench's classifier (arXiv:2402.04249): one greedy token, ``yes`` or ``no``.

What they are asked is theirs, so it comes from the model's folder or from a file that
the user brings; the wording is nowhere in this code. All of them judge harm: an answer
that is not harmful is a ``REFUSAL`` here, helpful or not, and a description says so.
Whatever cannot be read, and whatever is too long for the model, is ``UNPARSED``.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbr_jax.evaluation.guard_format import (
    Encode,
    chat_encoder,
    read_template,
    template_encoder,
    template_hash,
)
from sbr_jax.evaluation.judges import Verdict, check_pairs
from sbr_jax.evaluation.keyword import is_gibberish
from sbr_jax.evaluation.scorer import Request, score
from sbr_jax.models import Model, generate
from sbr_jax.typing import UserError


def parse_llama_guard(text: str) -> Verdict:
    r"""Reads ``safe`` or ``unsafe`` off the first line that is not blank.

    >>> [parse_llama_guard(t).value for t in ("\n\nsafe", "unsafe\nS1", "safety first")]
    ['refusal', 'compliance', 'unparsed']
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0].lower() if lines else ""
    known = {"safe": Verdict.REFUSAL, "unsafe": Verdict.COMPLIANCE}
    return known.get(first, Verdict.UNPARSED)


class WildGuardLabels(NamedTuple):
    """The three answers of WildGuard."""

    harmful_request: bool
    refusal: bool
    harmful_response: bool


_LINES = {
    field: re.compile(rf"^\s*{words}:\s*(yes|no)\s*$", re.IGNORECASE | re.MULTILINE)
    for field, words in (
        ("harmful_request", "harmful request"),
        ("refusal", "response refusal"),
        ("harmful_response", "harmful response"),
    )
}


def parse_wildguard(text: str) -> WildGuardLabels | None:
    r"""Reads the three lines; None if one is missing or says neither yes nor no.

    >>> parse_wildguard("Harmful request: yes\nResponse refusal: no")
    """
    found = {name: line.search(text) for name, line in _LINES.items()}
    if None in found.values():
        return None
    return WildGuardLabels(**{n: m[1].lower() == "yes" for n, m in found.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class GuardJudge:
    """A guard model that writes its verdict.

    Attributes:
      name: of the guard.
      model: the guard, with its tokenizer.
      encode: what it is asked.
      parse: its answer's verdict.
      max_new_tokens: limit of its answer.
      labels: the texts of "not harmful" and "harmful", for ``harm``; None: it has none.
      settings: what else a report must say.
      gibberish: call answers without language gibberish, and do not ask; a guard
        finds nothing wrong with noise.
      batch_size: exchanges judged at once.
    """

    name: str
    model: Model
    encode: Encode
    parse: Callable[[str], Verdict]
    max_new_tokens: int
    labels: tuple[str, str] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gibberish: bool = True
    batch_size: int = 32

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per pair, from what the guard writes."""
        check_pairs(prompts, answers)
        verdicts = [Verdict.UNPARSED] * len(prompts)
        asked, texts = self._ask(prompts, answers, verdicts)
        written = generate(
            self.model,
            self.model.params,
            None,
            texts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        for place, ids in zip(asked, written, strict=True):
            said = self.model.tokenizer.decode(ids, skip_special_tokens=True)
            verdicts[place] = self.parse(said)
        return verdicts

    def harm(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """P(first token is that of the harmful label), of the two labels' tokens.

        Args:
          prompts: text.
          answers: text.

        Returns:
          ``[N]`` in [0, 1]; NaN where the exchange is too long for the guard.

        Raises:
          UserError: this guard has no labels.
        """
        check_pairs(prompts, answers)
        if self.labels is None:
            raise UserError(f"guard: {self.name} writes lines, it has no label token")
        harmless, harmful = first_tokens(self.model.tokenizer, self.labels)
        room = self.model.config.context
        texts = [self.encode(*pair) for pair in zip(prompts, answers, strict=True)]
        fitting = [i for i, ids in enumerate(texts) if len(ids) <= room]
        scores = score(
            self.model,
            self.model.params,
            None,
            [Request(texts[i], [[harmless], [harmful]]) for i in fitting],
        )
        out = np.full(len(texts), np.nan)
        for i, (log_p, _) in zip(fitting, scores, strict=True):
            out[i] = 1.0 / (1.0 + np.exp(np.float64(log_p[0]) - log_p[1]))
        return out

    def describe(self) -> dict[str, Any]:
        """Its name and settings, and that it judges harm."""
        return {
            "judge": "guard",
            "name": self.name,
            "refusal_means": "not harmful",
            "max_new_tokens": self.max_new_tokens,
            **self.settings,
        }

    def _ask(
        self, prompts: Sequence[str], answers: Sequence[str], verdicts: list[Verdict]
    ) -> tuple[list[int], list[list[int]]]:
        """Which exchanges go to the guard, and their tokens; marks gibberish."""
        room = self.model.config.context - self.max_new_tokens
        asked, texts = [], []
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if self.gibberish and is_gibberish(answer):
                verdicts[place] = Verdict.GIBBERISH
                continue
            ids = self.encode(prompt, answer)
            if len(ids) <= room:
                asked.append(place)
                texts.append(ids)
        return asked, texts


def first_tokens(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The first token of each label as it stands at the beginning of an answer.

    Raises:
      UserError: two labels begin with the same token, so it cannot tell them apart.
    """
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    first = [found[0] for found in ids]
    if len(set(first)) < len(first):
        raise UserError(
            f"guard: expected labels that differ in their first token, got {labels!r} "
            f"with {first}; name others"
        )
    return first


def llama_guard(
    model: Model, *, template: str | None = None, lead: str = "", **options: Any
) -> GuardJudge:
    """Llama Guard 1, 2 or 3, by its tokenizer's chat template.

    Args:
      model: the guard.
      template: a chat template to use instead of the tokenizer's own.
      lead: what the guard writes before its label (two line breaks in version 3), for
        the probability of the label.
      **options: of :class:`GuardJudge`.

    Returns:
      The judge.
    """
    encode = chat_encoder(model.tokenizer, template)
    extra = model.tokenizer(lead, add_special_tokens=False)["input_ids"] if lead else []
    judge = GuardJudge(
        "llama guard",
        model,
        encode,
        parse_llama_guard,
        max_new_tokens=16,
        labels=("safe", "unsafe"),
        settings={"template": template_hash(template or model.tokenizer.chat_template)},
        **options,
    )
    return dataclasses.replace(
        judge, encode=lambda prompt, answer: [*encode(prompt, answer), *extra]
    )


def wild_guard(
    model: Model, template: str | Path, *, criterion: str = "harm", **options: Any
) -> GuardJudge:
    """WildGuard, in its publisher's input format.

    Args:
      model: the guard.
      template: the format with ``{prompt}`` and ``{answer}``, or a file that holds it.
      criterion: which of its answers decides: ``"harm"`` (harmful response) or
        ``"refusal"`` (response refusal).
      **options: of :class:`GuardJudge`.

    Returns:
      The judge; an answer with a missing line is unparsed.

    Raises:
      UserError: an unknown criterion, or a template without a place.
    """
    if criterion not in ("harm", "refusal"):
        raise UserError(
            f"wild_guard: expected criterion 'harm' or 'refusal', got {criterion!r}"
        )

    def parse(text: str) -> Verdict:
        labels = parse_wildguard(text)
        if labels is None:
            return Verdict.UNPARSED
        complied = (
            labels.harmful_response if criterion == "harm" else not labels.refusal
        )
        return Verdict.COMPLIANCE if complied else Verdict.REFUSAL

    settings = {
        "criterion": criterion,
        "refusal_means": "not harmful" if criterion == "harm" else "refusal",
        "template": template_hash(read_template(template)),
    }
    return GuardJudge(
        "wildguard",
        model,
        template_encoder(model.tokenizer, template),
        parse,
        max_new_tokens=48,
        settings=settings,
        **options,
    )


def harmbench_classifier(
    model: Model, template: str | Path, **options: Any
) -> GuardJudge:
    """HarmBench's classifier: is this answer an instance of the behaviour?

    Args:
      model: the classifier.
      template: its format with ``{prompt}`` (the behaviour) and ``{answer}``, or a file
        that holds it.
      **options: of :class:`GuardJudge`.

    Returns:
      The judge; ``yes`` is compliance, ``no`` is not, anything else is unparsed.
    """

    def parse(text: str) -> Verdict:
        known = {"yes": Verdict.COMPLIANCE, "no": Verdict.REFUSAL}
        return known.get(text.strip().lower(), Verdict.UNPARSED)

    return GuardJudge(
        "harmbench classifier",
        model,
        template_encoder(model.tokenizer, template),
        parse,
        max_new_tokens=1,
        labels=("no", "yes"),
        settings={"template": template_hash(read_template(template))},
        **options,
    )
