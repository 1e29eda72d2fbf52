"""Accuracy on a domain: multiple choice, or prediction of answer tokens."""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax

from sbr_jax.data import TokenDataset
from sbr_jax.data.records import ChoiceItem
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.tasks import legalbench
from sbr_jax.models.finite import require_comparable
from sbr_jax.models.likelihood import answer_scores
from sbr_jax.typing import PyTree

T = TypeVar("T")
Runner = Callable[[PyTree, PyTree], ModelRunner]
Accuracy = Callable[[PyTree, PyTree], float]


def choice_accuracy(items: Sequence[ChoiceItem], runner: Runner) -> Accuracy:
    """`(base, adapter) -> accuracy` of the most likely option, averaged over tasks."""

    # Options are scored as in LegalBench; MedQA is like one of its tasks.
    def accuracy(base: PyTree, adapter: PyTree) -> float:
        return legalbench(runner(base, adapter), items).metrics["accuracy"]

    return accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAccuracy:
    """`(base, adapter) -> accuracy` of answer tokens, each predicted after the truth.

    Attributes:
      apply_fn: the model's function.
      data: held-out examples.
      batch_size: examples that run at once.
    """

    apply_fn: Callable[..., jax.Array]
    data: TokenDataset
    batch_size: int = 8

    def __call__(self, base: PyTree, adapter: PyTree) -> float:
        """Accuracy over all answer tokens, 0 to 100."""
        found = answer_scores(
            self.apply_fn,
            base,
            adapter,
            self.data.tokens,
            self.data.mask,
            batch_size=self.batch_size,
        )
        require_comparable("next-token accuracy", found.told)
        return float(100.0 * found.hits.sum() / max(found.counts.sum(), 1.0))


class Remembered(Generic[T]):
    """`(base, adapter) -> scores`, measured once for the weights seen last.

    Weights count as equal if they are the same arrays, none of which is kept alive.

    >>> calls = []
    >>> score = Remembered(lambda base, adapter: calls.append(base) or {"x": 1.0})
    >>> import numpy as np
    >>> one, two = np.ones(1), np.ones(1)
    >>> [score(weights, None)["x"] for weights in (one, one, two)], len(calls)
    ([1.0, 1.0, 1.0], 2)
    """

    def __init__(self, score: Callable[[PyTree, PyTree], T]):
        self._score = score
        self._last: tuple[list[weakref.ref], T] | None = None

    def __call__(self, base: PyTree, adapter: PyTree) -> T:
        """The scores of these weights."""
        arrays = jax.tree.leaves((base, adapter))
        if arrays and self._last:
            seen, scores = self._last
            same = (a is reference() for a, reference in zip(arrays, seen, strict=True))
            if len(arrays) == len(seen) and all(same):
                return scores
        scores = self._score(base, adapter)
        self._last = [weakref.ref(array) for array in arrays], scores
        return scores
