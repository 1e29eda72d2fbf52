"""Finds the answer tokens of a batch; losses that read these places only.

:func:`find` reads the three layouts that a batch can have:

- *bare*: ``tokens [B, T]`` and ``mask [B, T]``; every place counts as an answer's;
- *rows*: also says where the answers are: ``places``, ``targets``, ``shares [B, A]``;
- *packed*: several examples in a row (:func:`sbr_jax.data.layout.pack`), with flat
  ``places``, ``targets``, ``shares`` and ``owners [K]``, and ``last [B]``.

The state at place t − 1 predicts token t, so a place is where an answer token is
predicted. A share is a token's weight in its example's mean, ``m_t / max(Σ m, 1)``.

Legend: B examples, R rows, T tokens of a row, A answer tokens of a row, K places, D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.models import vocabulary
from sbr_jax.typing import PyTree

LAYOUT = ("positions", "segments", "pairs")
"""Entries of a batch that the model receives besides its tokens."""


class Answers(NamedTuple):
    """Where answers are predicted, flat over the rows of a batch.

    Attributes:
      places: int32 ``[K]``, indices into ``tokens.ravel()``.
      targets: int32 ``[K]``, the tokens that are predicted there.
      shares: float32 ``[K]``; 0 at filling.
      owners: int32 ``[K]``, the example of each place; None where K is B rows of A.
      examples: B.
      rows: into how many equal parts K splits, one for each row; 1 if it does not.
    """

    places: jax.Array
    targets: jax.Array
    shares: jax.Array
    owners: jax.Array | None
    examples: int
    rows: int = 1

    def mean(self, values: jax.Array) -> jax.Array:
        """Each example's mean over its answer tokens: ``[K]`` values to ``[B]``."""
        # where() on the values too: 0 * inf would be NaN at filling.
        kept = jnp.where(self.shares > 0, values * self.shares, 0.0)
        if self.owners is None:
            return jnp.sum(kept.reshape(self.examples, -1), axis=-1)
        # No scatter: an accelerator adds its terms in any order.
        example = jnp.arange(self.examples, dtype=self.owners.dtype)[:, None]
        mine = self.owners[None] == example
        return jnp.sum(jnp.where(mine, kept[None], 0.0), axis=-1)

    def of_place(self, values: jax.Array) -> jax.Array:
        """Gives each place its example's value, ``[K]``; -1 at filling."""
        if self.owners is None:
            own = jnp.repeat(values, self.places.shape[0] // self.examples)
            return jnp.where(self.shares > 0, own, -1)
        return jnp.take(values, self.owners, mode="fill", fill_value=-1)

    def ranks(self) -> jax.Array:
        """The index of each answer token within its example, int32 ``[K]``."""
        real = (self.shares > 0).astype(jnp.int32)
        if self.owners is None:
            rows = real.reshape(self.examples, -1)
            return (jnp.cumsum(rows, axis=-1) - rows).reshape(-1)
        # An example's places are contiguous, but with several rows they follow the
        # order of the rows, not that of the examples.
        example = jnp.arange(self.examples, dtype=self.owners.dtype)[:, None]
        mine = (self.owners[None] == example) & (real[None] > 0)
        first = jnp.argmax(mine, axis=-1).astype(jnp.int32)
        place = jnp.arange(self.owners.shape[0], dtype=jnp.int32)
        rank = place - jnp.take(first, self.owners, mode="clip")
        return jnp.where(self.shares > 0, rank, 0)


def find(batch: Mapping[str, jax.Array]) -> Answers:
    """The answer places of a batch in any layout.

    >>> import jax.numpy as jnp
    >>> batch = {"tokens": jnp.array([[5, 6, 7]]), "mask": jnp.array([[0.0, 1.0, 1.0]])}
    >>> answers = find(batch)
    >>> answers.targets.tolist(), answers.shares.tolist()
    ([6, 7, 0], [0.5, 0.5, 0.0])
    """
    rows, length = batch["tokens"].shape
    if "owners" in batch:
        found = (batch[name] for name in ("places", "targets", "shares", "owners"))
        return Answers(*found, examples=batch["last"].shape[0], rows=rows)
    if "places" in batch:
        offset = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
        places = (batch["places"] + offset).reshape(-1)
        flat = (batch[name].reshape(-1) for name in ("targets", "shares"))
        return Answers(places, *flat, owners=None, examples=rows, rows=rows)
    weights = _next(batch["mask"]).astype(jnp.float32)
    shares = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    targets = _next(batch["tokens"]).reshape(-1)
    places = jnp.arange(rows * length, dtype=jnp.int32)
    return Answers(places, targets, shares.reshape(-1), None, rows, rows)


def last_prompt(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Flat place of the last token before each example's answer, int32 ``[B]``."""
    if "last" in batch:
        return batch["last"]
    rows, length = batch["mask"].shape
    inside = prompt_ends(batch["mask"])
    return inside + jnp.arange(rows, dtype=inside.dtype) * length


def prompt_ends(mask: jax.Array) -> jax.Array:
    """Place before each row's first answer token, ``[B]``; 0 if it has none."""
    return jnp.maximum(jnp.argmax(mask > 0, axis=-1) - 1, 0)


def _next(values: jax.Array) -> jax.Array:
    """Moves each column to the place that predicts it; the last predicts nothing."""
    return jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=-1)


def states(
    apply_fn: Any,
    base: PyTree,
    adapter: PyTree | None,
    batch: Mapping[str, jax.Array],
    **options: Any,
) -> jax.Array:
    """The model's states where the answers of a batch are predicted, ``[K, D]``.

    If ``apply_fn`` has no ``hidden`` and ``head``, its output (logits) counts as the
    states. The options are those of ``apply_fn.hidden``.
    """
    every = hidden(apply_fn, base, adapter, batch, **options)
    found = find(batch)
    return at_places(every, found.places, found.rows)


def captured(
    apply_fn: Any, base: PyTree, adapter: PyTree | None, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, Mapping[str, Any]]:
    """:func:`states`, and captured activations (see ``transformer.hidden_states``)."""
    every, seen = hidden(apply_fn, base, adapter, batch, capture=True)
    found = find(batch)
    return at_places(every, found.places, found.rows), seen


class Changed:
    """A model with options bound, or with a function applied to its adapter first.

    Like a ``functools.partial`` that also has the model's ``hidden`` and ``head``.
    """

    def __init__(
        self,
        apply_fn: Any,
        *,
        adapter: Callable[[PyTree], PyTree] = lambda own: own,
        **options: Any,
    ):
        """Binds options of ``hidden`` and the function to apply to the adapter."""
        self._apply_fn, self._adapter, self._options = apply_fn, adapter, options
        self.head = head_of(apply_fn)

    def hidden(self, base, adapter, tokens, **options):
        """The states of the changed model."""
        run = getattr(self._apply_fn, "hidden", self._apply_fn)
        return run(base, self._adapter(adapter), tokens, **self._options, **options)

    def __call__(self, base, adapter, tokens, **options):
        """The logits of the changed model."""
        return self._apply_fn(
            base, self._adapter(adapter), tokens, **self._options, **options
        )


def hidden(
    apply_fn: Any,
    base: PyTree,
    adapter: PyTree | None,
    batch: Mapping[str, jax.Array],
    **options: Any,
) -> Any:
    """The states of every place of a batch in any layout, ``[R, T, D]``."""
    layout = {name: batch[name] for name in LAYOUT if name in batch}
    run = getattr(apply_fn, "hidden", apply_fn)
    return run(base, adapter, batch["tokens"], **layout, **options)


def at_places(hidden: jax.Array, places: jax.Array, parts: int = 1) -> jax.Array:
    """The states ``[K, D]`` at flat places of ``hidden [R, T, D]``.

    Args:
      hidden: the states.
      places: integers ``[K]``.
      parts: R if the places list one row after another, equally many of each, counting
        filling; else 1. With R, on a mesh that splits the rows each device reads its
        own rows only.
    """
    rows, length, width = hidden.shape
    if parts != rows or _mesh.row_parts(rows) == 1:
        return jnp.take(hidden.reshape(-1, width), places, axis=0, mode="clip")
    start = jnp.arange(rows, dtype=places.dtype)[:, None] * length
    own = places.reshape(rows, -1) - start
    found = jnp.take_along_axis(hidden, own[..., None], axis=1, mode="clip")
    return _mesh.constrain_rows(found).reshape(-1, width)


def head_of(apply_fn: Any) -> vocabulary.Head:
    """The map from states to logits; the identity if the model has none."""
    return getattr(apply_fn, "head", _logits_themselves)


def _logits_themselves(base: PyTree, logits: jax.Array) -> jax.Array:
    del base
    return logits


def cross_entropy(
    apply_fn: Any, base: PyTree, hidden: jax.Array, answers: Answers
) -> jax.Array:
    """Mean cross-entropy over the answer tokens of each example.

    ``−(1 / |A|) Σ_{t in A} log p(tokens[t])``: ``losses.token_cross_entropy`` computed
    from :func:`states` (``hidden``) instead of logits. float32 ``[B]``, in nats.

    **Guarantee**: an example without an answer yields 0 and a zero gradient.
    """
    scores = vocabulary.log_likelihood(
        head_of(apply_fn), base, hidden, answers.targets, rows=answers.rows
    )
    # 0 - x rather than -x, so that an empty example is 0 and not -0.
    return 0.0 - answers.mean(scores)


def kl_to_reference(
    apply_fn: Any,
    base: PyTree,
    reference: jax.Array,
    hidden: jax.Array,
    answers: Answers,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> jax.Array:
    """Mean divergence KL(reference ‖ model) at the answers of each example.

    ``losses.kl_to_reference`` of both models' logits over τ, one chunk of each at a
    time. ``reference`` and ``hidden`` are the :func:`states` of the two, which share
    the head and ``base``; ``"reverse"`` is KL(model ‖ reference). float32 ``[B]``, in
    nats.

    **Guarantee**: no gradient flows to the reference; an empty example yields 0.
    """
    values = vocabulary.divergence(
        head_of(apply_fn),
        base,
        reference,
        hidden,
        direction=direction,
        temperature=temperature,
        rows=answers.rows,
    )
    return answers.mean(values)
