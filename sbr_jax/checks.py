"""Checks of the values that a user passes; each mistake is one `UserError`.

Numbers may be arrays without axes, as ``optax.inject_hyperparams`` passes them. A
traced number has no value yet, so only its kind is checked.
"""

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sbr_jax import errors
from sbr_jax.typing import UserError

P = ParamSpec("P")
T = TypeVar("T")


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    note: str = "",
) -> None:
    """Refuse anything but a finite number in range, before and after float32 rounding.

    Args:
        name: name of the argument.
        value: a number, or an array without axes.
        least: lower bound, inclusive.
        above: lower bound, exclusive.
        most: upper bound, inclusive.
        below: upper bound, exclusive.
        note: added to the message.

    Raises:
        UserError: naming the argument and its range.
    """
    wanted = f"a finite number{_range(least, above, most, below)}"
    if not _is_real(value):
        raise _refusal(name, wanted, value, note)
    if is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return
    try:
        x = float(value)
    except OverflowError:  # an integer beyond every float
        x = np.inf
    bounds = (
        (operator.ge, least),
        (operator.gt, above),
        (operator.le, most),
        (operator.lt, below),
    )

    def fits(x: float) -> bool:
        within = all(bound is None or test(x, bound) for test, bound in bounds)
        return bool(np.isfinite(x)) and within

    if not fits(x):
        raise _refusal(name, wanted, value, note)
    if not fits(_in_float32(x)):
        note = f"it is {_in_float32(x)} in float32{note and '; '}{note}"
        raise _refusal(name, wanted, value, note)


def whole(
    name: str,
    value: Any,
    *,
    least: int | None = 1,
    most: int | None = None,
    note: str = "",
) -> int:
    """Return the value as an ``int``; refuse anything but an integer in range.

    Args:
        name: name of the argument.
        value: an integer; it shapes arrays, so it cannot be traced.
        least: lower bound, inclusive.
        most: upper bound, inclusive.
        note: added to the message.

    Returns:
        The integer.

    Raises:
        UserError: naming the argument and its range.
    """
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    fits = fits and (least is None or value >= least)
    if not fits or (most is not None and value > most):
        wanted = f"a whole number{_range(least, None, most, None)}"
        raise _refusal(name, wanted, value, note)
    return int(value)


SEEDS = 2**32
"""Seeds lie below this: a JAX key takes 32 bits and drops those above them."""


def seed(name: str, value: Any) -> int:
    """The value as an ``int``, refusing what would not be a seed of its own.

    >>> seed("seed", 2**32)
    Traceback (most recent call last):
    sbr_jax.typing.UserError: expected seed to be a whole number in [0, 4294967295], \
got 4294967296; others repeat a seed of this range: take one of it
    """
    note = "others repeat a seed of this range: take one of it"
    return whole(name, value, least=0, most=SEEDS - 1, note=note)


def seeds(given: Iterable[Any]) -> list[int]:
    """The seeds of a run, refusing none at all, what is no seed, and repeats.

    Raises:
        UserError: for the first mistake.
    """
    found = [seed("seed", value) for value in given]
    errors.check_some("seed", found)
    errors.check_once("seed", found)
    return found


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is not one of the known words."""
    if not isinstance(value, str) or value not in known:
        *first, last = map(repr, known)
        raise _refusal(name, f"{', '.join(first)} or {last}", value)


def switch(name: str, value: Any) -> None:
    """Refuse a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise _refusal(name, "True or False", value)


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of a number, declared as in ``Annotated[int, Range(least=1)]``.

    Attributes:
        least: lower bound, inclusive.
        above: lower bound, exclusive.
        most: upper bound, inclusive.
        below: upper bound, exclusive.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None


def fields(record: Any, scope: str) -> None:
    """Refuse a dataclass with a field outside its declared type or range.

    Args:
        record: the dataclass. Its fields are checked if they are numbers, texts,
            switches, words (`Literal`), tuples of one kind, or one of these or None.
            Fields of other types are not checked.
        scope: put before the name of a field.

    Raises:
        UserError: for the first field that does not fit.
    """
    for name, kind in _declared(type(record)).items():
        _fits(f"{scope}.{name}", getattr(record, name), kind)


@functools.cache
def _declared(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _fits(name: str, value: Any, kind: Any) -> None:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(kinds) > 1 or (value is None and len(typing.get_args(kind)) > 1):
            return
        kind = kinds[0]
    limits: dict[str, Any] = {}
    if typing.get_origin(kind) is typing.Annotated:
        kind, *notes = typing.get_args(kind)
        limits = next((vars(note) for note in notes if isinstance(note, Range)), {})
    if kind is int:
        whole(name, value, least=limits.get("least"), most=limits.get("most"))
    elif kind is float:
        number(name, value, **limits)
    elif typing.get_origin(kind) is typing.Literal:
        one_of(name, value, typing.get_args(kind))
    elif kind is bool:
        switch(name, value)
    elif kind is str and not isinstance(value, str):
        raise _refusal(name, "text", value)
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, tuple) or not all(isinstance(x, item) for x in value):
            named = {str: "texts", int: "whole numbers"}.get(item, item.__name__)
            raise _refusal(name, f"a tuple of {named}", value)


