"""Who may import whom: the table of docs/architecture.md, read from its text."""

import ast
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[2]
CORE_MAY_IMPORT = {"jax", "numpy", "optax"}


def read_table():
    """{module prefix: (layer, layers it may import)}."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = {}
    for layer, modules, may in re.findall(
        r"^\| (\d) \| (.+?) \| (.+?) \|$", text, re.MULTILINE
    ):
        low_high = [int(n) for n in re.findall(r"\d", may)]
        if "all" in may:
            low_high = [0, int(layer)]
        allowed = set(range(low_high[0], low_high[-1] + 1)) if low_high else set()
        for name in re.findall(r"`([^`]+)`", modules):
            stem, _, inner = name.partition(".{")
            parts = inner.rstrip("}").split(",") if inner else [""]
            for part in parts:
                table[f"{stem}.{part}".rstrip(".")] = (int(layer), allowed)
    return table


TABLE = read_table()


def place(module):
    """The row of the table that a module (without ``sbr_jax.``) belongs to."""
    rows = [r for r in TABLE if module == r or module.startswith(r + ".")]
    return max(rows, key=len, default=None)


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if parts[0] == "sbr_jax":
        parts.pop(0)
    return ".".join(parts)


def sources():
    for folder in ("sbr_jax", "experiments", "tools", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def origin():
    """Where each public name of the package comes from."""
    names = {}
    tree = ast.parse((ROOT / "sbr_jax" / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.name: node.module.removeprefix("sbr_jax.") for a in node.names}
    return names


def own_imports(path):
    public = origin()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first in ("experiments", "tools", "benchmarks"):
            yield name
        elif first == "sbr_jax" and rest:
            yield public.get(rest, rest)


def test_the_table_is_read():
    assert TABLE["typing"] == (0, set())
    assert TABLE["transforms"] == (2, {0, 1})
    assert TABLE["training.loop"][0] == 5
    assert TABLE["training.pipeline"] == (6, {0, 1, 2, 3, 4, 5})


def test_imports_follow_the_table():
    faults = []
    for path in sources():
        module = module_name(path)
        mine = place(module)
        body = ast.parse(path.read_text()).body
        if module == "" or all(type(node) is ast.Expr for node in body):
            continue
        if mine is None:
            faults.append(f"{module} is in no row of docs/architecture.md")
            continue
        layer, may = TABLE[mine]
        for name in own_imports(path):
            theirs = place(name)
            if theirs is None or theirs == mine:
                continue
            inside = theirs.partition(".")[0] == mine.partition(".")[0]
            other = TABLE[theirs][0]
            if other > layer if inside else other not in may:
                faults.append(
                    f"{module} (layer {layer}) imports {name} (layer {other}); it may "
                    f"import {sorted(may)}"
                )
    assert not faults, "\n".join(faults)


def core_files():
    return [p for p in sources() if TABLE.get(place(module_name(p)), (9,))[0] <= 2]


def test_the_core_needs_nothing_but_jax_and_optax():
    known = CORE_MAY_IMPORT | {"sbr_jax"} | sys.stdlib_module_names
    faults = [
        f"{path.name} imports {name}"
        for path in core_files()
        for name in imports(path)
        if name.partition(".")[0] not in known
    ]
    assert not faults, "\n".join(faults)


def test_the_core_is_found():
    names = {module_name(p) for p in core_files()}
    assert {"typing", "subspace.record", "fisher", "transforms.recipes"} <= names
