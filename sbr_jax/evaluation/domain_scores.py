"""Accuracy on a domain: questions answered by choice, or next tokens guessed."""

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.data.records import ChoiceItem
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.tasks import legalbench
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.typing import PyTree

Runner = Callable[[PyTree, PyTree], ModelRunner]
Accuracy = Callable[[PyTree, PyTree], float]


def choice_accuracy(items: Sequence[ChoiceItem], runner: Runner) -> Accuracy:
    """`(base, adapter) -> accuracy`: the likeliest option, averaged over tasks.

    Args:
      items: questions as the domain asks them.
      runner: of weights.
    """

    # One answer is told from another as in LegalBench, of which MedQA is one task.
    def accuracy(base: PyTree, adapter: PyTree) -> float:
        return legalbench(runner(base, adapter), items).metrics["accuracy"]

    return accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAccuracy:
    """`(base, adapter) -> accuracy`: answer tokens guessed right, each after the truth.

    Attributes:
      apply_fn: of the model.
      data: held-out examples.
      batch_size: examples whose logits are held at once.
    """

    apply_fn: Callable[..., jax.Array]
    data: TokenDataset
    batch_size: int = 8

    def __call__(self, base: PyTree, adapter: PyTree) -> float:
        """Accuracy over all answer tokens, 0 to 100.

        Raises:
          UserError: the logits are no numbers.
        """
        count, size = _hits(self.apply_fn), min(self.batch_size, len(self.data))
        total, sure = np.zeros(2), []
        for start in range(0, len(self.data), size):
            lack = size - len(self.data.tokens[start : start + size])
            # A short batch is filled with rows without an answer.
            parts = (
                np.pad(x[start : start + size], ((0, lack), (0, 0)))
                for x in (self.data.tokens, self.data.mask)
            )
            *found, told = count(base, adapter, *parts)
            total += [float(x) for x in found]
            sure += np.asarray(told)[: size - lack].tolist()
        require_comparable("next-token accuracy", sure)
        hits, tokens = total
        return float(100.0 * hits / max(tokens, 1.0))


class Remembered:
    """`(base, adapter) -> metrics` that is measured once for the weights seen last.

    They are told by being the same arrays, none of which is kept alive.

    >>> calls = []
    >>> score = Remembered(lambda base, adapter: calls.append(base) or {"x": 1.0})
    >>> one, two = np.ones(1), np.ones(1)
    >>> [score(weights, None)["x"] for weights in (one, one, two)], len(calls)
    ([1.0, 1.0, 1.0], 2)
    """

    def __init__(self, score: Callable[[PyTree, PyTree], dict[str, float]]):
        self._score = score
        self._seen: list[weakref.ref] = []
        self._metrics: dict[str, float] = {}

    def __call__(self, base: PyTree, adapter: PyTree) -> dict[str, float]:
        """The metrics of these weights."""
        arrays = jax.tree.leaves((base, adapter))
        seen = [reference() for reference in self._seen]
        same = len(arrays) == len(seen) and all(map(operator.is_, arrays, seen))
        if not (arrays and same):
            self._metrics = self._score(base, adapter)
            self._seen = [weakref.ref(array) for array in arrays]
        return dict(self._metrics)


@functools.lru_cache(maxsize=8)
def _hits(apply_fn: Callable[..., jax.Array]) -> Callable[..., tuple]:
    @jax.jit
    def hits(base, adapter, tokens, mask):
        logits = apply_fn(base, adapter, tokens)[:, :-1]
        right = jnp.argmax(logits, axis=-1).astype(tokens.dtype) == tokens[:, 1:]
        told = jnp.all(comparable(logits) | (mask[:, 1:] == 0), axis=-1)
        return jnp.sum(jnp.where(right, mask[:, 1:], 0.0)), jnp.sum(mask[:, 1:]), told

    return hits
