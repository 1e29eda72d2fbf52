"""Layout of prompts with an adversarial suffix, and checks of suffix tokens.

A sequence is ``[before][suffix][after][target]``:

- before: the template and the question up to the suffix,
- suffix: the S tokens that an attack may choose,
- after: the rest of the template, up to the model's answer,
- target: the answer that the attack wants.

Everything here runs on the host. Legend: N prompts, S suffix, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sbr_jax import checks
from sbr_jax.data import encode_prompts
from sbr_jax.typing import UserError

RoundTrip = Callable[[list[list[int]]], Any]
"""``round_trip(prompts) -> bool [len(prompts)]``: whether the text of each whole prompt
is encoded to the same tokens."""


class SplitPrompt(NamedTuple):
    """One prompt's tokens around the place of its suffix."""

    before: Sequence[int]
    after: Sequence[int] = ()

    def asked(self, suffix: Sequence[int]) -> list[int]:
        """The whole prompt with a suffix."""
        return [*self.before, *suffix, *self.after]


class Layout(NamedTuple):
    """Prompts of different lengths in arrays of one shape, right-padded."""

    tokens: np.ndarray
    """int32 ``[N, T]``; zeros where the suffix and the padding are."""
    start: np.ndarray
    """int32 ``[N]``, where the suffix starts."""
    mask: np.ndarray
    """float32 ``[N, T]``, 1 at the target's tokens."""

    def endings(self) -> "Layout":
        """The same sequences without the tokens before the suffix.

        The suffix now comes first; ``start`` still counts the tokens left out.
        """
        length = int(np.max(self._lengths() - self.start))
        places = self.start[:, None] + np.arange(length)
        inside = places < self.tokens.shape[1]
        places = np.minimum(places, self.tokens.shape[1] - 1)
        tokens = np.take_along_axis(self.tokens, places, 1) * inside
        mask = np.take_along_axis(self.mask, places, 1) * inside
        return Layout(tokens.astype(np.int32), self.start, mask.astype(np.float32))

    def asked(self, suffixes: np.ndarray) -> list[list[int]]:
        """Prompts without targets, with each of their suffixes ``[N, C, S]``.

        ``N · C`` unpadded lists of tokens, grouped by prompt.
        """
        rows = []
        ends = np.argmax(self.mask > 0, axis=1)
        for tokens, start, end, own in zip(
            self.tokens, self.start, ends, suffixes, strict=True
        ):
            before = tokens[:start].tolist()
            after = tokens[start + suffixes.shape[-1] : end].tolist()
            rows += [[*before, *suffix, *after] for suffix in own.tolist()]
        return rows

    def _lengths(self) -> np.ndarray:
        return self.mask.shape[1] - np.argmax(self.mask[:, ::-1] > 0, axis=1)


def lay_out(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    targets: Sequence[Sequence[int]],
    suffix_length: int,
) -> Layout:
    """Put prompts, room for their suffixes, and targets into one array.

    Args:
      prompts: N pairs ``(before, after)``, see :class:`SplitPrompt`.
      targets: the N wanted answers.
      suffix_length: S.

    Returns:
      The layout, padded to its longest sequence.

    Raises:
      UserError: if the numbers differ, or a beginning or a target is empty.

    >>> lay_out([([1, 5], [7])], [[8, 9]], 3).tokens.tolist()
    [[1, 5, 0, 0, 0, 7, 8, 9]]
    """
    if not len(prompts) or len(prompts) != len(targets):
        raise UserError(
            f"expected as many targets as prompts, at least one; got {len(prompts)} "
            f"prompts and {len(targets)} targets"
        )
    for i, ((before, _), target) in enumerate(zip(prompts, targets, strict=True)):
        if not len(before) or not len(target):
            empty = "targets" if len(before) else "prompts"
            raise UserError(
                f"{empty}[{i}]: expected at least one token, got none; a prompt begins "
                "with the BOS token, and a target is the answer to elicit"
            )
    rows = [
        [*before, *[0] * suffix_length, *after, *target]
        for (before, after), target in zip(prompts, targets, strict=True)
    ]
    shape = len(rows), max(map(len, rows))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        tokens[i, : len(row)] = row
        mask[i, len(row) - len(target) : len(row)] = 1
    start = np.array([len(before) for before, _ in prompts], np.int32)
    return Layout(tokens, start, mask)


def gcg_prompts(
    tokenizer: Any,
    questions: Sequence[str],
    suffix_length: int,
    placeholder_token: str,
    *,
    system: str | None = None,
) -> list[SplitPrompt]:
    """Questions in the chat template, split at the place of the suffix.

    Each question is followed by S placeholders, each after a space, and rendered with
    the template. So the tokens around the suffix are those of a real prompt.

    Args:
      tokenizer: a tokenizer of ``transformers`` with a chat template.
      questions: the user's questions, as text.
      suffix_length: S.
      placeholder_token: text that is one token after a space, such as ``"!"``; also
        the natural ``initial_token`` of :func:`sbr_jax.attacks.gcg.gcg`.
      system: a system message before every question.

    Returns:
      One split prompt for each question.

    Raises:
      UserError: if a prompt does not hold the placeholder as one run of S tokens.
    """
    wanted = placeholder_token.strip()
    room = f" {wanted}" * suffix_length
    texts = [question + room for question in questions]
    found = []
    for i, tokens in enumerate(encode_prompts(tokenizer, texts, system=system)):
        runs = [
            (start, end)
            for start, end in _runs(tokens)
            if end - start == suffix_length
            and tokenizer.decode(tokens[start : start + 1]).strip() == wanted
        ]
        if len(runs) != 1:
            raise UserError(
                f"questions[{i}]: expected {suffix_length} placeholders "
                f"{placeholder_token!r} to be one run of as many tokens, got "
                f"{len(runs)} such runs; choose a placeholder_token that is one token "
                "of the vocabulary and that the question does not end with"
            )
        ((start, end),) = runs
        found.append(SplitPrompt(tokens[:start], tokens[end:]))
    return found


