"""A tiny job of two variants that is cheap to run many times, and told to go on.

One keeps an adapter, the other a state as well, which it also changes while it trains.
Everything is compiled once for all folders.
"""

import hashlib
import json
import pathlib
import re
import shlex
import shutil

import pytest
import tiny

from sbr_jax.training.pipeline import run
from sbr_jax.typing import UserError

VARIANTS = ("plain", "lisa")
STUDY = tiny.study()
LAST = "05-train"
"""The last stage that changes an adapter; its own begins from that of the first."""


def go(
    folder,
    variants=VARIANTS,
    *,
    seeds=(0,),
    study=STUDY,
    domains=None,
    options=None,
    start_first=True,
    **settings,
):
    fields = {"steps_per_domain": 2, "checkpoint_every": 1, **settings}
    config = tiny.with_options(tiny.config(**fields), options or {})
    order = {"start_first": start_first, "quiet": True}
    return run(study, variants, seeds, folder, config, domains, **order)


def results(folder):
    return (folder / "results.jsonl").read_bytes()


def read(folder):
    return [json.loads(line) for line in results(folder).splitlines()]


def refused(folder, *variants, **options):
    """The one line of a run that cannot go on, and what it says to delete."""
    with pytest.raises(UserError) as error:
        go(folder, *variants, **options)
    return str(error.value), remedies(error.value)


def remedies(error):
    said = str(error)
    assert "\n" not in said
    found = re.search(r"delete (.+?) and run the same command again", said)
    return [pathlib.Path(path) for path in shlex.split(found[1])] if found else []


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder):
    """A digest of all that a run could read."""
    whole = hashlib.sha256()
    for path in files(folder):
        whole.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return whole.digest()


def settle(folder, expected, known=(), **options):
    """Runs, and does what a refusal says, until the run gives what is expected.

    Args:
      folder: of a run.
      expected: bytes of ``results.jsonl``.
      known: contents of a folder from which a run was seen to give just that; these
        are added to.
      options: of the run.

    Returns:
      The refusals.
    """
    said, passed = [], []
    while (state := content(folder)) not in known:
        assert len(said) < 4, f"never done: {said}"
        passed.append(state)
        try:
            go(folder, **options)
        except UserError as error:
            said.append(str(error))
            paths = remedies(error)
            if not paths or not all(folder in path.parents for path in paths):
                pytest.fail(f"no way out: {error}")
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            assert results(folder) == expected, said
            break
    if passed and known != ():
        known.update(passed)
    return said
