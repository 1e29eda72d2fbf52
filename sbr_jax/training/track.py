"""One method with one seed through the domains: what each stage computes."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sbr_jax.data.batches import batch
from sbr_jax.training import checkpoint, loop, sharding
from sbr_jax.training.finite import require_finite, require_finite_base
from sbr_jax.training.monitor import monitor
from sbr_jax.training.records import writing
from sbr_jax.training.stage_records import (
    HISTORY,
    PARTIAL,
    read_result,
    write_history,
)
from sbr_jax.training.stages import EVALUATE, REPAIR, SUBSPACE, TRAIN, Stages
from sbr_jax.training.step import TrainState
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree


class Track(Stages):
    """A method's run with one seed.

    Every stage does nothing where it is finished already.
    """

    def init(self) -> None:
        """Stage 0: what the method measures on the aligned model."""
        if self.finished(0):
            return
        began = time.perf_counter()
        self.load(0)
        state = self._init_state(self.adapter)
        diagnostics = state.pop("diagnostics", {})
        self.finish(0, None, -1, {}, began=began, state=state, diagnostics=diagnostics)

    @functools.cached_property
    def _mixed(self) -> dict[str, Any]:
        """The data set of the domain at hand, by the domain's name."""
        return {}

    def dataset(self, domain: str) -> Any:
        """What the domain trains on: its examples and what the method mixes in.

        Made once: a method may ask a judge about every example.
        """
        if domain not in self._mixed:
            self._mixed.clear()
            self._mixed[domain] = self.method.mix(
                self.program.problem,
                self.study.domains[domain].train,
                self.data_seed(f"{domain}/mix"),
            )
        return self._mixed[domain]

    def batches(self, dataset: Any, name: str) -> Callable[[int], Mapping[str, Any]]:
        """Batch of a step number, placed on the mesh."""
        seed, size = self.data_seed(name), self.config.training.batch_size
        mesh = self.program.mesh
        return lambda step: sharding.place_batch(mesh, batch(dataset, size, seed, step))

    def begin(self, index: int) -> tuple[TrainState, dict[str, Any]]:
        """Training state and method state at the start of a domain."""
        self.load(self.number(index, TRAIN))
        return self.program.start(self.adapter, self.state), self.state

    def train(self, index: int) -> None:
        """Steps on the domain."""
        number, domain = self.number(index, TRAIN), self.domains[index]
        if self.finished(number):
            return
        began = time.perf_counter()
        train, state = self.begin(index)
        train, state, step, history = self._partial(number, train, state)
        done = loop.train(
            self.program.step,
            self.base,
            train,
            state,
            self.batches(self.dataset(domain), domain),
            self.key(2, domain),
            steps=self.config.training.steps_per_domain,
            where=self.where(domain),
            first_step=step,
            history=history,
            log_every=self.config.hardware.log_every,
            refresh_every=self.method.refresh_every,
            refresh=self._refresher(domain),
            checkpoint_every=self.config.hardware.checkpoint_every,
            checkpoint=self._checkpointer(number, self.where(domain)),
            quiet=self.quiet,
        )
        self.trained(index, done, loop.summarise(done.history), began)

    def trained(
        self, index: int, done: loop.Trained, metrics: Mapping[str, Any], began: float
    ) -> None:
        """Records the train stage."""
        self.finish(
            self.number(index, TRAIN),
            self.domains[index],
            index,
            metrics,
            began=began,
            adapter=done.train.adapter,
            state=done.state if self.method.refresh is not None else None,
            seconds_per_step=done.seconds_per_step,
        )

    def _refresher(self, domain: str):
        if self.method.refresh is None:
            return None
        key = self.key(4, domain)

        def refresh(train, state, step):
            state = self.method.refresh(
                self.program.problem,
                self.base,
                train.adapter,
                state,
                jax.random.fold_in(key, step),
            )
            state = {k: v for k, v in state.items() if k != "diagnostics"}
            opt_state = self.program.insert(train.opt_state, state)
            return TrainState(train.adapter, opt_state, train.step), state

        return refresh

    def _checkpointer(self, number: int, where: str):
        def save(step, train, state, history):
            require_finite((train, state), f"{where}, after step {step}")
            self.workdir.require_held()
            folder = self.folder(number) / f"{PARTIAL}{step:08d}"
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder / "tree", (train, state))
            run = self.workdir.run
            write_history(folder, run=run, step=step, history=history)
            for other in folder.parent.glob(f"{PARTIAL}*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

        return save

    def _partial(self, number: int, train: TrainState, state: PyTree):
        """The newest checkpoint inside a stage, or the stage's start."""
        found = self.folder(number).glob(f"{PARTIAL}*")
        for folder in sorted(found, reverse=True):
            record = read_result(folder, self.workdir.run, HISTORY)
            if record is not None:
                train, state = self.restore(folder / "tree", (train, state))
                return train, state, record["step"], record["history"]
        return train, state, 0, None

    def repair(self, index: int) -> None:
        """The monitor, and repair blocks where it asks for them."""
        number, domain = self.number(index, REPAIR), self.domains[index]
        if not self.monitored or self.finished(number):
            return
        began = time.perf_counter()
        self.load(number)
        losses: list[float] = []

        def block(adapter, count):
            done = self._repair_block(adapter, domain, count)
            losses.append(loop.summarise(done.history)["safety_loss"])
            return done.train.adapter

        adapter, scores = monitor(
            self.adapter,
            lambda adapter: self.study.probe(*self.deployed(adapter)),
            block,
            self.start_score,
            tolerance=self.config.training.tolerance,
            max_blocks=self.config.training.repair_blocks,
            where=self.where(domain),
        )
        metrics = {
            "probe_start": self.start_score,
            "probe": scores[0],
            "probe_after": scores[-1],
            "blocks": len(scores) - 1,
        }
        if losses:
            metrics["safety_loss"] = losses[-1]
        changed = adapter if len(scores) > 1 else None
        self.finish(number, domain, index, metrics, began=began, adapter=changed)

    def _repair_block(self, adapter: PyTree, domain: str, count: int) -> loop.Trained:
        name = f"{domain}/repair{count}"
        safe = self.batches(self.study.calibration, f"{name}/safe")
        weight = np.float32(self.config.training.replay_weight)
        return loop.train(
            self.program.repair_step,
            self.base,
            self.program.start(adapter, self.state, repair=True),
            self.state,
            self.batches(self.dataset(domain), name),
            self.key(5, name),
            steps=self.config.training.repair_steps,
            where=f"{self.where(domain)}, repair",
            more=lambda step: (safe(step), weight),
            log_every=self.config.hardware.log_every,
            quiet=self.quiet,
        )

    def end_domain(self, index: int) -> None:
        """The method's ``end_domain``: a new subspace, a new reference, an edit."""
        number, domain = self.number(index, SUBSPACE), self.domains[index]
        if self.finished(number):
            return
        began = time.perf_counter()
        self.load(number)
        before = self.adapter
        problem = dataclasses.replace(self.program.problem, domain=self.dataset(domain))
        adapter, state = self.method.end_domain(
            problem, self.base, before, self.state, self.key(3, domain)
        )
        state = dict(state)
        diagnostics = state.pop("diagnostics", {})
        self.finish(
            number,
            domain,
            index,
            {},
            began=began,
            adapter=None if adapter is before else adapter,
            state=state,
            diagnostics=diagnostics,
        )

    def deployed(self, adapter: PyTree) -> tuple[PyTree, PyTree]:
        """The weights that are measured: the method's ``deploy``."""
        return self.method.deploy(self.program.problem, self.base, adapter, self.state)

    def evaluate(self, index: int) -> None:
        """All measurements after a domain."""
        number, domain = self.number(index, EVALUATE), self.domains[index]
        if self.finished(number):
            return
        began = time.perf_counter()
        self.load(number)
        base, adapter = self.deployed(self.adapter)
        where = f"{self.where(domain)}, weights to measure"
        require_finite(adapter, where)
        if base is not self.base:
            require_finite_base(base, where)
        metrics = measure(self.study, base, adapter, self.domains[: index + 1])
        self.finish(number, domain, index, metrics, began=began)


def measure(
    study: Study, base: PyTree, adapter: PyTree, domains: tuple[str, ...]
) -> dict[str, float]:
    """The study's metrics and the test accuracy of some domains, 0 to 100."""
    metrics = {k: float(v) for k, v in study.evaluate(base, adapter).items()}
    for name in domains:
        metrics[f"accuracy/{name}"] = float(study.domains[name].evaluate(base, adapter))
    return metrics
