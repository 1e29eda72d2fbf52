"""Record of the code that computed a variant and seed, beside its stages.

The file lies in ``stages/VARIANT/SEED``, so a copy of that folder includes it. If a run
was interrupted and continued with other code, the file has two hashes.
"""

import json
import pathlib

from sbr_jax import storage
from sbr_jax.files import parse_json, read_text
from sbr_jax.training.records import write_atomically
from sbr_jax.typing import UserError

NAME = "code.json"


def read(folder: pathlib.Path) -> list[str]:
    """Hashes of the code that computed the stages, in order of use; empty if unknown.

    ``folder`` belongs to one variant and seed.

    Raises:
      UserError: if the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return []
    remedy = "delete it, and the code counts as unknown"
    found = parse_json(read_text(path, remedy), str(path), remedy)
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise UserError(
            f"expected a list of hashes in {path}, got something else; it was damaged "
            f"after it was written: {remedy}"
        )
    return found


def add(folder: pathlib.Path, code: str) -> None:
    """Notes that this code computes a folder's stages from now on."""
    known = read(folder)
    if known[-1:] != [code]:
        storage.made(folder)
        write_atomically(folder / NAME, json.dumps([*known, code]) + "\n")
