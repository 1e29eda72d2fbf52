"""Splitting a run into parts with their own folders, and gathering them again.

``FOLDER/jobs/N`` is a run of some variants and seeds of the run in ``FOLDER``. Several
processes can then work at once, each in a folder of its own. Stages are moved, not
copied, so each variant and seed lies in one place; only the start model's are copied.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Sequence

from sbr_jax import storage
from sbr_jax.storage import JOBS
from sbr_jax.training import locks
from sbr_jax.training.records import (
    DamagedError,
    again,
    read_json,
    write_atomically,
    writing,
)
from sbr_jax.training.run_folder import (
    PUBLISHED,
    RESTORE,
    RunFolder,
    read_config,
    refuse_foreign,
    run_of,
)
from sbr_jax.training.stage_records import BASE, RESULT, read_result
from sbr_jax.training.stages import EVALUATE, NAMES, last_of
from sbr_jax.typing import UserError

Pair = tuple[str, int]
"""A variant and a seed."""
CONFIG = "config.json"


def unfinished(
    folder: pathlib.Path, pairs: Sequence[Pair], domains: Sequence[str]
) -> list[Pair]:
    """The variants and seeds without a last evaluation, in order."""
    run, last = RunFolder(folder), last_of(len(domains))
    return [
        (variant, seed)
        for variant, seed in pairs
        if not (run.stage(variant, seed, last, NAMES[EVALUATE]) / RESULT).exists()
    ]


def hand_out(folder: pathlib.Path, part: str, pairs: Sequence[Pair]) -> pathlib.Path:
    """Moves the stages of some variants and seeds into the folder of a part.

    Returns:
      The part's folder.

    Raises:
      UserError: if it cannot be written, or holds other files.
    """
    own = folder / JOBS / part
    if not (own / CONFIG).exists():
        refuse_foreign(own, CONFIG, own=("stages",))
    config, run, base = folder / CONFIG, RunFolder(folder), f"stages/{BASE}"
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


def found(folder: pathlib.Path) -> list[pathlib.Path]:
    """The parts in a run's folder, in order; touches nothing.

    Raises:
        UserError: for a link, because its target does not belong to the run.
    """
    if not storage.has_parts(folder):
        return []
    parts = sorted(path.parent for path in (folder / JOBS).glob(f"*/{CONFIG}"))
    for place in (folder / JOBS, *parts):
        if place.is_symlink():
            raise UserError(
                f"{place} is a link: expected a folder, as its stages are moved to "
                f"{folder}; put there a copy of what it points to"
            )
    return parts


def gather(folder: pathlib.Path, order: Sequence[str] = ()) -> None:
    """Moves the stages of all parts into the run's folder, and deletes the parts.

    If a variant and seed has two copies, the one with more finished stages stays. Files
    in a part that no run wrote stay where they are.

    Args:
        folder: of the run.
        order: of variants in the joint files; see :meth:`RunFolder.lines`.

    Raises:
        UserError: for a part that another process works in or that has other settings;
            then no part is touched.
    """
    if not storage.has_parts(folder):
        return
    _require_one_run(folder)
    if not any(map(_is_ours, (folder / JOBS).iterdir())):
        return
    with locks.taken(folder), contextlib.ExitStack() as held:
        _require_one_run(folder)
        parts = found(folder)
        for part in parts:
            held.enter_context(locks.taken(part))
        with writing(folder):
            for part in parts:
                _take(folder, part)
            for path in list((folder / JOBS).iterdir()):
                _drop(path)
        with contextlib.suppress(OSError):  # Files that no run wrote may remain.
            (folder / JOBS).rmdir()
        _publish(folder, order)


def _publish(folder: pathlib.Path, order: Sequence[str]) -> None:
    """Writes the joint files if a variant and seed is finished, as every run does.

    Before that, the summary would take the longest unfinished one for complete.
    """
    if not (folder / CONFIG).exists():
        return
    last = f"{last_of(len(read_config(folder)['domains'])):02d}-{NAMES[EVALUATE]}"
    if any(folder.glob(f"stages/*/*/{last}/{RESULT}")):
        RunFolder(folder).publish(order)


def _require_one_run(folder: pathlib.Path) -> None:
    """Refuses parts that do not belong to the folder's run."""
    config = folder / CONFIG
    remedies = {config: f"{again(config)}, or {RESTORE}"} if config.exists() else {}
    for part in found(folder):
        remedies[part / CONFIG] = f"move {part} away"
    runs = {
        path.parent: run_of(read_json(path, remedy, sealed=True))
        for path, remedy in remedies.items()
    }
    for place, run in runs.items():
        first = next(iter(runs))
        if run != runs[first]:
            raise UserError(
                f"{place} belongs to a run with other settings than {first}: expected "
                "a part of it; move it away, or run the command that began it"
            )


def _take(folder: pathlib.Path, part: pathlib.Path) -> None:
    """Moves one part's stages, and its settings if the run has none."""
    config, run = folder / CONFIG, RunFolder(part).run
    if not config.exists():
        write_atomically(config, (part / config.name).read_text())
    for place in sorted((part / "stages").glob("*/*")):
        to = folder / place.relative_to(part)
        if _finished(to, run) < _finished(place, run):
            storage.remove(to)
        if not to.exists():
            _move(place, to)


def _finished(place: pathlib.Path, run: str) -> int:
    """How many stages of a variant and seed are finished and intact."""
    count = 0
    for path in place.glob(f"*/{RESULT}"):
        with contextlib.suppress(DamagedError):
            count += read_result(path.parent, run) is not None
    return count


def _is_ours(part: pathlib.Path) -> bool:
    """Whether a folder is a part, or the remains of one after a kill."""
    return (part / CONFIG).exists() or (part.name.isdigit() and _is_left(part))


def _is_left(part: pathlib.Path) -> bool:
    """Whether a folder holds nothing but what a kill leaves in a part."""
    files = (*PUBLISHED, CONFIG)
    left = {locks.NAME, *(f".{name}.tmp" for name in files)}
    return not part.is_symlink() and part.is_dir() and storage.names(part) <= left


def _drop(part: pathlib.Path) -> None:
    """Deletes the files that a run wrote in a part, its settings last.

    After a kill in between, the next command still recognises and deletes the part.
    """
    if not _is_ours(part):
        return
    storage.remove(part / "stages")
    for name in (*PUBLISHED, CONFIG):
        (part / name).unlink(missing_ok=True)
    if _is_left(part):
        storage.remove(part)


def _move(place: pathlib.Path, to: pathlib.Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    place.rename(to)
