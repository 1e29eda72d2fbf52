"""Finds the program in an answer to a request for a function.

Answers are text around code: fences of several spellings, prose, other blocks, example
calls, or a body alone. Every plausible reading is tried in turn, and the first that
compiles and defines the function is taken; nothing is run. Compiling decides what a
grammar of our own could only guess: where prose begins, whether indentation fits.
"""

import ast
import functools
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence

_STOPS = (
    "\nclass ",
    "\ndef ",
    "\n#",
    "\nif ",
    "\nprint(",
    "\nassert ",
    "\n```",
    "\n~~~",
)
"""A continuation ends before the next top-level statement (arXiv:2107.03374)."""

_STARTS = re.compile(r"(?:from|import|def|class|async def)\b|@|[A-Za-z_]\w*\s*=[^=]")

LONGEST, MOST, MOST_READ = 100_000, 200, 500_000
"""Limits: characters of a program, readings, characters of all readings."""


def find_program(prompt: str, entry_point: str, answer: str) -> str:
    """The program that an answer gives for a prompt.

    A fenced block, or an answer that defines the function itself, stands alone (after
    the part of the prompt above the function); a body alone continues the prompt.
    Imports, helpers and constants from elsewhere are added if the function uses them.
    Example calls, the model's own tests and a ``__main__`` guard are left out. Of
    several definitions the last complete one counts, since corrections come later.

    Args:
      prompt: source that ends within the function.
      entry_point: the function's name.
      answer: text.

    Returns:
      Source that defines the function; if no reading does, the most likely one.
    """
    likeliest, read = None, 0
    readings = _readings(prompt, entry_point, _plain_lines(answer))
    for _, source in zip(range(MOST), readings, strict=False):
        likeliest = source if likeliest is None else likeliest
        read += len(source)
        if read > MOST_READ:
            break
        tree = _parsed(source)
        if tree is not None and _defines(tree, entry_point):
            return _without_tests(source, tree, entry_point)
    return likeliest or prompt


def _plain_lines(answer: str) -> str:
    """Normalises line ends, and indentation with no-break spaces."""
    text = answer.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(
        r"^[^\S\n]+", lambda space: space[0].replace("\xa0", " "), text, flags=re.M
    )


def _readings(prompt: str, name: str, answer: str) -> Iterator[str]:
    """Programs that may be meant, the most likely first."""
    function = rf"^(?P<space>[ \t]*)(?:async )?def {re.escape(name)}\b"
    found = re.search(function, prompt, re.MULTILINE)
    above = prompt[: found.start()] + "\n" if found else ""
    bound = rf"^{re.escape(name)}[ \t]*(?::[^=\n]*)?="
    head = re.compile(rf"{function}|{bound}[ \t(]*lambda\b", re.MULTILINE)
    alias = re.compile(rf"{bound}[ \t]*[A-Za-z_]", re.MULTILINE)
    closed, left_open = (
        [textwrap.dedent(_typed(block, head)) for block in found]
        for found in _blocks(answer)
    )
    blocks = [*closed, *left_open]
    helpers = functools.partial(_helpers, name=name, parsed=functools.cache(_parsed))
    answer = _typed(answer, head)
    # The last block is the correction, unless it is cut off or a method of a test.
    order = [*reversed(closed), *left_open]
    order.sort(key=lambda block: not _at_margin(block, head))
    for block in order:
        others = [other for other in blocks if other is not block]
        if head.search(block):
            whole = helpers(block, others) + block
            yield from (above + part for part in _slices(whole, head))
            # Nothing may come before an import from __future__.
            yield from _slices(whole, head)
        elif alias.search(block):
            # A body may assign to this name; then its "return" does not compile.
            yield above + helpers(block, others) + block
    if head.search(answer):
        yield from (above + part for part in _slices(answer, head))
    indent = _indents(prompt)[-1:] or ["    "]
    if answer.lstrip("\n")[:1] in (" ", "\t"):
        end = min((p for s in _STOPS if (p := answer.find(s)) >= 0), default=None)
        body, rest = answer[:end], answer[len(answer[:end]) :]
        yield f"{prompt}{body}\n{helpers(prompt + body, [rest])}"
    for text in (*blocks, answer):
        for body in _bodies(text, indent):
            yield prompt + body
            plain = textwrap.dedent(body.expandtabs(4)).strip("\n")
            yield prompt + textwrap.indent(plain, indent[0]) + "\n"


def _at_margin(text: str, head: re.Pattern[str]) -> bool:
    return any(not found["space"] for found in head.finditer(text))


def _typed(text: str, head: re.Pattern[str]) -> str:
    """The input lines of an interactive session, if they define the function."""
    if head.search(text) or ">>> " not in text:
        return text
    typed = re.findall(r"^[ \t]*(?:>>>|\.\.\.)(?: (.*)|)$", text, re.MULTILINE)
    session = "\n".join(typed)
    return session if head.search(session) else text


def _indents(text: str) -> list[str]:
    return re.findall(r"^[ \t]+(?=\S)", text, re.MULTILINE)


def _bodies(text: str, indent: list[str]) -> Iterator[str]:
    """Parts of a text that may be a function's body."""
    lines = text.strip("\n").split("\n")
    margins = [i for i, line in enumerate(lines) if i and line[:1] not in ("", *" \t")]
    # The first line, or every line, has lost its indentation; prose may follow.
    for end in (len(lines), *reversed(margins)):
        part = "\n".join(lines[:end])
        yield part
        yield from (
            f"{space}{part}" for space in dict.fromkeys(indent + _indents(part))
        )
    # Prose at the margin, then a body, then prose again.
    inside = [i for i, line in enumerate(lines) if line[:1] in (" ", "\t")]
    if inside:
        end = next((i for i in margins if i > inside[0]), len(lines))
        yield "\n".join(lines[inside[0] : end])


