"""Checks of a user's batches, and a look at the first of them.

Symbols: B batch.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import checks
from sbr_jax.subspace import units
from sbr_jax.typing import Batches, PyTree, UserError


def look_ahead(batches: Batches, most: int) -> tuple[list[PyTree], Iterator[PyTree]]:
    """The first batches (until over ``most`` examples) and an iterator of the rest."""
    stream, ahead, total = iter(batches), [], 0
    while total <= most:
        batch = next(stream, None)
        if batch is None:
            break
        ahead.append(batch)
        total += units.examples(batch, what="batch")
    return ahead, stream


def check(batches: Any, args: Any) -> None:
    """Refuse a bare batch in place of a list of batches, as far as it can be detected.

    Also refuse ``args`` that are not a tuple.
    """
    if not isinstance(args, tuple | list):
        raise UserError(
            f"expected args to be a tuple, got {checks.shown(args)}; pass (weights,)"
        )
    one = isinstance(batches, Mapping | str | bytes | jax.Array | np.ndarray)
    one = one or not isinstance(batches, Iterable) or hasattr(batches, "_fields")
    # All batches of a loss have one kind. x [B, P] and y [B] are parts of one batch.
    kinds = {(x.ndim, jnp.issubdtype(x.dtype, jnp.floating)) for x in _arrays(batches)}
    if one or len(kinds) > 1:
        raise _unlisted(batches)


def no_examples() -> UserError:
    """The error for batches without an example."""
    return UserError(
        "expected at least one batch with an example, got none; "
        "an iterator that was used before is empty: pass a list"
    )


@contextlib.contextmanager
def parts_explained(batches: Any) -> Iterator[None]:
    """Explain a loss that fails because a batch ``(x, y)`` was given without a list."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if not isinstance(batches, tuple) or len(_arrays(batches)) < 2:
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise _unlisted(
            batches, f", whose first loss_fn does not take ({why:.80})"
        ) from error


def _arrays(batches: Any) -> Sequence[Any]:
    """The items of a tuple or list of arrays, and none of anything else."""
    if not isinstance(batches, tuple | list):
        return ()
    bare = all(isinstance(x, jax.Array | np.ndarray) for x in batches)
    return batches if bare else ()


def _unlisted(batches: Any, why: str = "") -> UserError:
    arrays = _arrays(batches)
    got = checks.shown(batches)
    if arrays:
        shown = ", ".join(map(checks.shown, arrays))
        got = f"a {type(batches).__name__} of arrays ({shown})"
    return UserError(
        f"expected batches to be a list of batches, got {got}{why}; pass [batch]"
    )
