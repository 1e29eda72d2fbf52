"""Command-line programs: ``sbr-jax run``, ``attack``, ``analyse``, ``sweep``, ...

``sbr-jax NAME ...`` is the same as ``python -m experiments.NAME ...`` in a clone.
"""

import importlib
import sys
from collections.abc import Sequence

PROGRAMS = {
    "run": "fine-tune over a sequence of domains and measure safety after each",
    "attack": "attack a model while it is fine-tuned or after it",
    "analyse": "ask whether the safety subspace is what it is taken for",
    "sweep": "a named list of runs, into one table",
    "report": "tables and figures of finished runs",
    "export": "the weights of one run as a PEFT adapter or a merged checkpoint",
    "attack-map": "where each defence breaks under poisoned runs",
    "realtext": "a small chat model trained from real text",
}
"""Name on the command line to what it does."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program that is named first and return its exit code."""
    from sbr_jax import errors
    from sbr_jax.programs import cli

    given = list(sys.argv[1:] if args is None else args)
    lines = [f"  {name:<11} {summary}" for name, summary in PROGRAMS.items()]
    usage = "\n".join(["usage: sbr-jax PROGRAM ...; sbr-jax PROGRAM --help", *lines])
    if given and given[0] in ("-h", "--help"):
        print(usage)
        return 0

    def choose() -> None:
        if not given:
            raise errors.unknown("program", "", PROGRAMS)
        errors.check_names("program", given[:1], PROGRAMS)

    if code := cli.guarded(choose, interrupted="interrupted"):
        return code
    name = given[0].replace("-", "_")
    return importlib.import_module(f"{__name__}.{name}").main(given[1:])
