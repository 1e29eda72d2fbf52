"""Hashes the code that decides a row's numbers.

The hash covers every definition that a run of the row can reach, from training, the
method and the study down to the losses, and the testbed's own files. It leaves out what
cannot change a finished row: comments, docstrings, layout, the place of a definition,
other methods, error messages, refusals (`if ...: raise UserError(...)`) and
:data:`BOOKKEEPING`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbr_jax import errors, recipes
from sbr_jax.methods import METHODS, resolve
from sbr_jax.provenance.source_tree import Symbol, Tree
from sbr_jax.studies import attacks
from sbr_jax.training import pipeline
from sbr_jax.typing import UserError

ROOT = Path(__file__).parents[2]
"""The folder that holds this package."""
ASSETS = "sbr_jax/testbed/assets"
"""Files of `testbed`'s model; each other edition has a folder beside this one."""
LENGTH = 10
TESTBED = "testbed"
BOOKKEEPING = (
    "sbr_jax.distributed",
    "sbr_jax.programs.cli",
    "sbr_jax.progress",
    "sbr_jax.storage",
    "sbr_jax.testbed.build",
    "sbr_jax.training.checkpoint",
    "sbr_jax.training.code_record",
    "sbr_jax.training.finite",
    "sbr_jax.training.locks",
    "sbr_jax.training.records",
    "sbr_jax.training.run_folder",
    "sbr_jax.training.stages",
    "sbr_jax.training.stage_records",
    "sbr_jax.training.summary",
    "sbr_jax.typing",
    "sbr_jax.checks",
    "sbr_jax.errors",
    "sbr_jax.methods._hyperparameters",
    "sbr_jax.methods.registry",
    "sbr_jax.recipes",
    "sbr_jax.settings",
    "sbr_jax.studies.attacks:ATTACKS",
)
"""Code that stores, refuses or looks up: it does not change a finished row's numbers.
The build of the testbed's model is not run again; the files that it made are hashed."""
SILENT = {"name", "summary", "notes", "methods", "seeds"}
SILENT |= {"hardware", "hyperparameters"}
"""Fields of presets and attacks that only choose variants or what to print."""


def code_hash(row: str, study: str = TESTBED) -> str:
    """The hash of the code that decides a row.

    Args:
        row: a key of `METHODS` or `VARIANTS`.
        study: a preset by its name, or `attack:NAME` for an attack on the testbed.

    Returns:
        Ten hexadecimal digits.
    """
    symbols, values = _entries(row, study)
    found = _tree().reached(symbols, BOOKKEEPING)
    # By name and code alone, so that a definition may move to another module.
    parts = sorted(f"{name} {code}" for (_, name), code in found.items())
    assets = _assets(ROOT) if study != "testbed-2" else _assets(ROOT, f"{ASSETS}_2")
    text = "\n".join([*parts, values, assets])
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def recorder(study: str) -> Callable[[str], str] | None:
    """The hash function for a run to record; None for a study made elsewhere."""
    try:
        _entries("plain", study)
    except UserError:
        return None
    return functools.partial(code_hash, study=study)


def decided_by(row: str, study: str = TESTBED) -> dict[Symbol, str]:
    """Every definition that decides a row, with a digest of its code."""
    return _tree().reached(_entries(row, study)[0], BOOKKEEPING)


@functools.cache
def _tree() -> Tree:
    return Tree(ROOT, "sbr_jax")


def _entries(row: str, study: str) -> tuple[list[Symbol], str]:
    """The definitions that a run starts from, and the values given to it."""
    symbols: list[Symbol] = []
    given: list[Any] = []
    kind, _, name = study.partition(":")
    if kind == "attack" and name:
        given += [_known("attack", name, attacks.ATTACKS), attacks.build]
        study = TESTBED
    _known("preset", study, recipes.MODULES)
    preset = recipes.load(study)
    method, options = resolve(row, preset.hyperparameters)
    given += [METHODS[method], vars(options), preset, pipeline.run]
    return symbols, repr(_described(given, symbols))


def _known(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise errors.unknown(kind, name, known)
    return known[name]


def _described(value: Any, symbols: list[Symbol]) -> Any:
    """A value as plain data; functions and classes become names and symbols."""
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        symbols.append((type(value).__module__, type(value).__qualname__))
        value = {name: getattr(value, name) for name in fields if name not in SILENT}
    if isinstance(value, Mapping):
        return {str(key): _described(x, symbols) for key, x in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_described(x, symbols) for x in value]
    if callable(value):
        name = value.__qualname__.split(".")[0]
        symbols.append((value.__module__, name))
        return name
    return repr(value)


@functools.cache
def _assets(root: Path, folder: str = ASSETS) -> str:
    """A digest of a testbed's own files."""
    found = hashlib.sha256()
    for path in sorted((root / folder).rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(root).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()
