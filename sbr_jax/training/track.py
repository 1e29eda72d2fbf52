"""One variant with one seed: its keys and data, and its weights in memory and on disk.

A track goes through its turns, one for each domain. A turn gets its weights in memory
from the turn before, or else loads them from the stage that changed them last, as the
records say.
"""

import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import distributed
from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.data.layout import Layout, arrange, choose
from sbr_jax.distributed import arrays
from sbr_jax.methods.base import Method, as_aligned
from sbr_jax.progress import task
from sbr_jax.training import sharding
from sbr_jax.training.config import Config
from sbr_jax.training.finite import require_finite
from sbr_jax.training.program import Program, init_adapter, make_program
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import Line
from sbr_jax.training.stages import Stages, name_of, number_of
from sbr_jax.training.streams import Stream, key_of
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree

SHOWN = ("final_loss", "composite", "blocks")


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What all variants and seeds of a run share.

    Attributes:
      study: model, domains and evaluations.
      config: of the run.
      domains: names, in order.
      base: the aligned weights, placed.
      folder: of the run.
      start_score: gives s_0 of the monitor, or None without a probe, and measures the
        aligned model if that was not yet done.
      quiet: print no progress bars and no lines.
    """

    study: Study
    config: Config
    domains: tuple[str, ...]
    base: PyTree
    folder: RunFolder
    start_score: Callable[[], float | None] = lambda: None
    quiet: bool = False

    def say(self, line: str) -> None:
        """Reports a finished stage."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """A variant with one seed.

    Attributes:
      job: shared with all other tracks.
      program: of the variant.
      seed: of adapter, data order and dropout.
    """

    job: Job
    program: Program
    seed: int

    @property
    def method(self) -> Method:
        """The variant's hooks."""
        return self.program.method

    @property
    def name(self) -> str:
        """Variant and seed, for messages."""
        return f"{self.method.name}, seed {self.seed}"

    @functools.cached_property
    def stages(self) -> Stages:
        """Its stages on disk."""
        job, method = self.job, self.method
        monitored = method.monitored and job.study.probe is not None
        return Stages(
            job.folder, method.name, self.seed, len(job.domains), monitored=monitored
        )

    @functools.cached_property
    def base(self) -> PyTree:
        """Frozen weights: the study's, or those the method prepared from them.

        After a kill they are computed again from the same key. This gives the same bits
        and is cheaper than a checkpoint of all weights.
        """
        aligned, method = self.job.base, self.method
        if method.prepare is as_aligned:
            return aligned
        problem, adapter = self.program.problem, self.first_adapter()
        base = method.prepare(problem, aligned, adapter, self.key(Stream.PREPARE))
        require_finite(base, f"{self.name}, prepared base weights")
        return sharding.place_base(self.program.mesh, base, self.job.study.model.config)

    def first_adapter(self) -> PyTree:
        """The adapter that the track starts from, placed."""
        adapter = init_adapter(self.job.study, self.job.config, self.seed)
        return sharding.place_state(self.program.mesh, adapter)

    def key(self, stream: Stream, name: str = "") -> jax.Array:
        """A key of this seed for one stream, and for one domain if it is named."""
        root = key_of(self.seed, stream)
        return jax.random.fold_in(root, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def data_seed(self, name: str) -> int:
        """Seed of a data order, made from this seed and a name."""
        return zlib.crc32(f"{self.seed}/{name}".encode()) & 0x7FFFFFFF

    def batches(
        self, dataset: TokenDataset, name: str, *, packed: bool = True
    ) -> Callable[[int], Mapping[str, Any]]:
        """A function from step number to batch, laid out and placed on the mesh."""
        draw, layout = self.draws(dataset, name), self.layout(dataset, packed)
        mesh = self.program.mesh

        def at(step: int) -> Mapping[str, Any]:
            return sharding.place_batch(mesh, arrange([draw(step)], layout)[0])

        return at

    def draws(
        self, dataset: TokenDataset, name: str
    ) -> Callable[[int], Mapping[str, Any]]:
        """A function from step number to examples on the host."""
        seed, size = self.data_seed(name), self.job.config.training.batch_size
        return lambda step: batch(dataset, size, seed, step)

    def layout(self, dataset: TokenDataset, packed: bool = True) -> Layout:
        """The batch layout for a data set's steps."""
        hardware, mesh = self.job.config.hardware, self.program.mesh
        return choose(
            dataset,
            self.job.config.training.batch_size,
            packing=hardware.packing if packed else "no",
            parts=hardware.accumulation,
            rows=sharding.row_parts(mesh),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A track in one domain; index −1 is the time before the first.

    Attributes:
      track: that this turn belongs to.
      index: of the domain.
      begun: result of :meth:`begin`; empty before.
    """

    track: Track
    index: int
    begun: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def domain(self) -> str:
        """The domain's name; empty before the first."""
        return "" if self.index < 0 else self.track.job.domains[self.index]

    @property
    def where(self) -> str:
        """Variant, seed and domain, for messages."""
        name = self.track.name
        return f"{name}, domain {self.domain}" if self.domain else name

    def number(self, kind: int) -> int:
        """The number of this turn's stage of one kind."""
        return number_of(self.index, kind)

    @property
    def program(self) -> Program:
        """The variant's program for the domain's number of steps."""
        job, own = self.track.job, self.track.job.study.domains[self.domain].steps
        if own in (None, job.config.training.steps_per_domain):
            return self.track.program
        training = dataclasses.replace(job.config.training, steps_per_domain=own)
        config = dataclasses.replace(job.config, training=training)
        return make_program(self.track.method.name, job.study, config)

    def begin(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Makes the ``examples`` to train on, and ``metrics`` about making them.

        The method mixes its own examples into the domain's and may then change them.
        This is done once: a method may ask a judge, or the model, about every example.

        Args:
          state: the method's state, before or after the domain.
        """
        if not self.begun:
            track, method, problem = self.track, self.track.method, self.program.problem
            own = track.job.study.domains[self.domain].train
            seed = track.data_seed(f"{self.domain}/mix")
            mixed = method.mix(problem, own, seed)
            key = track.key(Stream.BEGIN_DOMAIN, self.domain)
            made = method.begin_domain(problem, track.base, state, mixed, key)
            self.begun.update(zip(("examples", "metrics"), made, strict=True))
        return self.begun

    def examples(self, state: Mapping[str, Any]) -> TokenDataset:
        """The examples to train on; see :meth:`begin`."""
        return self.begin(state)["examples"]


@dataclasses.dataclass(frozen=True)
class Held:
    """Weights in memory.

    Attributes:
      adapter: as trained.
      state: the method's state.
      after: number of the stage that they come from; −1 for none.
    """

    adapter: PyTree
    state: dict[str, Any]
    after: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage computed.

    Attributes:
      metrics: numbers.
      adapter: None if unchanged.
      state: the method's state; None if unchanged.
      diagnostics: trees of small arrays.
      timing: seconds.
    """

    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: PyTree = None
    state: Mapping[str, Any] | None = None
    diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timing: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def once(
    turn: Turn, number: int, compute: Callable[[Turn, Held], Outcome], held: Held | None
) -> Held | None:
    """Does a stage, unless it is finished already.

    Returns:
      The weights after it; ``held`` if it was finished already.

    Raises:
      Terminated: before the stage, if SIGTERM asks several processes to stop.
    """
    if turn.track.stages.finished(number):
        return held
    if distributed.should_stop():
        raise distributed.Terminated
    began = time.perf_counter()
    with task(f"{turn.where}, {name_of(number)}"):
        held = load(turn.track, number, held)
        outcome = compute(turn, held)
    return finish(turn, number, held, outcome, began)


def load(track: Track, before: int, held: Held | None = None) -> Held:
    """The weights after all stages before a number; ``held`` if it already is them.

    Raises:
      DamagedError: if one of the stages or checkpoints is missing or damaged.
    """
    stages = track.stages
    numbers = [n for n in stages.numbers if n < before]
    stages.require_finished(numbers)
    last = max(numbers, default=-1)
    if held is not None and held.after == last:
        return held
    adapter = track.first_adapter()
    if last < 0:
        return Held(adapter, {}, last)
    found: dict[str, Any] = {"adapter": adapter, "state": {}}
    for what in found:
        holder = stages.holder(what, before)
        if holder is not None:
            like = adapter if what == "adapter" else state_outline(track, adapter)
            found[what] = restore(track, holder / what, like)
    return Held(found["adapter"], found["state"], last)


def init_state(track: Track, adapter: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's first state, and its diagnostics."""
    problem, key = track.program.problem, track.key(Stream.INIT)
    state = dict(track.method.init(problem, track.base, adapter, key))
    diagnostics = state.pop("diagnostics", {})
    mesh = track.program.mesh
    state = sharding.place_state(mesh, state, track.base)
    return state, sharding.place_state(mesh, diagnostics)


def state_outline(track: Track, adapter: PyTree) -> dict[str, Any]:
    """Shapes and shardings of the method's state; computes nothing."""
    mesh = track.program.mesh
    found = track.method.state_shapes(track.program.problem, track.base, adapter)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return sharding.shapes(found, jax.tree.map(lambda x: place, found))
    return sharding.shapes(found, sharding.state_shardings(mesh, found, track.base))


def restore(track: Track, path: Path, like: PyTree) -> PyTree:
    """Reads a checkpoint back, placed like ``like``."""
    found = track.stages.restore(path, like)
    if track.program.mesh is None:
        # Uncommitted, like freshly computed arrays, to share their compiled program.
        found = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found)
    return found


def finish(turn: Turn, number: int, held: Held, outcome: Outcome, began: float) -> Held:
    """Saves what a stage changed, and marks the stage as finished.

    ``held`` holds the weights before the stage; ``began`` is a time of
    ``time.perf_counter``.

    Returns:
      The weights after it.

    Raises:
      UserError: if weights are not finite or cannot be written.
    """
    track, stages = turn.track, turn.track.stages
    stage = name_of(number)
    changed = {}
    if outcome.adapter is not None:
        changed["adapter"] = outcome.adapter
    if outcome.state is not None:
        changed["state"] = dict(outcome.state)
    for name, tree in changed.items():
        require_finite(tree, f"{turn.where}, {name} after {stage}")
    stages.save(number, changed)
    seconds = time.perf_counter() - began
    line = Line(
        track.method.name,
        track.seed,
        stage,
        turn.domain or None,
        turn.index,
        dict(outcome.metrics),
        arrays.fetch(dict(outcome.diagnostics)),
    )
    stages.finish(number, line, {"seconds": seconds, **outcome.timing}, list(changed))
    track.job.say(
        f"{line.method}  seed {line.seed}  {line.domain or 'start'}  {stage}  "
        f"{seconds:.1f} s  {shown(outcome.metrics)}".rstrip()
    )
    return Held(**{**vars(held), **changed, "after": number})


def shown(metrics: Mapping[str, Any]) -> str:
    """The metrics that a line on the terminal shows."""
    found = [(name, metrics.get(name)) for name in SHOWN]
    return ", ".join(f"{k} {v:.4g}" for k, v in found if isinstance(v, int | float))


def deployed(track: Track, adapter: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    """Base and adapter to evaluate, after the method's ``deploy``."""
    return track.method.deploy(track.program.problem, track.base, adapter, state)
