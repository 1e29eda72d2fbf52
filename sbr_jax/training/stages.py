"""The stages of one variant and seed on disk: their names and checkpoints.

Each stage is done once. Its folder holds the checkpoints that it changed (``adapter``,
``state``); ``result.json`` is written last. The current checkpoint lies in the stage
that changed it last, as the records say. Finishing a stage deletes older checkpoints.

Stages of domain i (from 0), after stage 0 (the method's ``init``): 4i+1 train, 4i+2
repair (monitored variants), 4i+3 subspace (``end_domain``), 4i+4 evaluate.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax import distributed, storage
from sbr_jax.training import checkpoint, snapshot
from sbr_jax.training.records import DamagedError, writing
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import (
    HISTORY,
    PARTIAL,
    Line,
    read_result,
    redo,
    require_intact,
    write_history,
    write_result,
)
from sbr_jax.typing import PyTree, UserError

TRAIN, REPAIR, SUBSPACE, EVALUATE = 1, 2, 3, 4
WHOLE, SPLIT = "tree", "split"
"""Folders of a checkpoint inside a stage: for arrays whole on every device, and split
ones."""
KEPT = 2
"""Number of checkpoints kept inside a stage, in case the newest is damaged."""
NAMES = {TRAIN: "train", REPAIR: "repair", SUBSPACE: "subspace", EVALUATE: "evaluate"}


def number_of(domain: int, kind: int) -> int:
    """The number of a domain's stage of one kind; domains count from 0.

    >>> number_of(0, TRAIN), number_of(1, EVALUATE)
    (1, 8)
    """
    return len(NAMES) * domain + kind


def last_of(domains: int) -> int:
    """The number of the last stage for a number of domains."""
    return number_of(domains - 1, EVALUATE)


def name_of(number: int) -> str:
    """The name of a stage; stage 0 makes the first subspace.

    >>> name_of(0), name_of(1), name_of(8)
    ('subspace', 'train', 'evaluate')
    """
    return NAMES[SUBSPACE if number == 0 else (number - 1) % len(NAMES) + 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The stages of one variant and seed.

    Attributes:
      folder: of the run.
      variant: its name.
      seed: of the variant.
      domains: number of domains.
      monitored: whether domains have a repair stage.
    """

    folder: RunFolder
    variant: str
    seed: int
    domains: int
    monitored: bool
    _records: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _writer: snapshot.Writer = dataclasses.field(default_factory=snapshot.Writer)

    @property
    def kinds(self) -> list[int]:
        """Kinds of a domain's stages, in order."""
        return [kind for kind in NAMES if kind != REPAIR or self.monitored]

    @property
    def numbers(self) -> list[int]:
        """Numbers of all stages, in order."""
        domains, kinds = range(self.domains), self.kinds
        return [0, *(number_of(i, kind) for i in domains for kind in kinds)]

    def path(self, number: int) -> Path:
        """The stage's folder."""
        return self.folder.stage(self.variant, self.seed, number, name_of(number))

    def record(self, number: int) -> dict[str, Any] | None:
        """The stage's record, or None before it is finished."""
        if number not in self._records:
            path, run = self.path(number), self.folder.run
            found = distributed.decide(lambda: read_result(path, run))
            if found is None:
                return None
            self._records[number] = found
        return self._records[number]

    def finished(self, number: int) -> bool:
        """Whether the stage has a result."""
        return self.record(number) is not None

    def holder(self, what: str, before: int) -> Path | None:
        """The last stage before ``before`` that changed a checkpoint, if any."""
        for number in reversed([n for n in self.numbers if n < before]):
            record = self.record(number)
            if record is not None and what in record["files"]:
                return self.path(number)
        return None

    # --- refusals -------------------------------------------------------------------

    def require_usable(self) -> None:
        """Refuses, before any work, stages that cannot be continued.

        Raises:
          DamagedError: if a checkpoint for the first unfinished stage is damaged.
        """
        left = next((n for n in self.numbers if not self.finished(n)), None)
        for what in ("adapter", "state"):
            holder = None if left is None else self.holder(what, left)
            if holder is not None:
                self._require_intact(holder / what)

    def require_complete(self) -> None:
        """Refuses to call a seed done if one of its stages has since gone.

        Raises:
          DamagedError: naming the stage.
        """
        self._records.clear()
        self.require_finished(self.numbers)

    def require_finished(self, numbers: Iterable[int]) -> None:
        """Refuses to continue if one of these stages is not finished.

        Raises:
          DamagedError: naming the first that is missing.
        """
        for number in numbers:
            if not self.finished(number):
                path = self.path(number)
                reason = f"expected a finished stage in {path}, found none"
                raise DamagedError(reason, redo(path))

    # --- reading and writing --------------------------------------------------------

    def _require_intact(self, path: Path) -> None:
        distributed.decide(lambda: require_intact(path, self.folder.run))

    def restore(self, path: Path, like: PyTree) -> PyTree:
        """Reads a checkpoint back; refuses one that has changed."""
        self._require_intact(path)
        return checkpoint.restore(path, like)

    def save(self, number: int, changed: Mapping[str, PyTree]) -> None:
        """Writes what a stage changed, without marking it as finished."""
        self._write(self.path(number), changed)

    def _write(self, path: Path, trees: Mapping[str, PyTree]) -> None:
        self.folder.require_held()
        distributed.decide(lambda: _make(path))
        for name, tree in trees.items():
            checkpoint.save(path / name, tree)

    def finish(
        self, number: int, line: Line, timing: Mapping[str, Any], changed: Sequence[str]
    ) -> None:
        """Marks a stage as finished and deletes the checkpoints that it replaces."""
        path, run = self.path(number), self.folder.run

        def write() -> dict[str, Any]:
            record = write_result(path, run, line, timing, tuple(changed))
            for name in changed:
                for older in range(number):
                    storage.remove(self.path(older) / name)
            _drop(path.glob(f"{PARTIAL}*"))
            return record

        self._records[number] = distributed.decide(write)

    # --- inside a stage -------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Finishes the checkpoint being written, however the block ends.

        Raises:
          UserError: if it cannot be written, and nothing else went wrong.
        """
        try:
            yield
        except distributed.Terminated:
            self._settle()  # The program then reports that the run saved itself.
            raise
        except BaseException:
            with contextlib.suppress(UserError):
                self._writer.wait()
            raise
        self._settle()

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written."""
        distributed.decide(self._writer.wait)

    def save_partial(
        self,
        number: int,
        step: int,
        found: Mapping[str, Any],
        history: Mapping[str, Any],
    ) -> None:
        """Begins to write a checkpoint inside a stage, within :meth:`writing`.

        Once it is complete, older ones are deleted, all but the newest. All processes
        write split arrays immediately; a thread of the first process writes the rest.

        Args:
          number: of the stage.
          step: number of steps done.
          found: arrays by name.
          history: metrics up to this step.
        """
        path = self.path(number) / f"{PARTIAL}{step:08d}"
        self._settle()
        self._write(path, {})
        whole, split = snapshot.apart(found)
        if split:
            checkpoint.save(path / SPLIT, split)
        if distributed.is_first():
            names = (WHOLE, SPLIT) if split else (WHOLE,)
            content = {"step": step, "history": history, "split": sorted(split)}
            self._writer.start(lambda: self._complete(path, whole, content, names))

    def _complete(
        self,
        path: Path,
        whole: Mapping[str, Any],
        content: Mapping[str, Any],
        names: tuple[str, ...],
    ) -> None:
        snapshot.write(path / WHOLE, whole)
        write_history(path, self.folder.run, content, names)
        there = sorted(path.parent.glob(f"{PARTIAL}*"))
        kept = [x for x in there if x <= path][-KEPT:]
        _drop(x for x in there if x not in kept)

    def partial(
        self, number: int, like: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest intact checkpoint inside a stage: its arrays and its record.

        ``like`` holds arrays by name, of the dtypes and placement to read.

        Raises:
          DamagedError: if all of them are damaged.
        """
        folder = self.path(number)
        newest = distributed.decide(lambda: _newest(folder, self.folder.run))
        if newest is None:
            return None
        path, record = folder / newest[0], newest[1]
        found: dict[str, Any] = {**snapshot.read(path / WHOLE, like)}
        if split := record["split"]:
            found |= checkpoint.restore(
                path / SPLIT, {name: like[name] for name in split}
            )
        return found, record


def _newest(folder: Path, run: str) -> tuple[str, dict[str, Any]] | None:
    damaged: list[DamagedError] = []
    for path in sorted(folder.glob(f"{PARTIAL}*"), reverse=True):
        try:
            record = read_result(path, run, HISTORY)
            if record is None:
                continue
            for name in record["files"]:
                require_intact(path / name, run)
        except DamagedError as error:
            damaged.append(error)
            continue
        for error in damaged:
            warnings.warn(
                f"{error.reason}: going on from step {record['step']}", stacklevel=2
            )
        return path.name, record
    if damaged:
        raise damaged[0]
    return None


def _make(path: Path) -> None:
    with writing(path):
        storage.made(path)


def _drop(paths: Iterable[Path]) -> None:
    for path in paths:
        storage.remove(path)
