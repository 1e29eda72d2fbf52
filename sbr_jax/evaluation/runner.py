"""A model with given weights, as tasks ask it.

A task formats questions and reads answers; it never sees a tokenizer. Plain models get
``BOS prompt option``, encoded in one piece. Chat models get the prompt as a user's turn
in their own template, and the option as the beginning of the answer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sbr_jax import models
from sbr_jax.data import control, exchange, template, text
from sbr_jax.evaluation.scorer import Budget, Request, score
from sbr_jax.evaluation.thoughts import tokens_without_thoughts, without_thoughts
from sbr_jax.models import Model
from sbr_jax.typing import PyTree, UserError

Prompt = str | Sequence[Mapping[str, str]]
"""A user's words, or all messages so far (chat models only)."""


class Runner(Protocol):
    """Interface of a model under evaluation."""

    def log_likelihoods(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """The summed log-likelihood of each option, for each prompt."""
        ...

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """A greedy answer to each prompt, cut before the first ``stop`` text."""
        ...

    def describe(self) -> dict[str, Any]:
        """The settings that change the model's input."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRunner:
    """A model record with given weights.

    Attributes:
      model: the record, with its tokenizer.
      base: weights to use.
      adapter: ``{name: LoraPair}`` or None.
      chat: whether to use the tokenizer's chat template (None: if it has one). Scores
        with and without differ: compare like with like.
      system: a system message, for chat models.
      too_long: what to do with a prompt that exceeds the model's context: ``"error"``,
        or ``"left"``: drop its beginning, but not BOS.
      budget: limits of scoring; its tokens also limit the batches of answers.
      batch_size: answers written at once.
    """

    model: Model
    base: PyTree
    adapter: PyTree | None = None
    chat: bool | None = None
    system: str | None = None
    too_long: str = "error"
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    batch_size: int = 64

    def __post_init__(self):
        if self.model.tokenizer is None:
            raise UserError("runner: expected a model with a tokenizer, got none")
        if self.too_long not in ("error", "left"):
            raise UserError(
                f"runner: expected too_long 'error' or 'left', got {self.too_long!r}"
            )
        if self.system is not None and not self._chat:
            raise UserError(
                "runner: a system message needs a chat template; pass chat=True with a "
                "tokenizer that has one, or no system message"
            )

    @property
    def _chat(self) -> bool:
        if self.chat is None:
            return bool(self.model.tokenizer.chat_template)
        return self.chat

    def describe(self) -> dict[str, Any]:
        """Whether prompts use the chat template, and how."""
        settings = {
            "chat": self._chat,
            "system": self.system,
            "too_long": self.too_long,
        }
        thinking = template.rendering_of(self.model.tokenizer).thinking
        return settings if thinking is None else {**settings, "thinking": thinking}

    def log_likelihoods(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """The summed log-likelihood of each option, for each prompt, in nats.

        Args:
          prompts: text.
          options: the continuations of each prompt. For a plain model an option follows
            directly, so it includes its leading space; a chat answer has none.

        Returns:
          One array for each prompt.

        Raises:
          UserError: if the lengths of both differ, or a prompt is too long.
        """
        if len(prompts) != len(options):
            raise UserError(
                f"runner: expected options for {len(prompts)} prompts, got "
                f"{len(options)}"
            )
        # Whether a request fits may depend on the option, so make one for each option;
        # the scorer merges equal contexts again.
        requests = []
        for prompt, choices in zip(prompts, options, strict=True):
            requests += [self.fit(*pair) for pair in self.pairs(prompt, choices)]
        scores = score(
            self.model, self.base, self.adapter, requests, budget=self.budget
        )
        flat = iter(float(s.log_likelihoods[0]) for s in scores)
        return [np.array([next(flat) for _ in choices]) for choices in options]

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The model's greedy answer to each prompt, as text.

        Args:
          prompts: text, or messages for a chat model.
          max_new_tokens: limit of an answer.
          stop: texts before which an answer is cut.

        Returns:
          Answers without special tokens; a chat model's also without its thoughts and
          surrounding space (in a completion indentation counts).

        Raises:
          UserError: for a prompt that is too long, or messages to a plain model.
        """
        tokenizer, stops = self.model.tokenizer, ()
        if self._chat:
            ids = text.encode_prompts(tokenizer, prompts, system=self.system)
            stops = exchange.stop_tokens(tokenizer, system=self.system)
        else:
            for prompt in prompts:
                if not isinstance(prompt, str):
                    raise UserError(
                        "runner: messages need a chat template; pass text, or chat="
                        "True with a tokenizer that has one"
                    )
            ids = text.encode_text_prompts(tokenizer, [str(p) for p in prompts])
        room = self.model.config.context - max_new_tokens
        new = models.generate(
            self.model,
            self.base,
            self.adapter,
            [self.shorten(tokens, room) for tokens in ids],
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            batch_tokens=self.budget.tokens,
            stops=stops,
        )
        read = decode_answer if self._chat else decode_after
        answers = [
            cut(read(tokenizer, before, row), stop)
            for before, row in zip(ids, new, strict=True)
        ]
        return [a.strip() for a in answers] if self._chat else answers

    def pairs(
        self, prompt: str, choices: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of a prompt, as this model sees it, and of each answer to it.

        Returns:
          Both parts for each choice, at least one token each.
        """
        pairs = self._chat_pairs if self._chat else self._plain_pairs
        return pairs(prompt, choices)

    def _plain_pairs(
        self, prompt: str, choices: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        tokenizer = self.model.tokenizer
        prompt, *choices = (control.mark(tokenizer, t) for t in (prompt, *choices))
        return encode_options(tokenizer, prompt, choices)

    def _chat_pairs(
        self, prompt: str, choices: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Puts options where the template writes answers, spaces included."""
        tokenizer = self.model.tokenizer
        where = template.place(tokenizer, text.Record(prompt, system=self.system))
        options = [where.space + control.mark(tokenizer, c.strip()) for c in choices]
        return encode_options(tokenizer, where.before, options, plain=False)

    def fit(self, context: list[int], continuation: list[int]) -> Request:
        """A request that fits the model, shortened if ``too_long`` allows it."""
        room = self.model.config.context - len(continuation) + 1
        return Request(self.shorten(context, room), [continuation])

    def shorten(self, tokens: list[int], room: int) -> list[int]:
        """Cuts tokens to fit into ``room``.

        Raises:
          UserError: if they do not fit and may not be cut.
        """
        if len(tokens) <= room:
            return tokens
        if self.too_long == "error" or room < 2:
            raise UserError(
                f"runner: a prompt has {len(tokens)} tokens and there is room for "
                f"{room}; use fewer examples, or too_long='left'"
            )
        first = tokens[:1] if tokens[0] == self.model.tokenizer.bos_token_id else []
        return [*first, *tokens[len(tokens) - room + len(first) :]]


def encode_options(
    tokenizer: Any, context: str, options: Sequence[str], *, plain: bool = True
) -> list[tuple[list[int], list[int]]]:
    """Token ids of a context and its continuations, encoded in one piece.

    In plain text, spaces at the end of the context belong to the continuation: a
    tokenizer that marks word beginnings cannot write them otherwise.

    **Guarantee**: both parts together are the tokens of the whole text, and the first
    part is the same for all options. If a token of some option's text spans the border,
    every option is scored from the last token that all texts and the context share. So
    no option is scored in part, and none for more than the others.

    Args:
      tokenizer: a transformers tokenizer.
      context: may be empty if the text is plain and the tokenizer has a BOS token.
      options: the continuations, none empty.
      plain: whether this is plain text, which begins with BOS. Text from a chat
        template is used as it is.

    Returns:
      Both parts for each option, at least one token each.

    Raises:
      UserError: if an option is empty, or no token comes before the scored ones.
    """
    spaces = ""
    if plain:
        stripped = context.rstrip()
        context, spaces = stripped, context[len(stripped) :]
    bos = tokenizer.bos_token_id

    def encode(string: str) -> list[int]:
        ids = control.encode(tokenizer, string)
        if not plain or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    before = encode(context)
    wholes = [encode(context + spaces + option) for option in options]
    start = min([len(before), *(_shared(before, whole) for whole in wholes)])
    if not start or any(whole == before[: len(whole)] for whole in wholes):
        raise UserError(
            "runner: expected a context and an option of at least one token each, got "
            f"{start} that all texts begin with, and options that add "
            f"{[len(whole) - len(before) for whole in wholes]}"
        )
    return [(whole[:start], whole[start:]) for whole in wholes]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def decode_after(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """Decodes new tokens as the continuation of ``before``, with any first space.

    Decoded alone, tokens that mark word beginnings lose the first space, and code its
    indentation.
    """
    tail = list(before[-8:])
    head = tokenizer.decode(tail, skip_special_tokens=True)
    whole = tokenizer.decode([*tail, *new], skip_special_tokens=True)
    if whole.startswith(head):
        return whole[len(head) :]
    # The border is inside a multi-byte character.
    return tokenizer.decode(list(new), skip_special_tokens=True)


def decode_answer(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """Like :func:`decode_after`, without the answer's leading thoughts."""
    said = tokens_without_thoughts(tokenizer, before, new)
    if len(said) < len(new):
        return tokenizer.decode(said, skip_special_tokens=True)
    asked = tokenizer.decode(list(before[-8:]))  # With the header of the answer.
    return without_thoughts(decode_after(tokenizer, before, new), asked)


def cut(answer: str, stop: Sequence[str]) -> str:
    r"""The answer up to the first of the stop texts.

    >>> cut("one\n\ntwo Q: three", ["Q:", "\n\n"])
    'one'
    """
    ends = [place for s in stop if (place := answer.find(s)) >= 0]
    return answer[: min(ends)] if ends else answer
