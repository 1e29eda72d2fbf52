"""Records of hyper-parameters, built from the signatures of the methods' makers.

A hyper-parameter is declared once, as a keyword of its method's maker. The record takes
names, types, defaults and help texts from there.
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
    """Make a record that holds one record per method.

    Args:
      makers: maps a method's name to its maker.
      changes: maps the name of a method with ``**options`` to the defaults in which it
        differs from the maker whose options it takes.

    Returns:
      A frozen dataclass with a field for every maker.
    """
    fields = []
    for name in makers:
        record = make_record(name, makers, changes.get(name, {}))
        fields.append((attribute(name), record, record()))
    made = dataclasses.make_dataclass("Hyperparameters", fields, frozen=True)
    # Without a help text for each field, the command-line parser searches the source of
    # this class, which has none, for comments. That takes longer than all other work.
    said = [f"  {attribute(name)}: Hyper-parameters of {name}." for name in makers]
    title = "Hyper-parameters of every method.\n\nAttributes:"
    made.__doc__ = "\n".join([title, *said])
    return made


def attribute(name: str) -> str:
    """The field name of a method.

    >>> attribute("safeanchor-exact")
    'safeanchor_exact'
    """
    return name.replace("-", "_")


def make_record(
    name: str,
    makers: Mapping[str, Callable[..., Any]],
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> type:
    """Make the record of one method.

    Args:
      name: name of the method.
      makers: see :func:`collect`.
      changes: defaults that replace the maker's.

    Returns:
      A frozen dataclass that refuses values outside the declared types and ranges.
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
    """The text of the ``Args`` section of a docstring."""
    said = inspect.getdoc(maker) or ""
    found = re.search(r"^Args:\n((?:  .*\n|\n(?=  ))*)", said + "\n", re.MULTILINE)
    return found.group(1) if found else ""