def _blocks(answer: str) -> tuple[list[str], list[str]]:
    """Contents of fences of back-ticks or tildes: closed ones, and one left open."""
    found: list[str] = []
    inside: list[str] | None = None
    fence = indent = ""
    for line in answer.split("\n"):
        # Lists and quotations indent their blocks, including the fences.
        plain = line.removeprefix(indent) if line.strip(" \t>") else ""
        if inside is None:
            before, fence = _fence(line)
            if fence:
                inside = []
                indent = "" if before.strip(" \t>") else before
        elif line.rstrip().endswith(fence):
            found.append("\n".join([*inside, plain.rstrip().rstrip(fence[0])]))
            inside, indent = None, ""
        else:
            inside.append(plain)
    return found, [] if inside is None else ["\n".join(inside)]


def _fence(line: str) -> tuple[str, str]:
    """The text before an opening fence, and the fence if there is one."""
    # No back-tick may follow a fence: it is the last run of them, or else tildes.
    ticks = line[: line.rfind("`") + 1]
    before = ticks.rstrip("`")
    if len(ticks) - len(before) >= 3:
        return before, ticks[len(before) :]
    before, fence, rest = line[len(ticks) :].partition("~~~")
    return ticks + before, fence + "~" * (len(rest) - len(rest.lstrip("~")))


def _slices(text: str, head: re.Pattern[str]) -> Iterator[str]:
    """The text, then parts from possible starts of code to possible starts of prose."""
    yield text
    lines = text.split("\n")
    heads = {i: m["space"] or "" for i, s in enumerate(lines) if (m := head.match(s))}
    # A nested function of the same name is not another definition.
    outer = min(len(space) for space in heads.values())
    for place in reversed([i for i, space in heads.items() if len(space) == outer]):
        starts = (i for i in range(place) if _STARTS.match(lines[i]))
        ends = (
            i
            for i in range(len(lines) - 1, place, -1)
            if lines[i][:1] not in ("", *" \t)]}")
        )
        margins = [len(lines), *ends]
        for start in (*starts, place):
            for end in margins:
                yield textwrap.dedent("\n".join(lines[start:end]))


def _parsed(source: str) -> ast.Module | None:
    """The syntax tree of a program, if it compiles."""
    if len(source) > LONGEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Only compiling finds a "return" outside a function.
            compile(source, "answer", "exec", dont_inherit=True)
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _defines(tree: ast.Module, name: str) -> bool:
    """Whether a program really defines the function, with more than words."""
    found = [node for node in tree.body if name in _bound(node)]
    if not found:
        return False
    if isinstance(found[-1], ast.Assign | ast.AnnAssign):
        named = ast.Lambda | ast.Name | ast.Attribute | ast.Call
        return isinstance(found[-1].value, named)
    if not isinstance(found[-1], ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    bare = [n.value for n in found[-1].body if isinstance(n, ast.Expr)]
    # A single word on its line is prose that happens to compile.
    prose = any(isinstance(value, ast.Name) for value in bare)
    constants = sum(isinstance(value, ast.Constant) for value in bare)
    constants += sum(isinstance(node, ast.Pass) for node in found[-1].body)
    return not prose and constants < len(found[-1].body)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a definition or a single assignment binds."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    else:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)} | {
        getattr(node, "name", "")
    }


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _helpers(
    block: str,
    others: Sequence[str],
    name: str,
    parsed: Callable[[str], ast.Module | None],
) -> str:
    """Imports, definitions and constants elsewhere that this block uses but lacks."""
    tree = parsed(block)
    if tree is None:
        return ""
    lacking = _names(tree)
    own = {name}.union(*map(_bound, tree.body))
    found: list[str] = []
    trees = [other for source in others if (other := parsed(source))]
    for node in reversed([node for other in trees for node in other.body]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(a.asname or a.name).partition(".")[0] for a in node.names}
        else:
            bound = _bound(node) - own if _is_helper(node) else set()
        if bound & (lacking | {"*"}):
            found.insert(0, f"{ast.unparse(node)}\n")
            lacking |= _names(node)
    return "".join(found)


def _is_helper(node: ast.stmt) -> bool:
    """Whether a statement defines a function or class, or binds a constant."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        # A name or a call is part of an example.
        parts = ast.walk(node.value or node)
        return not any(isinstance(part, ast.Name | ast.Call) for part in parts)
    return hasattr(node, "name")


def _without_tests(source: str, tree: ast.Module, name: str) -> str:
    """The program without top-level code other than definitions."""

    def place(node: ast.stmt) -> range:
        return range(node.lineno - 1, node.end_lineno or node.lineno)

    tests = [node for node in tree.body if _is_test(node, name)]
    kept = {i for node in tree.body if node not in tests for i in place(node)}
    drop = {i for node in tests for i in place(node)} - kept
    lines = source.split("\n")
    return "\n".join("" if i in drop else line for i, line in enumerate(lines))


def _is_test(node: ast.stmt, name: str) -> bool:
    """Whether a statement is an example or a test, or starts a program."""
    if isinstance(node, ast.If):
        return "__name__" in _names(node.test)
    if not isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign):
        return isinstance(node, ast.Assert)
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    called = {getattr(function, "id", "") for function in calls}
    if isinstance(node, ast.Expr):
        # Without a call it does nothing: a word of prose that happens to compile.
        return not calls or not called.isdisjoint({name, "print", "main", "input"})
    return "input" in called or getattr(node, "value", None) is None
