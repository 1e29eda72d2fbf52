"""A language model as a judge: the risk is the likelihood of one of two labels.

A guard reads an example and a question about it, and its next token is a label. With u
the unsafe label, v the safe label and x the example as the guard reads it, the risk is

    s = p(u | x) / (p(u | x) + p(v | x))

This is the class probability that Llama Guard (arXiv:2312.06674) takes from its first
token and ShieldGemma (arXiv:2407.21772) from the two labels. Renormalising would hide a
guard that meant to say something else. So if p(u | x) + p(v | x) is small, there is no
rating and the judge raises.

Symbols: N examples, T tokens of an example, B batch, S tokens of a rendering, K labels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.methods.risk import Judge, JudgeError
from sbr_jax.models import Model, answers
from sbr_jax.models.buckets import bucket
from sbr_jax.typing import ApplyFn, PyTree, UserError

Render = Callable[[np.ndarray, np.ndarray], Sequence[int]]
"""``(tokens [T], mask [T]) -> ids``: what the guard reads of one example, up to the
place of its label. Raises :class:`JudgeError` if it cannot render the example."""

LEAST_MASS = 0.5
"""A guard whose two labels have less probability than this would say something else."""


def label_likelihood_judge(
    model: Model,
    adapter: PyTree | None,
    label_tokens: tuple[int, int],
    render: Render,
    *,
    least_mass: float = LEAST_MASS,
    batch_size: int = 32,
) -> Judge:
    """A judge that asks a guard: s = p(u | x) / (p(u | x) + p(v | x)).

    **Guarantee**: every risk comes from a forward pass over its own example. If one
    example cannot be rated, the judge raises and rates nothing.

    Args:
      model: the guard; it need not be the model that is fine-tuned.
      adapter: the guard's adapter, or None.
      label_tokens: ``(u, v)``, the unsafe label first (see :func:`label_ids`).
      render: renders an example for the guard (:func:`then_ask`, :func:`as_text`).
      least_mass: smallest p(u | x) + p(v | x) that counts as a rating, in [0, 1].
      batch_size: most examples in one forward pass.

    Returns:
      ``judge(dataset) -> risk [N]``, float32. It raises :class:`JudgeError`, naming
      the examples, if one cannot be rendered, does not fit the guard, has a likelihood
      that is not finite, or is not answered with a label.

    Raises:
      UserError: unless there are two different labels in the guard's vocabulary, and
        numbers in range.

    References:
      arXiv:2312.06674, arXiv:2407.21772
    """
    labels = tuple(label_tokens)
    if len(labels) != 2 or labels[0] == labels[1]:
        raise UserError(
            f"label_tokens: expected two different ids (unsafe, safe), got {labels}"
        )
    _check(model, labels, batch_size)
    if not 0 <= least_mass <= 1:
        raise UserError(f"least_mass: expected a number in [0, 1], got {least_mass!r}")

    def judge(dataset: TokenDataset) -> np.ndarray:
        rows = [
            _rendered(model, render, i, tokens, mask)
            for i, (tokens, mask) in enumerate(
                zip(dataset.tokens, dataset.mask, strict=True)
            )
        ]
        scores = label_log_probs(model, adapter, labels, rows, batch_size=batch_size)
        _refuse(
            ~np.isfinite(scores).all(axis=1),
            "expected finite likelihoods of the labels, got others",
            "check the guard's weights",
        )
        total = np.logaddexp(scores[:, 0], scores[:, 1])
        _refuse(
            np.exp(total) < least_mass,
            f"expected one of the two labels, with a mass of {least_mass} at least",
            "the guard cannot rate these",
        )
        return np.exp(scores[:, 0] - total)

    return judge


def label_log_probs(
    model: Model,
    adapter: PyTree | None,
    label_tokens: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Log p(label | prompt) over the whole vocabulary, float32 ``[N, K]`` in nats.

    The head runs on the last position only. Shapes are rounded up, so that a few
    programs serve all prompts. Values are not finite if the model's output is not.

    Args:
      model: the guard.
      adapter: the guard's adapter, or None.
      label_tokens: K ids.
      prompts: N lists of ids, each of at least one token.
      batch_size: most rows in one forward pass.

    Raises:
      UserError: for a label outside the vocabulary or a batch size below 1.
    """
    _check(model, label_tokens, batch_size)
    out = np.zeros((len(prompts), len(label_tokens)), np.float32)
    if not len(prompts):
        return out
    rows = min(bucket(len(prompts), 1), batch_size)
    labels = np.asarray(label_tokens, np.int32)
    # Neighbours in length share a batch, so short prompts are not padded to long ones.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens, last = padded([prompts[i] for i in chosen], rows)
        scores = _label_scores(
            model.apply_fn, model.params, adapter, tokens, last, labels
        )
        out[chosen] = np.asarray(scores)[: len(chosen)]
    return out


