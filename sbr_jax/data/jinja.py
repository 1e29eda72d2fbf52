"""A sandbox for chat templates, bounded in work and blind to clock, locale and chance.

A template comes with a checkpoint, so it is foreign code: it may loop 10⁹ times or
write gigabytes, and today's date would make the same command another one tomorrow.
Every loop, call and text that is built is charged to a budget; what cannot be told in
advance ends at a deadline.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, runtime, sandbox, utils
from jinja2.visitor import NodeTransformer

BUDGET = 1 << 27
"""Characters that one rendering may build on its way; a step counts as `STEP`."""

STEP = 512
OUTPUT = 1 << 24
"""Characters of one rendering's text."""

SECONDS = 5.0
"""Of this thread's own work, so that a busy machine refuses nothing."""

BLOCK = "\ufdd2", "\ufdd3"
"""Noncharacters around what a template marks as an answer."""

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
"""Whatever a template can raise: its own refusals, and faults in its code."""

NOT_OFFERED = ("random", "urlize", "wordwrap", "xmlattr")
"""Filters that draw lots, or are for web pages."""

_STRINGS = frozenset({"format", "join", "string", "tojson"})
"""Filters that write out a whole tree."""

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = (
    "January February March April May June July August September October November "
    "December"
)
LONG_FORMS = {
    "%c": "%a %b %e %H:%M:%S %Y",
    "%r": "%I:%M:%S %p",
    "%x": "%m/%d/%y",
    "%X": "%H:%M:%S",
    "%h": "%b",
    "%+": "%a %b %e %H:%M:%S UTC %Y",
}


class _Budget:
    """What is left of a rendering's work."""

    def __init__(self):
        self.left, self.until = BUDGET, time.thread_time() + SECONDS

    def charge(self, amount: int) -> None:
        self.left -= amount + STEP
        if self.left < 0 or time.thread_time() > self.until:
            raise jinja2.TemplateRuntimeError(
                "it loops too long, or builds too long a text"
            )


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def _charge(amount: int) -> None:
    _BUDGET.get().charge(amount)


