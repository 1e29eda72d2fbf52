"""Command-line programs: ``sbr-jax run``, ``attack``, ``analyse``, ``sweep``, ...

In a clone, ``python -m experiments.NAME ...`` is the same as ``sbr-jax NAME ...``. A
program raises UserError for the first mistake in its command line.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = {
    "tune": "fine-tune your chat model on your examples, and keep it safe",
    "align": "a model that refuses little, taught to refuse",
    "run": "fine-tune over a sequence of domains and measure safety after each",
    "attack": "attack a model while it is fine-tuned or after it",
    "analyse": "ask whether the safety subspace is what it is taken for",
    "sweep": "a named list of runs, into one table",
    "plan": "memory, hours and layout of a job on TPUs that are not there",
    "report": "tables and figures of finished runs",
    "export": "the weights of one run as a PEFT adapter or a merged checkpoint",
    "attack-map": "where each defence breaks under poisoned runs",
    "realtext": "a small chat model trained from real text",
    "smollm2": "a real chat model fetched, converted and taught to refuse",
}
"""Programs by command-line name, with what each does."""
OF_PRESETS = ("run", "attack", "analyse", "export")
"""Programs whose first word is a preset."""
ASKED = ("tyro", "flax")
"""Packages that every program loads; they come with the extra `experiments`."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program that the first word names and returns its exit code."""
    from sbr_jax.programs import cli

    given = list(sys.argv[1:] if args is None else args)
    lines = [f"  {name:<11} {summary}" for name, summary in PROGRAMS.items()]
    if given[:1] in (["-h"], ["--help"]):
        how = "usage: sbr-jax PROGRAM ...; sbr-jax PROGRAM --help"
        print("\n".join([how, *lines]))
        return 0
    if given[:1] and given[0] in OF_PRESETS and given[1:2] in (["-h"], ["--help"]):
        print(usage(given[0]))
        return 0
    if code := cli.guarded(lambda: _check(given), interrupted="interrupted"):
        return code
    name = given[0].replace("-", "_")
    return importlib.import_module(f"{__name__}.{name}").main(given[1:])


def usage(program: str) -> str:
    """The docstring of a program, which shows its usage; the program is not loaded."""
    file = Path(__file__).with_name(program.replace("-", "_") + ".py")
    text = ast.get_docstring(ast.parse(file.read_text("utf-8")), clean=False) or ""
    return text.replace("python -m ", "").replace("experiments.", "sbr-jax ")


def _check(words: Sequence[str]) -> None:
    """Refuses mistakes that show before the program is loaded."""
    from sbr_jax import errors, recipes
    from sbr_jax.typing import UserError

    errors.check_names("program", words[:1] or [""], PROGRAMS)
    if words[0] in OF_PRESETS and len(words) > 1 and not words[1].startswith("-"):
        errors.check_names("preset", words[1:2], recipes.MODULES)
    for package in ASKED:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"sbr-jax {words[0]}: expected the package {package}, found none: pip "
                "install 'sbr_jax[experiments]'"
            )
