"""A sandbox for chat templates: bounded work, no clock, locale or randomness.

A template comes with a checkpoint, so it is foreign code. It may loop 10⁹ times or
write gigabytes, and if it read today's date, the same command would differ tomorrow.
Every loop, call and text that is built is charged to a budget; work that cannot be
estimated in advance ends at a deadline.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox, utils
from jinja2.visitor import NodeTransformer

from sbr_jax.data import _work as work
from sbr_jax.data._clock import strftime

OUTPUT = 1 << 24
"""Most characters of one rendering."""

BLOCK = "\ufdd2", "\ufdd3"
"""Noncharacters around the text that a template marks as an answer."""

ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Everything that a template can raise: its own refusals, and faults in its code."""

LONGEST = 1 << 16
"""Most characters of a template: published models have under 30 thousand."""

NOT_OFFERED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that are random, or made for web pages or debugging."""

BYTES = ("encode", "to_bytes")
"""Methods that give bytes, which chat texts never need."""


class _Counting(NodeTransformer):
    """Adds a charge to every loop, macro, text and collection of a template."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        texts = (n for part in node.body for n in part.find_all(nodes.TemplateData))
        length = sum(len(text.data) for text in texts)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(length)])))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _call("weigh", [part])
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("attach", node.nodes)

    def visit_Operand(self, node: nodes.Operand) -> nodes.Operand:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _call("weigh", [node.expr])
        return node

    def _collection(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        parts = list(node.iter_child_nodes())
        if getattr(node, "ctx", "load") != "load" or all(
            isinstance(part, nodes.Const) for part in parts
        ):
            return node
        return _call("weigh", [node])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _call("slice", [node]) if isinstance(node.arg, nodes.Slice) else node

    def _spreading(self, node: Any) -> Any:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _call("spread", [node.dyn_args])
        return node

    visit_Call = visit_Filter = visit_Test = _spreading
    visit_List = visit_Tuple = visit_Dict = _collection


def _call(method: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Generation(ext.Extension):
    """``{% generation %}`` blocks, whose text is marked by two noncharacters."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BLOCK[0]}{caller()}{BLOCK[1]}"


class _Namespace(utils.Namespace):
    """A template's variables, without access to the object underneath."""

    def __init__(*args: Any, **values: Any):
        self, *rest = args
        found = dict(*rest, **values)
        for name in found:
            _public(name)
        utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


_REPEATED = str, list, tuple


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with charges."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: work.charged_filter(name, function)
            for name, function in self.filters.items()
            if name not in NOT_OFFERED
        }
        self.tests = {
            name: work.charged_test(name, function)
            for name, function in self.tests.items()
        }
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _refuse,
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in BYTES and super().is_safe_attribute(obj, attr, value)

    def tick(self, length: int) -> str:
        """Charges one turn of a loop that writes ``length`` fixed characters."""
        work.charge(length)
        return ""

    def weigh(self, value: Any) -> Any:
        """Charges a value that is written, compared, or put into a collection."""
        return work.charge_tree(value)

    def slice(self, value: Any) -> Any:
        """Charges a slice of a text or list."""
        work.charge(work.size_of(value))
        return value

    def spread(self, values: Any) -> Any:
        """Charges values that are passed as separate arguments."""
        work.charge(work.size_of(values) * work.ITEM)
        return values

    def attach(self, *parts: Any) -> str:
        """Joins texts."""
        return "".join(str(work.charge_tree(part)) for part in parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Charges an operation for its result before computing it."""
        size, other = work.size_of(left), work.size_of(right)
        work.charge(size + other)
        if operator == "*" and isinstance(left, _REPEATED) and isinstance(right, int):
            work.charge_times(left, right)
        elif operator == "*" and isinstance(right, _REPEATED) and isinstance(left, int):
            work.charge_times(right, left)
        elif operator == "+" and isinstance(left, list | tuple):
            work.charge_tree(left)
            work.charge_tree(right)
        elif operator == "%" and isinstance(left, str):
            values = list(right) if isinstance(right, tuple) else [right]
            work.charge_percent(left, values)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            work.charge((left.bit_length() * abs(right) // 3) ** 2)
        elif operator in ("*", "//", "%"):
            work.charge(size * other)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Charges a call for its arguments before and for its result after it."""
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if own is self:
            return function(*args)
        values = list(args)
        work.charge(work.lengths(*values, *options.values()))
        if isinstance(own, str):
            given = [*values, *options.values()]
            work.charge_text(function.__name__, own, given)
            values = given[: len(values)]
        out = super().call(context, function, *values, **options)
        work.charge_tree(out) if isinstance(out, list | dict) else work.charge(
            work.size_of(out)
        )
        return out


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes characters that are special in HTML.
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
    return json.dumps(value, separators=separators, **options)


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> _Environment:
    return _Environment()


def render(template: str, variables: Mapping[str, Any], day: datetime.date) -> str:
    """Renders a chat template.

    Args:
      template: its text.
      variables: its inputs: ``messages``, ``add_generation_prompt``, ….
      day: the date that ``strftime_now`` returns.

    Returns:
      The text, with noncharacters around generation blocks (:data:`BLOCK`).

    Raises:
      Exception: one of :data:`ERRORS`.
    """
    if len(template) > LONGEST:
        raise jinja2.TemplateRuntimeError(
            f"it has {len(template):,} characters, too long: at most {LONGEST:,}"
        )
    with work.working():
        compiled = _compiled(template)
        values = {**variables, "strftime_now": functools.partial(strftime, day)}
        context = compiled.new_context(values)
        parts, length = [], 0
        for part in compiled.root_render_func(context):
            parts.append(part)
            length += len(part)
            if length > OUTPUT:
                raise jinja2.TemplateRuntimeError("it writes too long a text")
        return "".join(parts)