def _size(value: Any) -> int:
    """How long a value is, roughly in characters."""
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _charge_tree(value: Any) -> Any:
    """Charges a value with everything in it, and returns it."""
    _charge(_size(value))
    if isinstance(value, list | tuple):
        for part in value:
            _charge_tree(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _charge_tree(key)
            _charge_tree(part)
    return value


def _widths(text: str) -> int:
    """The widths that a format asks for."""
    found = re.findall(r"\d{4,}", text)
    return sum(int(digits) if len(digits) < 12 else BUDGET for digits in found)


def _numbers(*values: Any) -> int:
    """Numbers that may be meant as lengths."""
    return sum(abs(value) for value in values if type(value) is int)


def _charge_text(method: str, text: str, values: list[Any]) -> None:
    """Charges what a method of a text may build."""
    _charge(len(text))
    if method == "replace" and len(values) > 1:
        _charge(text.count(str(values[0])) * len(str(values[1])))
    elif method == "join" and values:
        parts = values[0] = list(values[0])
        _charge(sum(len(str(part)) + len(text) for part in parts))
    elif method == "expandtabs":
        _charge(text.count("\t") * _numbers(*values))
    elif method == "translate" and isinstance(values[0], Mapping):
        _charge(len(text) * max(map(_size, values[0].values()), default=1))
    elif method in ("format", "format_map"):
        _charge(_widths(text))


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def charged(*args: Any, **options: Any) -> Any:
        values = list(args)
        value, more = values[passed], [*values[passed + 1 :], *options.values()]
        if name in ("join", "sum"):
            value = values[passed] = list(value)
        if name in _STRINGS or name == "sum":
            _charge_tree(value)
        else:
            _charge(_size(value))
        numbers = 0 if name in ("d", "default") else _numbers(*more)
        text = str(value) if isinstance(value, str) else ""
        if name in ("indent", "tojson"):
            numbers *= 1 + text.count("\n") + (name == "tojson") * _size(value)
            numbers += sum(map(len, filter(_is_text, more))) * text.count("\n")
        elif name == "replace" and len(more) > 1:
            numbers += text.count(str(more[0])) * len(str(more[1]))
        elif name == "join" and more:
            numbers += len(value) * len(str(more[0]))
        elif name == "format":
            numbers += _widths(text)
        _charge(numbers)
        out = function(*values, **options)
        _charge(_size(out))
        return out

    return charged


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class _Counting(NodeTransformer):
    """Puts a charge into every loop, macro, text and collection of a template."""

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
            node.expr = _call("search", [node.expr])
        return node

    def _collection(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        parts = list(node.iter_child_nodes())
        if getattr(node, "ctx", "load") != "load" or all(
            isinstance(part, nodes.Const) for part in parts
        ):
            return node
        return _call("weigh", [node])

    visit_List = visit_Tuple = visit_Dict = _collection


def _call(method: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Generation(ext.Extension):
    """``{% generation %}`` blocks, whose text is put between two noncharacters."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BLOCK[0]}{caller()}{BLOCK[1]}"


class _Namespace(utils.Namespace):
    """Variables of a template, without access to what is underneath."""

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


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """What transformers offers to chat templates, charged for."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: _charged(name, function)
            for name, function in self.filters.items()
            if name not in NOT_OFFERED
        }
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _refuse,
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def tick(self, length: int) -> str:
        """Charges a turn of a loop that writes so much fixed text."""
        _charge(length)
        return ""

    def weigh(self, value: Any) -> Any:
        """Charges a value that is written or put into a collection."""
        return _charge_tree(value)

    def search(self, value: Any) -> Any:
        """Charges a value that something is compared with or looked for in."""
        _charge(_size(value))
        return value

    def attach(self, *parts: Any) -> str:
        """Joins texts."""
        return "".join(str(_charge_tree(part)) for part in parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Charges an operation for its result before it is carried out."""
        size, other = _size(left), _size(right)
        if operator == "*":
            times = [abs(v) for v in (left, right) if isinstance(v, int)]
            square = (size + other) ** 2
            size = square if len(times) != 1 else max(size, other) * times[0]
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = (size * abs(right)) ** 2
        elif operator == "%" and isinstance(left, str):
            _charge_tree(right)
            values = right if isinstance(right, tuple) else (right,)
            size += _widths(left) + (_numbers(*values) if "*" in left else 0)
        _charge(size + other)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Charges a call for its arguments before and for its result after it."""
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if own is self:
            return function(*args)
        values = list(args)
        _charge(_numbers(*values, *options.values()))
        if isinstance(own, str):
            _charge_text(function.__name__, own, values)
        out = super().call(context, function, *values, **options)
        _charge_tree(out) if isinstance(out, list | dict) else _charge(_size(out))
        return out


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes what means something in HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime(day: datetime.date, form: str) -> str:
    """The beginning of a day as text, in English whatever the locale.

    >>> strftime(datetime.date(2024, 7, 26), "%d %b %Y, %A %H:%M %p")
    '26 Jul 2024, Friday 00:00 AM'
    """
    for short, whole in LONG_FORMS.items():
        form = re.sub(f"(?<!%)((?:%%)*){re.escape(short)}", rf"\g<1>{whole}", form)
    weekday, month = _DAYS.split()[day.weekday()], _MONTHS.split()[day.month - 1]
    words = {
        **{"%a": weekday[:3], "%A": weekday, "%b": month[:3], "%B": month},
        **{"%p": "AM", "%P": "am", "%Z": "", "%z": ""},
        "%s": str((day - datetime.date(1970, 1, 1)).days * 86400),
    }
    moment = datetime.datetime(day.year, day.month, day.day)
    return re.sub(
        r"%[-_0^#]?.", lambda m: words.get(m[0]) or _other(moment, m[0], words), form
    )


def _other(moment: datetime.datetime, code: str, words: Mapping[str, str]) -> str:
    return "" if code in words else moment.strftime(code)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> _Environment:
    return _Environment()


@contextlib.contextmanager
def _working() -> Iterator[None]:
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def render(template: str, variables: Mapping[str, Any], day: datetime.date) -> str:
    """Renders a chat template.

    Args:
      template: its text.
      variables: what it is given: ``messages``, ``add_generation_prompt``, ….
      day: the date that ``strftime_now`` tells.

    Returns:
      The text, with noncharacters around generation blocks (:data:`BLOCK`).

    Raises:
      Exception: one of :data:`ERRORS`.
    """
    with _working():
        compiled = _compiled(template)
        values = {**variables, "strftime_now": functools.partial(strftime, day)}
        context = compiled.new_context(values)
        parts, length = [], 0
        for part in compiled.root_render_func(context):
            parts.append(part)
            length += len(part)
            if length > OUTPUT:
                raise runtime.TemplateRuntimeError("it writes too long a text")
        return "".join(parts)
