"""The stages of a run on disk: naming, loading what is finished, finishing the next.

A stage is done once: its folder holds what changed (``adapter``, ``state``) and, last,
``result.json``. Before the next stage is computed, what the finished ones left is
loaded, each checkpoint from the stage that changed it last, as the records say; without
it nothing is computed. Older checkpoints go when a newer stage is finished.

Stages of domain i (from 0), after stage 0 (the method's ``init``): 4i+1 train, 4i+2
repair (monitored rows), 4i+3 subspace (``end_domain``), 4i+4 evaluate.
"""

import functools
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.methods.base import as_aligned
from sbr_jax.training import checkpoint, sharding
from sbr_jax.training.config import Config
from sbr_jax.training.finite import require_finite, require_finite_base
from sbr_jax.training.program import Program, init_adapter
from sbr_jax.training.records import DamagedError, writing
from sbr_jax.training.results import Workdir
from sbr_jax.training.stage_records import (
    PARTIAL,
    read_result,
    redo,
    require_intact,
    write_result,
)
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree

TRAIN, REPAIR, SUBSPACE, EVALUATE = 1, 2, 3, 4
NAMES = {TRAIN: "train", REPAIR: "repair", SUBSPACE: "subspace", EVALUATE: "evaluate"}
SHOWN = ("final_loss", "composite", "blocks")


