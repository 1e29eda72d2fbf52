"""Running a compiled step many times: batches, metrics, progress, checkpoints.

No step waits for the device: metrics stay there and are fetched every ``log_every``
steps. A non-finite loss is therefore noticed at the next fetch.
"""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sbr_jax import distributed
from sbr_jax import progress as told
from sbr_jax.distributed import arrays, stopping
from sbr_jax.training.step import TrainState
from sbr_jax.typing import PyTree, UserError

History = dict[str, list[Any]]
"""Metric name -> one value for each step (``[S]`` arrays when seeds are mapped)."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a training loop.

    Attributes:
      train: adapter, optimizer state, step number.
      state: the method's state (a refresh may have changed it).
      step: number of steps done.
      history: metrics of every step so far.
      seconds_per_step: in this call, without its first step, which may have compiled.
    """

    train: TrainState
    state: PyTree
    step: int = 0
    history: History = dataclasses.field(default_factory=dict)
    seconds_per_step: float = 0.0


class Every(NamedTuple):
    """Work to do between steps, every ``steps`` steps; None for never."""

    steps: int | None
    call: Callable[[Progress], Any]

    def due(self, step: int) -> bool:
        """Whether the work is due after so many steps."""
        return self.steps is not None and step % self.steps == 0


class Bar:
    """A progress bar on a terminal, occasional lines in a log, or nothing."""

    def __init__(self, label: str, total: int, *, quiet: bool = False):
        """Starts a bar for ``total`` steps."""
        self._progress = None
        drawn = sys.stderr.isatty() and not quiet
        self._open = contextlib.ExitStack()
        self._told = self._open.enter_context(told.task("steps", total, drawn=drawn))
        if not drawn:
            return
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(
            console=Console(stderr=True), transient=True, refresh_per_second=2
        )
        self._task = self._progress.add_task(label, total=total)
        self._progress.start()

    def to(self, step: int, loss: float | None = None) -> None:
        """Moves the bar."""
        self._told(step, None if loss is None else f"loss {loss:.3f}")
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
            if loss is not None:
                label = self._progress.tasks[0].description.split(" loss")[0]
                self._progress.update(
                    self._task, description=f"{label} loss {loss:.3f}"
                )

    def close(self) -> None:
        """Removes the bar."""
        self._open.close()
        if self._progress is not None:
            self._progress.stop()


def train(
    advance: Callable[
        [TrainState, PyTree, int], tuple[TrainState, Mapping[str, jax.Array]]
    ],
    start: Progress,
    steps: int,
    *,
    where: str | Sequence[str],
    log_every: int = 50,
    refresh: Every | None = None,
    checkpoint: Every | None = None,
    quiet: bool = False,
) -> Progress:
    """Runs the steps from ``start.step`` to ``steps − 1``.

    **Guarantee.** The result depends on ``start`` and ``advance`` only: stopping after
    a checkpoint and continuing from it gives the same bits (on one machine) as running
    through.

    Args:
      advance: ``(train, state, number) -> (train, metrics)``, one compiled step; it
        consumes its ``train``.
      start: where to begin; consumed.
      steps: number of steps in the whole domain.
      where: names variant, seed and domain in messages; one per mapped seed.
      log_every: steps between fetches of the metrics.
      refresh: ``progress -> progress``, replaces the method's state before a step.
      checkpoint: gets the progress after a step, once all metrics so far are known to
        be finite; also when SIGTERM asks to stop.
      quiet: show no progress bar.

    Returns:
      The progress at the end.

    Raises:
      UserError: at the first step whose loss, gradient or update is not finite.
      Terminated: when SIGTERM asks to stop, after the current step and its checkpoint.
    """
    places = [where] if isinstance(where, str) else list(where)
    now, first = start, start.step
    log: History = collections.defaultdict(list)
    log |= {name: list(values) for name, values in start.history.items()}
    pending: list[Mapping[str, jax.Array]] = []
    bar = Bar(places[0], steps, quiet=quiet)
    timed_from = time.perf_counter()

    def fetch(done: int) -> None:
        for index, metrics in enumerate(arrays.fetch(pending)):
            _check_finite(metrics, done - len(pending) + index, places)
            for name, value in metrics.items():
                log[name].append(value.tolist())
        pending.clear()
        if log["loss"]:
            bar.to(done, float(np.mean(log["loss"][-1])))

    held = contextlib.nullcontext() if checkpoint is None else stopping.holding()
    with contextlib.closing(bar), held:
        for number in range(first, steps):
            # At step 0 the subspace is still fresh.
            if refresh is not None and number > 0 and refresh.due(number):
                now = refresh.call(now)
            train, metrics = advance(now.train, now.state, number)
            pending.append(metrics)
            done = number + 1
            now = Progress(train, now.state, done)
            if number == first:
                jax.block_until_ready(metrics)
                timed_from = time.perf_counter()
            ends = done < steps and distributed.should_stop()
            due = ends or (checkpoint is not None and checkpoint.due(done))
            saving = checkpoint is not None and done < steps and due
            if saving or len(pending) >= log_every:
                fetch(done)
            if checkpoint is not None and saving:
                history = {name: list(values) for name, values in log.items()}
                checkpoint.call(dataclasses.replace(now, history=history))
            if ends:
                raise distributed.Terminated
        fetch(steps)
    seconds = (time.perf_counter() - timed_from) / max(steps - first - 1, 1)
    return Progress(now.train, now.state, steps, dict(log), seconds)


def _check_finite(metrics: Mapping[str, Any], step: int, places: list[str]) -> None:
    finite = np.atleast_1d(metrics["finite"])
    if finite.all():
        return
    bad = int(np.argmin(finite))
    loss = float(np.atleast_1d(metrics["loss"])[bad])
    norm = float(np.atleast_1d(metrics["grad_norm"])[bad])
    update = float(np.atleast_1d(metrics["update_norm"])[bad])
    raise UserError(
        f"{places[bad]}: expected a finite loss and update, got {loss} (gradient norm "
        f"{norm}, update norm {update}) at step {step}; finished stages are kept and "
        "nothing of this one is saved: lower the learning rate or look at the data"
    )


def summarise(history: History, seed_index: int | None = None) -> dict[str, float]:
    """A stage's mean metrics, and its loss at the beginning and the end.

    ``seed_index`` picks one of several mapped seeds.

    Returns:
      The mean of every metric except ``finite``; and ``first_loss`` and ``final_loss``,
      means over the first and last tenth of the steps.
    """
    if seed_index is not None:
        history = {k: [v[seed_index] for v in vs] for k, vs in history.items()}
    found = {
        name: float(np.mean(values))
        for name, values in sorted(history.items())
        if name != "finite"
    }
    losses = history["loss"]
    tenth = max(len(losses) // 10, 1)
    found["first_loss"] = float(np.mean(losses[:tenth]))
    found["final_loss"] = float(np.mean(losses[-tenth:]))
    return found
