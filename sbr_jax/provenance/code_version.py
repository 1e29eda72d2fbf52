"""A hash of the code that decides a row's numbers, read from a tree of sources.

What counts is every definition that a run of the row can reach, from training, the
method and the study down to the losses, and the shipped files of the testbed. What
cannot change a finished row does not: comments, docstrings, layout, other methods, the
text of errors, refusals (`if ...: raise UserError(...)`) and :data:`BOOKKEEPING`.
"""

import ast
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from sbr_jax.provenance.source_tree import Symbol, Tree, digest
from sbr_jax.typing import UserError

ROOT = Path(__file__).parents[1]
"""The tree that this file belongs to."""
PACKAGES = ("sbr_jax", "experiments")
REGISTRY = "sbr_jax.methods"
"""Where `METHODS` and `ABLATIONS` name a row's maker and hyper-parameters."""
ATTACKS = "sbr_jax.studies.attacks"
"""Where `ATTACKS` does so for an attack."""
BOOKKEEPING = (
    "sbr_jax.training.run_folder",
    "sbr_jax.training.stages",
    "sbr_jax.training.records",
    "sbr_jax.training.stage_records",
    "sbr_jax.training.finite",
    "sbr_jax.training.summary",
    "sbr_jax.training.checkpoint",
    "sbr_jax.typing",
    "sbr_jax.programs.cli",
    f"{REGISTRY}:METHODS",
    f"{REGISTRY}:ABLATIONS",
    f"{REGISTRY}:build",
    f"{ATTACKS}:ATTACKS",
    "sbr_jax.testbed.build",
)
"""What stores, refuses and looks up: a finished row's numbers pass through. The build
of the testbed's model is not run again, and the files that it made count."""
TRAINING = (
    ("sbr_jax.training.program", "make_program"),
    ("sbr_jax.training.pipeline", "run_group"),
    ("sbr_jax.training.pipeline", "evaluate_start"),
)
ASSETS = "sbr_jax/testbed/assets"
LENGTH = 10


def code_hash(row: str, study: str = "testbed", root: Path = ROOT) -> str:
    """The hash of the code that decides a row.

    Args:
        row: a key of `METHODS` or `ABLATIONS`.
        study: a preset by its name, or `attack:NAME` for an attack on the testbed.
        root: folder of `sbr_jax` and `experiments`, of this or another commit.

    Returns:
        Ten hexadecimal digits.

    Raises:
        UserError: for a row, a preset or an attack that the tree does not have.
    """
    parts = {f"{m}:{n}": code for (m, n), code in decided_by(row, study, root).items()}
    parts["assets"] = _assets(root)
    text = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def recorder(study: str) -> Callable[[str], str] | None:
    """The hash by row, for a run to record; None for a study made elsewhere.

    Args:
        study: as for :func:`code_hash`.
    """
    try:
        _study(_tree(ROOT), study)
    except UserError:
        return None
    return functools.partial(code_hash, study=study)


def decided_by(row: str, study: str, root: Path = ROOT) -> dict[Symbol, str]:
    """Every definition that decides a row, with a digest of its code."""
    tree = _tree(root)
    maker, options = _method(tree, row)
    study_parts, settings = _study(tree, study)
    found = tree.reached([*TRAINING, *study_parts, *maker], BOOKKEEPING)
    return {**found, ("row", "options"): options, ("study", "settings"): settings}


@functools.cache
def _tree(root: Path) -> Tree:
    return Tree(root, PACKAGES)


def _method(tree: Tree, row: str) -> tuple[list[Symbol], str]:
    """The maker of a row and what its options refer to; a digest of the options."""
    makers = _entries(tree, REGISTRY, "METHODS")
    options = _entries(tree, REGISTRY, "ABLATIONS")
    entry = options.get(row)
    if isinstance(entry, ast.Tuple) and isinstance(entry.elts[0], ast.Constant):
        maker = makers.get(str(entry.elts[0].value))
    else:
        entry, maker = None, makers.get(row)
    if maker is None:
        raise UserError(
            f"row {row}: expected one of {tree.root / 'sbr_jax'}, got none such"
        )
    found = list(tree.named(REGISTRY, maker))
    if entry is not None:
        found += tree.named(REGISTRY, entry)
    return found, "" if entry is None else digest([entry.elts[1]])


def _study(tree: Tree, study: str) -> tuple[list[Symbol], str]:
    """What makes a study and its settings; a digest of the preset's own."""
    kind, _, name = study.partition(":")
    if kind == "attack" and name:
        settings, own = _study(tree, "testbed")
        attack = _entries(tree, ATTACKS, "ATTACKS").get(name)
        if attack is None:
            raise UserError(
                f"attack {name}: expected one of {tree.root / 'experiments'}, got none "
                "such"
            )
        return [(ATTACKS, "build"), *settings, *tree.named(ATTACKS, attack)], own
    module = f"sbr_jax.recipes.{study.replace('-', '_')}"
    place = tree.module(module)
    if place is None:
        raise UserError(
            f"preset {study}: expected one of {tree.root / 'experiments'}, got none "
            "such"
        )
    own = [
        argument.value
        for statement in place.definitions.get("PRESET", [])
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        for argument in node.keywords
        if argument.arg in ("study", "settings", "options")
    ]
    named = [symbol for value in own for symbol in tree.named(module, value)]
    # A preset that only chooses other rows of the testbed takes all else from there.
    inherited = [] if named else _study(tree, "testbed")[0]
    return [*named, *inherited], digest(own)


def _entries(tree: Tree, module: str, table: str) -> dict[str, ast.expr]:
    """Values of a dictionary that a module defines, by key, as code."""
    place = tree.module(module)
    found: dict[str, ast.expr] = {}
    for statement in place.definitions.get(table, []) if place else []:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    found[str(key.value)] = entry
    return found


@functools.cache
def _assets(root: Path) -> str:
    """A digest of the testbed's shipped files."""
    found = hashlib.sha256()
    for path in sorted((root / ASSETS).rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(root).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()