def padded(
    prompts: Sequence[Sequence[int]], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as ``tokens [B, S]`` and the place where each ends, ``last [B]``, int32.

    B is ``rows``, and S is rounded up to a few sizes; the rest is padding.

    >>> padded([[5, 6], [7]], rows=2)[1].tolist()
    [1, 0]
    """
    tokens = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32)
    last = np.zeros(rows, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], last[row] = ids, len(ids) - 1
    return tokens, last


def label_scores(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree | None,
    tokens: jax.Array,
    last: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Log p(label | prompt) of one batch, float32 ``[B, K]``; pure, to be jitted.

    ``tokens [B, S]`` are right-padded and end at ``last [B]``; ``labels`` are ``[K]``.
    """
    hidden = answers.hidden(apply_fn, base, adapter, {"tokens": tokens})
    at_label = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = answers.head_of(apply_fn)(base, at_label)
    return jnp.take(jax.nn.log_softmax(logits), labels, axis=-1)


_label_scores = jax.jit(label_scores, static_argnums=0)


# --- what the guard reads -----------------------------------------------------------


def then_ask(question: Sequence[int]) -> Render:
    """Render the example's own tokens up to the end of its answer, then a question.

    This is for a guard with the tokenizer and the chat template of the fine-tuned
    model. The label follows ``question``. Raises :class:`JudgeError` for an example
    without an answer.

    >>> then_ask([8, 9])(np.array([5, 6, 7, 0]), np.array([0, 1, 1, 0]))
    [5, 6, 7, 8, 9]
    """
    tail = [int(i) for i in question]

    def render(tokens: np.ndarray, mask: np.ndarray) -> list[int]:
        _, end = _answer(mask)
        return [*(int(i) for i in tokens[:end]), *tail]

    return render


def as_text(tokenizer: Any, encode: Callable[[str, str], Sequence[int]]) -> Render:
    """Render prompt and answer as text, for a guard with its own tokenizer.

    Args:
      tokenizer: the data set's tokenizer, never the guard's.
      encode: ``(prompt, answer) -> ids`` with the guard's own template and tokenizer.
        The texts have no special tokens, but keep a chat template's plain words.
    """

    def render(tokens: np.ndarray, mask: np.ndarray) -> Sequence[int]:
        start, end = _answer(mask)
        prompt, answer = (
            tokenizer.decode(part, skip_special_tokens=True).strip()
            for part in (tokens[:start], tokens[start:end])
        )
        return encode(prompt, answer)

    return render


def label_ids(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    """The ids of labels that are one token each.

    Raises:
      UserError: for a word that is not exactly one known token.
    """
    ids = []
    for word in words:
        found = tokenizer.encode(word, add_special_tokens=False)
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            raise UserError(
                f"label {word!r}: expected one known token, got {found}: take another "
                "word, or the ids of first tokens that differ"
            )
        ids.append(int(found[0]))
    return tuple(ids)


# --- refusing to rate ---------------------------------------------------------------


def _answer(mask: np.ndarray) -> tuple[int, int]:
    """First place of the answer, and the place after its last."""
    places = np.flatnonzero(mask)
    if not len(places):
        raise JudgeError("expected an answer to rate, got an empty mask")
    return int(places[0]), int(places[-1]) + 1


def _rendered(
    model: Model, render: Render, index: int, tokens: np.ndarray, mask: np.ndarray
) -> list[int]:
    """Render one example and check its ids, because JAX would silently clamp them."""
    try:
        ids = [int(i) for i in render(tokens, mask)]
    except JudgeError as error:
        raise JudgeError(f"judge: example {index}: {error}") from error
    config = model.config
    if not 0 < len(ids) <= config.context:
        raise JudgeError(
            f"judge: example {index}: expected 1 to {config.context} tokens for the "
            f"guard, got {len(ids)}"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise JudgeError(
            f"judge: example {index}: expected ids of the guard's {config.vocab_size} "
            f"tokens, got {min(ids)} to {max(ids)}: see as_text for another tokenizer"
        )
    return ids


def _check(model: Model, labels: Sequence[int], batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, got {batch_size!r}")
    size = model.config.vocab_size
    if not len(labels) or not all(0 <= label < size for label in labels):
        raise UserError(
            f"label_tokens: expected ids of the guard's {size} tokens, got "
            f"{tuple(labels)}"
        )


def _refuse(bad: Any, expected: str, hint: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        shown = ", ".join(map(str, rows[:5])) + (", …" if rows.size > 5 else "")
        raise JudgeError(
            f"judge: {expected} for {rows.size} of {len(bad)} examples ({shown}): "
            f"{hint}"
        )
