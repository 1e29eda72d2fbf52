"""Running a compiled step many times: batches, metrics, progress, checkpoints.

Nothing here waits for the device inside a step: metrics stay where they are and are
fetched every ``log_every`` steps, which is also when a non-finite loss is noticed.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sbr_jax.training.step import TrainState
from sbr_jax.typing import Batch, PyTree, UserError

History = dict[str, list[Any]]
"""Metric name -> one value for each step (``[S]`` arrays when seeds are mapped)."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a loop returns.

    Attributes:
      train: adapter, optimizer state, step number.
      state: the method's state (a refresh may have changed it).
      history: every step's metrics, from step 0 also after a resume.
      seconds: wall time of this call.
      seconds_per_step: without the first step, which may have compiled.
    """

    train: TrainState
    state: PyTree
    history: History
    seconds: float
    seconds_per_step: float


class Bar:
    """A progress bar on a terminal; nothing elsewhere, or when ``quiet``."""

    def __init__(self, label: str, total: int, *, quiet: bool = False):
        """Starts the bar.

        Args:
          label: what is running.
          total: steps.
          quiet: no bar.
        """
        self._progress = None
        if quiet or not sys.stderr.isatty():
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
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
            if loss is not None:
                label = self._progress.tasks[0].description.split(" loss")[0]
                self._progress.update(
                    self._task, description=f"{label} loss {loss:.3f}"
                )

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()


def train(
    step: Callable[..., tuple[TrainState, Mapping[str, jax.Array]]],
    base: PyTree,
    start: TrainState,
    state: PyTree,
    batches: Callable[[int], Batch],
    key: jax.Array,
    *,
    steps: int,
    where: str | Sequence[str],
    more: Callable[[int], tuple[Any, ...]] | None = None,
    first_step: int = 0,
    history: History | None = None,
    log_every: int = 50,
    refresh_every: int | None = None,
    refresh: Callable[[TrainState, PyTree, int], tuple[TrainState, PyTree]]
    | None = None,
    checkpoint_every: int | None = None,
    checkpoint: Callable[[int, TrainState, PyTree, History], None] | None = None,
    quiet: bool = False,
) -> Trained:
    """Runs steps ``first_step`` to ``steps − 1``.

    **Guarantee.** The result depends on ``start``, ``state``, ``key`` and the batches
    only: stopping after a checkpoint and going on from it gives the same bits (on one
    machine) as not stopping.

    Args:
      step: a compiled step; consumes the state it is given.
      base: frozen weights.
      start: consumed.
      state: the method's.
      batches: batch of a step number.
      key: the domain's key; the step folds its number in.
      steps: of the whole domain.
      where: names method, seed and domain in messages; one per mapped seed.
      more: further arguments of a step (a repair's safety batch and β).
      first_step: where a resumed loop goes on.
      history: metrics of the steps before ``first_step``.
      log_every: steps between fetches.
      refresh_every: steps between calls of ``refresh``.
      refresh: ``(train, state, step) -> (train, state)``.
      checkpoint_every: steps between calls of ``checkpoint``.
      checkpoint: ``(steps done, train, state, history)``, after all metrics so far
        were found finite.
      quiet: no progress bar.

    Returns:
      The trained state with its history.

    Raises:
      UserError: at the first step whose loss, gradient or update is not finite.
    """
    places = [where] if isinstance(where, str) else list(where)
    before = {name: list(values) for name, values in (history or {}).items()}
    log: History = collections.defaultdict(list, before)
    pending: list[Mapping[str, jax.Array]] = []
    bar = Bar(places[0], steps, quiet=quiet)
    began = time.perf_counter()
    timed_from, warm = began, first_step

    def fetch(done: int) -> None:
        for index, metrics in enumerate(jax.device_get(pending)):
            _check_finite(metrics, done - len(pending) + index, places)
            for name, value in metrics.items():
                log[name].append(value.tolist())
        pending.clear()
        if log["loss"]:
            bar.to(done, float(np.mean(log["loss"][-1])))

    try:
        for number in range(first_step, steps):
            # Step 0 has a fresh subspace already.
            due = refresh_every and number > 0 and number % refresh_every == 0
            if refresh is not None and due:
                start, state = refresh(start, state, number)
            extra = () if more is None else more(number)
            start, metrics = step(base, start, state, batches(number), key, *extra)
            pending.append(metrics)
            done = number + 1
            if number == first_step:
                jax.block_until_ready(metrics)
                timed_from, warm = time.perf_counter(), done
            saving = checkpoint_every and done % checkpoint_every == 0 and done < steps
            if saving or len(pending) >= log_every:
                fetch(done)
            if saving and checkpoint is not None:
                checkpoint(done, start, state, {k: list(v) for k, v in log.items()})
        fetch(steps)
    finally:
        bar.close()
    ended = time.perf_counter()
    timed = max(steps - warm, 1)
    return Trained(start, state, dict(log), ended - began, (ended - timed_from) / timed)


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
    """A stage's metrics as numbers: means, and the loss at both ends.

    Args:
      history: of one loop.
      seed_index: which mapped seed; None when none are mapped.

    Returns:
      The mean of every metric but ``finite``, ``first_loss`` and ``final_loss`` (means
      over the first and last tenth of the steps).
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