class Stages:
    """The stages of one method with one seed: where they are, what they hold."""

    def __init__(
        self,
        program: Program,
        study: Study,
        base: PyTree,
        config: Config,
        seed: int,
        domains: tuple[str, ...],
        workdir: Workdir,
        start_score: float | None,
        *,
        quiet: bool,
        say: Callable[[str], None],
    ):
        """Names everything; nothing is loaded or computed.

        Args:
          program: the row's.
          study: what to run over.
          base: frozen weights, placed.
          config: of the run.
          seed: of adapter, data order and dropout.
          domains: in order.
          workdir: where stages go.
          start_score: s_0 of the monitor, None without a probe.
          quiet: no progress bars.
          say: called with a line after each stage.
        """
        self.program, self.study, self._aligned = program, study, base
        self.config, self.seed, self.domains = config, seed, domains
        self.workdir, self.start_score = workdir, start_score
        self.quiet, self.say = quiet, say
        self.method = program.method
        self._loaded = -1  # The last stage whose result is in memory.
        self._records: dict[int, dict[str, Any]] = {}
        self.adapter: PyTree = None
        self.state: dict[str, Any] = {}

    @functools.cached_property
    def base(self) -> PyTree:
        """Frozen weights: the study's, or what the method prepared from them.

        Computed again after a kill, from the same key: cheaper than a checkpoint of
        all weights, and the same bits.
        """
        if self.method.prepare is as_aligned:
            return self._aligned
        model, mesh = self.study.model, self.program.mesh
        adapter = self._first_adapter()
        base = self.method.prepare(
            self.program.problem, self._aligned, adapter, self.key(6)
        )
        require_finite_base(base, f"{self.name}, prepared base weights")
        return sharding.place_base(mesh, base, model.config)

    def _first_adapter(self) -> PyTree:
        adapter = init_adapter(self.study, self.config, self.seed)
        return sharding.place_like_adapter(self.program.mesh, adapter, adapter)

    # --- what there is --------------------------------------------------------------

    @property
    def monitored(self) -> bool:
        """Whether the monitor runs."""
        return self.method.monitored and self.study.probe is not None

    def number(self, index: int, kind: int) -> int:
        """The stage's number."""
        return 4 * index + kind

    @property
    def numbers(self) -> list[int]:
        """Those of all stages of this row, in order."""
        kinds = [kind for kind in NAMES if kind != REPAIR or self.monitored]
        every = range(len(self.domains))
        return [0, *(self.number(index, kind) for index in every for kind in kinds)]

    def folder(self, number: int) -> Path:
        """The stage's folder."""
        stage = "subspace" if number == 0 else NAMES[(number - 1) % 4 + 1]
        return self.workdir.stage(self.method.name, self.seed, number, stage)

    def finished(self, number: int) -> bool:
        """Whether the stage has a result."""
        return self.record(number) is not None

    def record(self, number: int) -> dict[str, Any] | None:
        """The stage's record, or None before it is finished.

        Raises:
          DamagedError: if it is damaged, of another run or another place.
        """
        if number not in self._records:
            found = read_result(self.folder(number), self.workdir.run)
            if found is None:
                return None
            self._records[number] = found
        return self._records[number]

    def require_usable(self) -> None:
        """Refuses, before any work, stages that cannot be continued.

        Raises:
          DamagedError: where what the first unfinished stage begins with is missing or
            damaged.
        """
        left = next((n for n in self.numbers if not self.finished(n)), None)
        for what in ("adapter", "state"):
            holder = None if left is None else self._holder(what, left)
            if holder is not None:
                require_intact(self.folder(holder) / what, self.workdir.run)

    def require_complete(self) -> None:
        """Refuses to call a row and seed done of which something has gone since.

        Raises:
          DamagedError: naming the stage.
        """
        self._records.clear()
        self._require_finished(self.numbers)

    def _require_finished(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not self.finished(number):
                raise DamagedError(
                    f"expected a finished stage in {self.folder(number)}, found none",
                    redo(self.folder(number)),
                )

    def key(self, purpose: int, name: str = "") -> jax.Array:
        """A key of this seed for one purpose (and one domain, by its name)."""
        root = jax.random.fold_in(jax.random.key(self.seed), purpose)
        return jax.random.fold_in(root, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def data_seed(self, name: str) -> int:
        """Seed of a data order: of this seed and a name."""
        return zlib.crc32(f"{self.seed}/{name}".encode()) & 0x7FFFFFFF

    @property
    def name(self) -> str:
        """How messages name this row and seed."""
        return f"{self.method.name}, seed {self.seed}"

    def where(self, domain: str | None) -> str:
        """How messages name a domain of it."""
        return self.name if domain is None else f"{self.name}, domain {domain}"

    # --- loading and saving ---------------------------------------------------------

    def load(self, before: int) -> None:
        """Brings adapter and state as the stages before ``before`` left them.

        Raises:
          DamagedError: where one of them, or what it left, is missing or damaged.
        """
        self._require_finished(n for n in self.numbers if n < before)
        last = max((n for n in self.numbers if n < before), default=-1)
        if self._loaded == last and self.adapter is not None:
            return
        self.adapter = adapter = self._first_adapter()
        self.state = {}
        self._loaded = last
        if last < 0:
            return
        # The structure of the state is the method's: computed again, then filled.
        state = self._init_state(adapter)
        state.pop("diagnostics", None)
        self.adapter = self._latest("adapter", before, self.adapter)
        self.state = self._latest("state", before, state)

    def _latest(self, what: str, before: int, like: PyTree) -> PyTree:
        holder = self._holder(what, before)
        if holder is None:
            return like
        return self.restore(self.folder(holder) / what, like)

    def _holder(self, what: str, before: int) -> int | None:
        """The last stage that changed the adapter or the state; None for none."""
        for number in reversed([n for n in self.numbers if n < before]):
            record = self.record(number)
            if record is not None and what in record["files"]:
                return number
        return None

    def restore(self, folder: Path, like: PyTree) -> PyTree:
        """Reads a checkpoint back, placed as ``like`` is.

        Raises:
          DamagedError: if it is not as its stage left it.
        """
        require_intact(folder, self.workdir.run)
        found = checkpoint.restore(folder, like)
        if self.program.mesh is None:
            # Uncommitted, as freshly computed arrays are: the same compiled program.
            found = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found)
        return found

    def _init_state(self, adapter: PyTree) -> dict[str, Any]:
        method, problem = self.method, self.program.problem
        return dict(method.init(problem, self.base, adapter, self.key(1)))

    def finish(
        self,
        number: int,
        domain: str | None,
        index: int,
        metrics: Mapping[str, Any],
        *,
        began: float,
        adapter: PyTree = None,
        state: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        **timing: Any,
    ) -> None:
        """Saves what changed, marks the stage as finished, drops what it replaces.

        Raises:
          UserError: for weights that are not finite, and where nothing can be written.
        """
        folder = self.folder(number)
        stage = folder.name.split("-", 1)[1]
        changed = {}
        if adapter is not None:
            changed["adapter"] = self.adapter = adapter
        if state is not None:
            changed["state"] = self.state = dict(state)
        for name, tree in changed.items():
            require_finite(tree, f"{self.where(domain)}, {name} after {stage}")
        self.workdir.require_held()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, tree in changed.items():
            checkpoint.save(folder / name, tree)
        seconds = time.perf_counter() - began
        self._records[number] = write_result(
            folder,
            run=self.workdir.run,
            method=self.method.name,
            seed=self.seed,
            stage=stage,
            domain=domain,
            index=index,
            metrics=metrics,
            diagnostics=jax.device_get(diagnostics),
            timing={"seconds": seconds, **timing},
            checkpoints=tuple(changed),
        )
        self._loaded = number
        for name in changed:
            for older in range(number):
                shutil.rmtree(self.folder(older) / name, ignore_errors=True)
        for partial in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        shown = ", ".join(
            f"{k} {metrics[k]:.4g}"
            for k in SHOWN
            if isinstance(metrics.get(k), (int, float))
        )
        place = "start" if domain is None else domain
        self.say(
            f"{self.method.name}  seed {self.seed}  {place}  {stage}  "
            f"{seconds:.1f} s  {shown}".rstrip()
        )