def checked(maker: Callable[P, T]) -> Callable[P, T]:
    """Make a function refuse keywords outside their declared types and ranges.

    >>> from sbr_jax.settings import Positive
    >>> @checked
    ... def noise(*, scale: Positive = 0.01):
    ...     return scale
    >>> noise(scale=-1.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    sbr_jax.typing.UserError: expected noise.scale to be a finite number above 0, ...
    """
    hints = typing.get_type_hints(maker, include_extras=True)
    scope = getattr(maker, "__name__", "option").replace("_", "-")

    @functools.wraps(maker)
    def made(*args: P.args, **options: P.kwargs) -> T:
        for name, value in options.items():
            if name in hints:
                _fits(f"{scope}.{name}", value, hints[name])
        return maker(*args, **options)

    return made


def is_function(value: Any) -> bool:
    """Whether a value is callable and not a class."""
    return callable(value) and not isinstance(value, type)


def rate(name: str, value: Any) -> None:
    """Refuse a rate, or an Optax schedule's at step 0, that is not a number ≥ 0."""
    if not is_function(value):
        return number(name, value, least=0.0)
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules ask for it.
        first = value(jnp.zeros([], jnp.int32))
    return number(f"{name}(0)", first, least=0.0, note="a schedule's first rate")


def function(name: str, value: Any) -> None:
    """Refuse a value that `is_function` rejects."""
    if not is_function(value):
        raise _refusal(name, "a function", value)


def transformation(name: str, value: Any) -> None:
    """Refuse a value without ``init`` and ``update``, or a class."""
    fields = (getattr(value, field, None) for field in ("init", "update"))
    if isinstance(value, type) or not all(map(callable, fields)):
        note = "pass one that is built, such as optax.adam(1e-3)"
        raise _refusal(name, "an Optax transformation", value, note)


def random_key(name: str, value: Any) -> None:
    """Refuse anything but one key of ``jax.random``."""
    shape = getattr(value, "shape", None)
    typed = isinstance(value, jax.Array) and has_dtype(value, jax.dtypes.prng_key)
    old = getattr(value, "dtype", None) == jnp.uint32 and shape == (2,)
    if not (typed and shape == ()) and not old:
        raise _refusal(name, "one random key, such as jax.random.key(0)", value)


def floating(what: str, where: str, leaf: Any) -> None:
    """Refuse a leaf that is not an array of real floating-point numbers.

    A step cast to integers is 0, and a cast from complex numbers loses half of it.
    """
    if not hasattr(leaf, "shape") or not has_dtype(leaf, jnp.floating):
        raise UserError(
            f"expected {what} that are floating-point arrays, got {shown(leaf)} at "
            f"{where or '/'}; leave out what is not trained, or convert it"
        )


def floating_leaves(what: str, tree: Any) -> None:
    """Refuse a tree with a leaf that `floating` refuses."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        floating(what, jax.tree_util.keystr(path), leaf)


def shown(value: Any) -> str:
    """A value in a few words: dtype and shape of an array, else its ``repr``."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if _is_real(value) and not is_traced(value):
            return f"{value.dtype} {value}"
        return f"{value.dtype} {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}... ({type(value).__name__})"


def _in_float32(x: float) -> float:
    """The number as float32 arithmetic sees it; subnormal numbers count as 0."""
    with np.errstate(over="ignore", under="ignore"):
        seen = float(np.float32(x))
    return 0.0 if abs(seen) < np.finfo(np.float32).tiny else seen


def has_dtype(value: Any, kind: Any) -> bool:
    """Whether a value is an array with a dtype of this kind."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, kind)


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer."""
    return isinstance(value, Tracer)


def _is_real(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | float):
        return True
    if getattr(value, "shape", None) != ():
        return False
    return has_dtype(value, jnp.floating) or has_dtype(value, jnp.integer)


def _range(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    low, high = (least if above is None else above), (most if below is None else below)
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low}" if above is None else f" above {low}"
    if low is None:
        return f" of at most {high}" if below is None else f" below {high}"
    left, right = "(" if least is None else "[", ")" if most is None else "]"
    return f" in {left}{low}, {high}{right}"


def _refusal(name: str, wanted: str, value: Any, note: str = "") -> UserError:
    rest = f"; {note}" if note else ""
    return UserError(f"expected {name} to be {wanted}, got {shown(value)}{rest}")
