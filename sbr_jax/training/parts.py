"""Parts of a run in folders of their own, and the one folder they become.

``FOLDER/jobs/N`` is a run of some variants and seeds of the run in ``FOLDER``: so
several processes can work at once, each in a folder that it holds alone. Stages are
moved, never copied but for the start model's: a variant and seed lies in one place.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Sequence

from sbr_jax import storage
from sbr_jax.storage import JOBS
from sbr_jax.training import locks
from sbr_jax.training.records import write_atomically, writing
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import BASE, RESULT
from sbr_jax.training.stages import EVALUATE, NAMES
from sbr_jax.typing import UserError

Pair = tuple[str, int]
"""A variant and a seed."""


def unfinished(
    folder: pathlib.Path, pairs: Sequence[Pair], domains: Sequence[str]
) -> list[Pair]:
    """The variants and seeds without a last evaluation, in order."""
    run, last = RunFolder(folder), 4 * (len(domains) - 1) + EVALUATE
    return [
        (variant, seed)
        for variant, seed in pairs
        if not (run.stage(variant, seed, last, NAMES[EVALUATE]) / RESULT).exists()
    ]


def hand_out(folder: pathlib.Path, part: str, pairs: Sequence[Pair]) -> pathlib.Path:
    """Moves what there is of some variants and seeds into the folder of a part.

    Args:
        folder: of the run.
        part: name of the part.
        pairs: that it is to do.

    Returns:
        The part's folder.
    """
    own = folder / JOBS / part
    config, run, base = folder / "config.json", RunFolder(folder), f"stages/{BASE}"
    with writing(own):
        own.mkdir(parents=True, exist_ok=True)
        if config.exists():
            write_atomically(own / config.name, config.read_text())
        if (folder / base).exists():
            shutil.copytree(folder / base, own / base, dirs_exist_ok=True)
        for variant, seed in pairs:
            place = run.stage(variant, seed, 0, "any").parent
            if place.exists():
                _move(place, own / place.relative_to(folder))
    return own


def gather(folder: pathlib.Path) -> None:
    """Moves the stages of all parts into the run's folder, and drops the parts.

    Of two copies of a variant and seed the one with more finished stages stays.

    Raises:
        UserError: for a part that another process works in, or one of a run with other
            settings.
    """
    if not storage.has_parts(folder):
        return
    with locks.taken(folder):
        for config in sorted((folder / JOBS).glob("*/config.json")):
            with locks.taken(config.parent), writing(folder):
                _take(folder, config.parent)
            storage.remove(config.parent)
        with contextlib.suppress(OSError):  # There is more, which is none of ours.
            (folder / JOBS).rmdir()


def _take(folder: pathlib.Path, part: pathlib.Path) -> None:
    """Moves one part's stages, and its settings where the run has none."""
    config, run = folder / "config.json", RunFolder(part).run
    if not config.exists():
        write_atomically(config, (part / config.name).read_text())
    if run != RunFolder(folder).run:
        raise UserError(
            f"{part} belongs to a run with other settings than {folder}: expected a "
            "part of it; move it away, or run the command that began it"
        )
    for place in sorted((part / "stages").glob("*/*")):
        to = folder / place.relative_to(part)
        if _finished(to) < _finished(place):
            storage.remove(to)
        if not to.exists():
            _move(place, to)


def _finished(place: pathlib.Path) -> int:
    return len(list(place.glob(f"*/{RESULT}")))


def _move(place: pathlib.Path, to: pathlib.Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    place.rename(to)
