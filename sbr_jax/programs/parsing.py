"""Command lines parsed into trees of frozen dataclasses, with one-line errors."""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from sbr_jax.typing import UserError

Arguments = TypeVar("Arguments")

REQUIRED = "required"
"""Marks, in `Annotated`, an option that a program asks for itself if it is missing."""


def parse(
    kind: type[Arguments],
    args: Sequence[str] | None,
    prog: str,
    default: Arguments | None = None,
) -> Arguments:
    """Parses a command line into a frozen dataclass, or a tree of them.

    Args:
        kind: the dataclass.
        args: words; None for those of this process.
        prog: how messages name the program.
        default: values for options that are not given.

    Raises:
        UserError: for a mistake; for an unknown option it names the nearest ones.
    """
    import tyro  # Slow to import, and needed only here.

    # tyro's only hook for errors is private: pyproject.toml bounds the version.
    from tyro._errors import on_parse_error
    from tyro.constructors import ConstructorRegistry

    words = list(sys.argv[1:] if args is None else args)
    start: Any = default

    def refuse(event: Any) -> None:
        raise UserError(f"{_complaint(event, kind, words)}; see {prog} --help")

    _refuse_unsaid(words)
    registry = ConstructorRegistry()
    if {"-h", "--help"} & {*words}:
        registry.struct_rule(_readable)
    with on_parse_error(refuse):
        return tyro.cli(kind, prog=prog, args=words, default=start, registry=registry)


def _readable(info: Any) -> Any:
    """Tyro's rule for dataclasses, with help that a user can read."""
    from tyro.conf import arg
    from tyro.constructors._struct_spec_dataclass import dataclass_rule  # As above.

    spec = dataclass_rule(info)
    if spec is None:
        return None
    fields = []
    for field in spec.fields:
        said, hint = field.helptext, None
        told = plain_text((said() if callable(said) else said) or "")
        if REQUIRED in getattr(field.type, "__metadata__", ()):
            hint = "(required)"
        elif "default: " in told and not field.default:  # What none stands for.
            hint = ""
        kind = Annotated[field.type, arg(help_behavior_hint=hint)]
        fields.append(dataclasses.replace(field, helptext=told, type=kind))
    return dataclasses.replace(spec, fields=tuple(fields))


def plain_text(docstring: str) -> str:
    """A docstring's sentence without its markup and line breaks.

    >>> plain_text(':func:`merge` takes ``"a"``,  `b` or None.')
    'merge takes "a", b or None.'
    """
    return " ".join(re.sub(r"(:[a-z]+:)?`+", "", docstring).split())


def _refuse_unsaid(words: Sequence[str]) -> None:
    """Refuses what tyro silently accepts: repeats, empty values, buckets."""
    from sbr_jax import files

    seen, option = set(), "first word"
    for word in words:
        value = word
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = name.replace("_", "-")
            if option in seen:
                raise UserError(f"expected {option} once, got it twice: drop one")
            seen.add(option)
            value = value if equals else name
        if not value:
            raise UserError(f"{option}: expected a value, got ''")
        if option != "--workdir":  # It may be in a bucket, or is refused later.
            files.require_disk(value)


def _complaint(event: Any, kind: type, words: Sequence[str]) -> str:
    """The parser's error about a command line, in one line."""
    name = type(event).__name__
    known = list(flags(kind))
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and option not in known:
            return _unknown(option, known)
    if name == "UnrecognizedArgs":
        switch = event.tokens[0] in ("True", "False")
        more = "; a switch is --NAME or --no-NAME" if switch else ""
        return f"unexpected word '{event.tokens[0]}'{more}"
    if name == "MissingArgs":
        missing = (a.arg.lowered.name_or_flags[-1] for a in event.missing_arguments)
        return f"expected {', '.join(missing)}, got none"
    argument = getattr(event, "argument", None)
    if argument is None:  # A record's own check failed, and has a message.
        return " ".join(str(getattr(event, "message", name)).split())
    flag, wanted = argument.lowered.name_or_flags[-1], argument.lowered.metavar
    said = ", ".join(map(repr, values_of(flag, words))) or "none"
    return f"{flag}: expected {wanted}, got {said}"


def _unknown(option: str, known: Sequence[str]) -> str:
    """The error for an unknown option, with the options it begins or resembles."""
    longer = [name for name in known if name.startswith(option)]
    near = longer[:3] or difflib.get_close_matches(option, known, n=3, cutoff=0.5)
    return f"unknown option '{option}'" + (f"; nearest: {', '.join(near)}" * bool(near))


def values_of(flag: str, words: Sequence[str]) -> list[str]:
    """The words after an option on a command line; none if it is not given.

    >>> values_of("--a-b", ["--a_b=1", "2", "--c", "3"])
    ['1', '2']
    """
    found: list[str] = []
    inside = False
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            inside = name.replace("_", "-") == flag
            found += [value] if inside and value else []
        elif inside:
            found.append(word)
    return found


def flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every option of a tree of dataclasses.

    >>> Pair = dataclasses.make_dataclass("Pair", [("a_b", int), ("c", bool)])
    >>> list(flags(dataclasses.make_dataclass("Tree", [("p", Pair), ("q", int)])))
    ['--p.a-b', '--p.c', '--p.no-c', '--q']
    """
    types: dict[Any, Any] = {}
    if (origin := typing.get_origin(kind)) is not None:
        types = dict(zip(origin.__parameters__, typing.get_args(kind), strict=True))
        kind = origin
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner, name = types.get(hints[field.name], hints[field.name]), field.name
        if typing.get_origin(inner) is typing.Annotated:
            inner, *notes = typing.get_args(inner)
            named = (note.name for note in notes if getattr(note, "name", None))
            name = next(named, name)
        name = name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            yield from flags(inner, f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}"
        if inner is bool:
            yield f"--{prefix}no-{name}"
