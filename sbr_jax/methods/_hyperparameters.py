"""Records of hyper-parameters, read off the functions that make the methods.

A hyper-parameter is declared once, as a keyword of its method's function; its record
has the same names, types, defaults and sentences.
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from sbr_jax import checks


def collect(
    makers: Mapping[str, Callable[..., Any]], changes: Mapping[str, Mapping[str, Any]]
) -> type:
    """Makes the record of all methods' records.

    Args:
      makers: name of a method to the function that makes it.
      changes: name of a method to defaults other than those it takes over with
        ``**options`` from the first maker that has them.

    Returns:
      A frozen dataclass with a field for every maker.
    """
    fields = []
    for name in makers:
        record = make_record(name, makers, changes.get(name, {}))
        fields.append((attribute(name), record, record()))
    made = dataclasses.make_dataclass("Hyperparameters", fields, frozen=True)
    # Without a sentence on each, the parser of command lines looks for comments in the
    # source of a class that has none, and takes longer for it than for all else.
    said = [f"  {attribute(name)}: Hyper-parameters of {name}." for name in makers]
    title = "Hyper-parameters of every method.\n\nAttributes:"
    made.__doc__ = "\n".join([title, *said])
    return made


def attribute(name: str) -> str:
    """The field of a method.

    >>> attribute("safeanchor-exact")
    'safeanchor_exact'
    """
    return name.replace("-", "_")


def make_record(
    name: str,
    makers: Mapping[str, Callable[..., Any]],
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> type:
    """Makes the record of one method.

    Args:
      name: of the method.
      makers: see :func:`collect`.
      changes: its other defaults.

    Returns:
      A frozen dataclass that refuses values of another type.
    """
    source = makers[name]
    signature = inspect.signature(source)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        source = makers[name.partition("-")[0]]
        signature = inspect.signature(source)
    fields = [
        (label, parameter.annotation, changes.get(label, parameter.default))
        for label, parameter in signature.parameters.items()
    ]
    made = dataclasses.make_dataclass(
        "".join(map(str.capitalize, name.split("-"))),
        fields,
        frozen=True,
        namespace={"__post_init__": lambda self: checks.fields(self, name)},
    )
    made.__doc__ = f"Hyper-parameters of {name}.\n\nAttributes:\n{_arguments(source)}"
    return made


def _arguments(maker: Callable[..., Any]) -> str:
    """The sentences on arguments out of a docstring."""
    said = inspect.getdoc(maker) or ""
    found = re.search(r"^Args:\n((?:  .*\n|\n(?=  ))*)", said + "\n", re.MULTILINE)
    return found.group(1) if found else ""
