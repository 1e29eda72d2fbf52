"""Type aliases and the one exception shared by all layers."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

PyTree = Any
"""Any nest of containers with arrays at the leaves."""

Batch = Mapping[str, "jax.Array"]
"""``{"tokens": int32 [B, T], "mask": float32 [B, T]}``, right-padded."""

Batches = Iterable[PyTree]
"""Pytrees of arrays with one leading example axis each."""

LossFn = Callable[..., "jax.Array"]
"""``loss_fn(params, example, *args) -> scalar`` for one example."""

ApplyFn = Callable[..., "jax.Array"]
"""``apply_fn(base, adapter, tokens) -> logits [B, T, V]``."""


class UserError(ValueError):
    """A mistake of the user, described in one line.

    Command-line programs print the message and exit with code 2. Any other exception is
    a bug in this package and keeps its traceback.
    """