def _runs(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every run of equal tokens."""
    borders = [i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1]]
    return list(zip([0, *borders], [*borders, len(tokens)], strict=True))


def ascii_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Mark the tokens that a suffix may hold, bool ``[V]``.

    These are printable ASCII and not special. V counts the rows of the embedding; rows
    beyond the tokenizer are not allowed.
    """
    allowed = np.zeros(vocab_size, bool)
    special = set(tokenizer.all_special_ids)
    # An added token (a role's mark, say) can be special without being listed.
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token in range(min(vocab_size, len(tokenizer))):
        text = tokenizer.decode([token])
        fine = bool(text) and text.isascii() and text.isprintable()
        allowed[token] = fine and token not in special
    return allowed


def round_trips(tokenizer: Any) -> RoundTrip:
    """A check whether whole prompts decode to text that encodes to the same tokens.

    A suffix is sent as text, so tokens that do not survive this cannot be sent. It
    depends on their neighbours, so the whole prompt is checked. The tokenizer must
    decode special tokens to text that it encodes to the same special tokens.
    """

    def check(prompts: list[list[int]]) -> np.ndarray:
        texts = tokenizer.batch_decode(
            prompts, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        again = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return np.array([list(a) == p for a, p in zip(again, prompts, strict=True)])

    return check


def text_round_trips(
    tokenizer: Any,
    questions: Sequence[str],
    prompts: Sequence[SplitPrompt],
    *,
    system: str | None = None,
) -> RoundTrip:
    """A check whether the template makes the same tokens of a question and a suffix.

    Only the suffix is decoded, as text that follows its question. So the tokenizer need
    not decode its special tokens faithfully: Llama 2's writes a space after ``<s>``.

    Args:
      tokenizer: a tokenizer of ``transformers`` with a chat template.
      questions: the N questions of `gcg_prompts`.
      prompts: what it returned.
      system: its system message.

    Returns:
      A check of whole prompts, grouped by question, as many for each.
    """

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    heads = [decode(list(prompt.before)) for prompt in prompts]

    def check(whole: list[list[int]]) -> np.ndarray:
        texts = []
        for i, tokens in enumerate(whole):
            own = i * len(prompts) // len(whole)
            end = len(tokens) - len(prompts[own].after)
            texts.append(questions[own] + decode(tokens[:end])[len(heads[own]) :])
        again = encode_prompts(tokenizer, texts, system=system)
        return np.array([a == b for a, b in zip(again, whole, strict=True)])

    return check


def survivors(
    layout: Layout, round_trip: RoundTrip, suffixes: np.ndarray
) -> np.ndarray:
    """Mark the suffixes ``[N, C, S]`` whose whole prompts pass ``round_trip``.

    Raises:
      UserError: if the check returns anything but bool.
    """
    kept = np.asarray(round_trip(layout.asked(suffixes)))
    wanted = suffixes.shape[0] * suffixes.shape[1]
    if kept.shape != (wanted,) or kept.dtype != bool:
        raise UserError(
            f"round_trip: expected it to return bool [{wanted}], one for each prompt, "
            f"got {kept.dtype} {list(kept.shape)}"
        )
    return kept.reshape(suffixes.shape[:2])


def check_tokens(allowed: Any, initial_token: int, vocab_size: int) -> np.ndarray:
    """The allowed tokens as bool ``[V]``.

    Raises:
      UserError: if fewer than two tokens are allowed, or ``initial_token`` is not.
    """
    allowed = np.asarray(allowed, bool)
    if allowed.shape != (vocab_size,) or allowed.sum() < 2:
        raise UserError(
            f"allowed: expected bool [{vocab_size}] with two tokens or more, got "
            f"{list(allowed.shape)} with {int(allowed.sum())}"
        )
    checks.whole("initial_token", initial_token, least=0)
    if initial_token >= vocab_size or not allowed[initial_token]:
        raise UserError(
            f"initial_token: expected an allowed token, got {initial_token}; choose "
            "another one or allow it"
        )
    return allowed


def check_start(layout: Layout, round_trip: RoundTrip, initial: np.ndarray) -> None:
    """Refuse initial suffixes ``[N, S]`` that fail ``round_trip``.

    Raises:
      UserError: naming the first prompt whose suffix fails.
    """
    kept = survivors(layout, round_trip, initial[:, None])[:, 0]
    if not kept.all():
        raise UserError(
            f"prompts[{int(np.argmin(kept))}]: expected an initial suffix that "
            f"round_trip accepts, got {initial.shape[1]} times the token "
            f"{int(initial[0, 0])}; choose another initial_token"
        )
