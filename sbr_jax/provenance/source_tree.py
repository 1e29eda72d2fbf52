"""Finds the top-level definitions of Python sources, and what each refers to.

Files are parsed, not imported. References are over-approximated: every name in a
definition that its module defines or imports counts, even if it is shadowed.
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
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclasses.dataclass(frozen=True)
class Module:
    """The definitions, imports and import-time effects of a file.

    Attributes:
        definitions: statements that bind a name, by name.
        imports: for each imported name its module and its name there, or None for the
            module itself.
        effects: statements that bind nothing.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    effects: list[ast.stmt]


class Tree:
    """A package below a folder; its files are read on demand."""

    def __init__(self, root: Path, package: str):
        """Names the folder and its package; other packages are not followed."""
        self.root, self.package = root, package
        self.path = functools.cache(self._path)
        self.module = functools.cache(self._module)
        self.resolve = functools.cache(self._resolve)
        self.code = functools.cache(self._code)

    def _path(self, name: str) -> Path | None:
        """The file of a module, or None if the tree has none."""
        base = self.root.joinpath(*name.split("."))
        own = name.split(".")[0] == self.package
        places = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in places if own and path.is_file()), None)

    def source(self, path: Path) -> str:
        """The text of a file."""
        return path.read_text(encoding="utf-8")

    def _module(self, name: str) -> Module:
        path, found = self.path(name), Module({}, {}, [])
        for statement in ast.parse(self.source(path)).body if path else ():
            names = () if isinstance(statement, IMPORTS) else tuple(_bound(statement))
            if names or isinstance(statement, IMPORTS):
                found.imports.update(_imported(statement))
            elif not _is_text(statement):
                found.effects.append(statement)
            for bound in names:
                found.definitions.setdefault(bound, []).append(statement)
        return found

    def _resolve(self, module: str, name: str) -> Symbol | str | None:
        """Where a module's name comes from: a symbol, a module, or elsewhere."""
        here = self.module(module)
        if name in here.definitions:
            return module, name
        source, inner = here.imports.get(name, (module, name))
        if inner is None:
            return source if self.path(source) else None
        if (source, inner) != (module, name):
            return self.resolve(source, inner)
        return f"{module}.{name}" if self.path(f"{module}.{name}") else None

    def _code(self, symbol: Symbol) -> tuple[str, frozenset[Symbol]]:
        """A digest of a symbol's statements, and the definitions that they name.

        The import-time effects of its module count as part of each symbol.
        """
        module, name = symbol
        here = self.module(module)
        statements = [*here.definitions[name], *here.effects]
        named = (self._named(module, statement) for statement in statements)
        return digest(statements), frozenset(x for part in named for x in part)

    def _named(self, module: str, statement: ast.stmt) -> Iterator[Symbol]:
        """The definitions that one statement of a module names."""
        inside = _imported(statement)
        for first, *rest in _chains(statement):
            source, inner = inside.get(first, (module, first))
            place = source if inner is None else self.resolve(source, inner)
            while isinstance(place, str) and rest:
                place = self.resolve(place, rest.pop(0))
            if isinstance(place, tuple):
                yield place

    def reached(
        self, roots: Sequence[Symbol], closed: Sequence[str] = ()
    ) -> dict[Symbol, str]:
        """Every definition reachable from the roots, with a digest of its code.

        Args:
            roots: where to start; symbols missing in the tree are skipped.
            closed: modules, or `MODULE:NAME`, that are neither entered nor counted.
        """
        found: dict[Symbol, str] = {}
        left = [place for root in roots if (place := self.resolve(*root))]
        while left:
            symbol = left.pop()
            if isinstance(symbol, str) or symbol in found:
                continue
            if symbol[0] in closed or ":".join(symbol) in closed:
                continue
            found[symbol], named = self.code(symbol)
            left += named
        return found


def digest(statements: Sequence[ast.AST]) -> str:
    """A hash of code without its comments, docstrings, layout, imports and refusals.

    >>> a, b = "x = f( 1 )  # one", "x = f(1)"
    >>> digest(ast.parse(a).body) == digest(ast.parse(b).body)
    True
    """
    text = repr([_canonical(statement) for statement in statements])
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(node: Any) -> Any:
    """A tree of plain tuples, the same for every version of Python.

    Left out are empty fields, bare strings, imports (imported definitions are reached
    by name), error messages, and refusals.
    """
    if isinstance(node, list):
        left_out = (_is_text, is_refusal, lambda part: isinstance(part, IMPORTS))
        return [_canonical(x) for x in node if not any(out(x) for out in left_out)]
    if isinstance(node, ast.Raise):
        return ("Raise",)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        (name, _canonical(value))
        for name, value in ast.iter_fields(node)
        if name not in ("type_comment", "kind") and value is not None and value != []
    ]
    return (type(node).__name__, *fields)


def is_refusal(node: Any) -> bool:
    """Whether a statement only refuses: a finished run passed it.

    That is an `if` whose body is only a `raise UserError`, or a call of a function
    named `check_...`, `refuse_...` or `require_...` whose result is not used.

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


def _is_text(statement: Any) -> bool:
    """Whether a statement is a bare string: a docstring, or one below a constant."""
    value = getattr(statement, "value", None)
    text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(statement, ast.Expr) and text


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement defines."""
    inner = [statement] if isinstance(statement, DEFINITIONS) else ast.walk(statement)
    for node in inner:
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _imported(statement: ast.AST) -> dict[str, tuple[str, str | None]]:
    """The origin of each name imported anywhere in a statement."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(statement):
        for alias in node.names if isinstance(node, IMPORTS) else ():
            if isinstance(node, ast.ImportFrom):
                found[alias.asname or alias.name] = (node.module or "", alias.name)
            elif alias.asname:
                found[alias.asname] = (alias.name, None)
            else:
                first = alias.name.split(".")[0]
                found[first] = (first, None)
    return found


def _chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Names with their attribute accesses: `a.b.c` is `("a", "b", "c")`."""
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
