"""Several commands one after the other, in the same pair of processes.

    python distributed_commands.py COMMANDS.json HOST:PORT,N,I|off

To start, to meet and to end costs more than a tiny job. The first command meets the
others, and the end is that of the last. `READ-I.json` beside the commands tells the
bytes of weights that were read, by file.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import conftest  # noqa: F401

# isort: split
import checkpoints
import few_items
import pytest

from sbr_jax import distributed
from sbr_jax.programs import hosts, main
from sbr_jax.studies import attacks


def once(stack):
    """`hosts.joined` that meets the others at the first call, until the stack ends."""
    real = hosts.joined

    def joined(arguments, words, folder=None):
        if distributed.current() is None:
            stack.enter_context(real(arguments, words, folder))
        return contextlib.nullcontext()

    return joined


def run(path, option):
    commands = json.loads(path.read_text())
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        few_items.keep_few(patch, 2)
        short = dataclasses.replace(attacks.ATTACKS["gcg"], domains=("medical",))
        patch.setitem(attacks.ATTACKS, "gcg", short)
        patch.setattr(hosts, "joined", once(stack))
        read = checkpoints.counting(patch, lambda x, name: str(x.places[name]))
        codes = [main([*words, "--distributed", option]) for words in commands]
        session = distributed.current()
        index = 0 if session is None else session.index
        (path.parent / f"read-{index}.json").write_text(json.dumps(read))
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(pathlib.Path(sys.argv[1]), sys.argv[2]))
