"""Top-level definitions of a tree of Python sources, and what each refers to.

Files are parsed and never imported, so a tree may be of any commit. References are
over-approximated: every name in a definition that its module defines or imports counts,
shadowed or not.
"""

import ast
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Symbol = tuple[str, str]
"""A module and the name of a definition in it."""


@dataclasses.dataclass(frozen=True)
class Module:
    """What a file defines, imports and does when it is imported.

    Attributes:
        definitions: statements that bind a name, by name.
        imports: what a name was imported as: a module and a name in it, or None for the
            module itself.
        effects: statements that bind nothing.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    effects: list[ast.stmt]


class Tree:
    """The packages below a folder, read when they are asked for."""

    def __init__(self, root: Path, packages: Sequence[str]):
        """Names the folder and its top-level packages; others are not followed."""
        self.root = root
        self.packages = tuple(packages)
        self.module = functools.cache(self._module)
        self.code = functools.cache(self._code)
        self.references = functools.cache(self._references)

    def path(self, name: str) -> Path | None:
        """The file of a module, or None where the tree has none."""
        if name.split(".")[0] not in self.packages:
            return None
        base = self.root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None

    def source(self, path: Path) -> str:
        """The text of a file."""
        return path.read_text(encoding="utf-8")

    def _module(self, name: str) -> Module | None:
        path = self.path(name)
        if path is None:
            return None
        found = Module({}, {}, [])
        for statement in ast.parse(self.source(path)).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                found.imports.update(_imported(statement))
            elif names := list(_bound(statement)):
                found.imports.update(_imports_inside(statement))
                for bound in names:
                    found.definitions.setdefault(bound, []).append(statement)
            elif not _is_text(statement):
                found.effects.append(statement)
        return found

    def resolve(self, module: str, name: str) -> Symbol | str | None:
        """Where a name of a module comes from: a symbol, a module, or elsewhere."""
        if self.path(f"{module}.{name}"):
            return f"{module}.{name}"
        here = self.module(module)
        if here is None:
            return None
        if name in here.definitions:
            return module, name
        if name not in here.imports:
            return None
        source, inner = here.imports[name]
        if inner is None:
            return source if self.path(source) else None
        return self.resolve(source, inner)

    def _statements(self, symbol: Symbol) -> list[ast.stmt]:
        """What defines a symbol, with what its module does when it is imported."""
        here = self.module(symbol[0])
        return [] if here is None else [*here.definitions[symbol[1]], *here.effects]

    def _code(self, symbol: Symbol) -> str:
        """A digest of a symbol's statements."""
        return digest(self._statements(symbol))

    def _references(self, symbol: Symbol) -> frozenset[Symbol]:
        """Definitions that a symbol's statements name."""
        statements = self._statements(symbol)
        named = (self.named(symbol[0], statement) for statement in statements)
        return frozenset(found for part in named for found in part) - {symbol}

    def named(self, module: str, statement: ast.AST) -> Iterator[Symbol]:
        """Definitions that one statement of a module names."""
        here = self.module(module)
        aliases = {**(here.imports if here else {}), **_imports_inside(statement)}
        for chain in _chains(statement):
            first, *rest = chain
            if first in aliases:
                source, inner = aliases[first]
                place = source if inner is None else self.resolve(source, inner)
            else:
                place = self.resolve(module, first)
            while isinstance(place, str) and rest:
                place = self.resolve(place, rest.pop(0))
            if isinstance(place, tuple):
                yield place

    def reached(
        self, roots: Sequence[Symbol], closed: Sequence[str] = ()
    ) -> dict[Symbol, str]:
        """Every definition that the roots lead to, with a digest of its code.

        Args:
            roots: where to start; those that the tree lacks are skipped.
            closed: modules, or `MODULE:NAME`, that are neither entered nor counted.
        """
        shut = set(closed)
        found: dict[Symbol, str] = {}
        left = [place for root in roots if (place := self.resolve(*root))]
        while left:
            symbol = left.pop()
            if isinstance(symbol, str) or symbol in found:
                continue
            module, name = symbol
            if module in shut or f"{module}:{name}" in shut:
                continue
            found[symbol] = self.code(symbol)
            left += self.references(symbol)
        return found


def digest(statements: Sequence[ast.AST]) -> str:
    """A hash of code, whatever its comments, docstrings, layout and refusals.

    >>> a, b = "x = f( 1 )  # one", "x = f(1)"
    >>> digest(ast.parse(a).body) == digest(ast.parse(b).body)
    True
    """
    text = repr([canonical(statement) for statement in statements])
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(node: Any) -> Any:
    """A tree of plain tuples, the same for every version of Python.

    Left out are fields that are empty, docstrings, the text of an error, and refusals.
    """
    if isinstance(node, list):
        return [canonical(part) for part in node if not is_refusal(part)]
    if isinstance(node, ast.Raise):
        return ("Raise",)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [part for part in value if not _is_text(part)]
        if name in ("type_comment", "kind") or value is None or value == []:
            continue
        fields.append((name, canonical(value)))
    return (type(node).__name__, *fields)


def is_refusal(node: Any) -> bool:
    """Whether a statement does nothing but refuse: a finished run passed it.

    That is an `if` with nothing but a `raise UserError`, or a call of a function named
    `check_...`, `refuse_...` or `require_...` whose result is not used.

    >>> is_refusal(ast.parse("if n < 1: raise UserError('n')").body[0])
    True
    >>> is_refusal(ast.parse("_check_range(n)").body[0])
    True
    >>> is_refusal(ast.parse("n = check(n)").body[0])
    False
    """
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = ast.unparse(node.value.func).rsplit(".", 1)[-1].lstrip("_")
        return name.split("_")[0] in ("check", "refuse", "require")
    return (
        isinstance(node, ast.If)
        and not node.orelse
        and len(node.body) == 1
        and isinstance(raised := node.body[0], ast.Raise)
        and isinstance(raised.exc, ast.Call)
        and ast.unparse(raised.exc.func) == "UserError"
    )


def _is_text(statement: ast.AST) -> bool:
    """Whether a statement is a text alone: a docstring, or one below a constant."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(statement, kinds):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, kinds):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _imported(
    statement: ast.Import | ast.ImportFrom,
) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for alias in statement.names:
        if isinstance(statement, ast.ImportFrom):
            yield alias.asname or alias.name, (statement.module or "", alias.name)
        elif alias.asname:
            yield alias.asname, (alias.name, None)
        else:
            first = alias.name.split(".")[0]
            yield first, (first, None)


def _imports_inside(statement: ast.AST) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(_imported(node))
    return found


def _chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Names with the attributes asked of them: `a.b.c` is `("a", "b", "c")`."""
    if is_refusal(node) or isinstance(node, ast.Raise):
        return
    parts: list[str] = []
    place = node
    while isinstance(place, ast.Attribute):
        parts.append(place.attr)
        place = place.value
    if isinstance(place, ast.Name):
        yield (place.id, *reversed(parts))
        return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)
