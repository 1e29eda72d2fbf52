"""The session of one process among several: agreement, polls, watchdog, exit.

All processes run the same program. If something depends on a folder, a clock or a
score, process 0 decides it for all.
"""

import atexit
import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sbr_jax import progress
from sbr_jax.distributed import logs, meeting, stopping
from sbr_jax.distributed.agreement import CURRENT
from sbr_jax.distributed.errors import Ended, Lost, Terminated
from sbr_jax.distributed.links import Link, meet
from sbr_jax.typing import UserError

Value = TypeVar("Value")

WAIT = "SBR_JAX_WAIT"
"""Environment variable: seconds that processes wait for each other, everywhere."""
ROLL_CALL = 300.0
"""Seconds in which all processes must have started."""
PATIENCE = 3600.0
"""Seconds that one process may be ahead of another, or show no sign of life."""
SLICE = 0.2
"""Seconds of waiting between checks whether a process has gone."""
GRACE = 5.0
"""Seconds that a process has to end by itself once it is told to."""
EXIT_DEFECT, EXIT_USER, EXIT_LOST = 1, 2, 134
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
COMPILED = "/jax/core/compile/backend_compile_duration"


class Session:
    """This process among several.

    Attributes:
      index: index of this process.
      count: number of processes.
      links: in process 0 the links to the others; elsewhere the one to process 0.
      patience: seconds to wait for others.
      log: receives this process's output, unless it is process 0.
    """

    def __init__(
        self, index: int, count: int, links: list[Link], patience: float = PATIENCE
    ):
        """Starts to listen to the links."""
        self.index, self.count, self.links = index, count, links
        self.patience = patience
        self.log: logs.Log | None = None
        self.made: Path | None = None
        self._alone = 0
        self._labels = self._polls = 0
        self._left = threading.Event()
        self._beat = time.monotonic()
        self._main = threading.current_thread()
        for link in links:
            link.listen(self._over)

    # --- agreement --------------------------------------------------------------------

    def decide(self, compute: Callable[[], Value]) -> Value:
        """Computes a value in process 0 and returns it in every process."""
        if self._alone:
            return compute()
        what = self._label("a decision")
        if self.index:
            try:
                return self.links[0].take(what, self.patience)
            except TimeoutError:
                late = f"{self.links[0]} not at {what} within {self.patience:.0f} s"
                raise Lost(late) from None
        with self.alone():
            value = compute()
        for link in self.links:
            link.send({"what": what, "value": value})
        return value

    def gather(self, what: str, value: Any) -> list[Any]:
        """In process 0 the values of all processes by index; elsewhere nothing.

        Raises:
          Lost: naming the processes that do not answer.
        """
        label = self._label(what)
        if self.index:
            self.links[0].send({"what": label, "value": value})
            return []
        deadline = time.monotonic() + self.patience
        found, waiting = {self.index: value}, list(self.links)
        while waiting:
            over = next((link.over for link in self.links if link.over), None)
            if over is not None:
                raise over
            if time.monotonic() > deadline:
                late = ", ".join(map(str, waiting))
                raise Lost(f"{late} not at {what} within {self.patience:.0f} s")
            with contextlib.suppress(TimeoutError):
                found[waiting[0].index] = waiting[0].take(label, SLICE)
                del waiting[0]
        return [found[index] for index in sorted(found)]

    def barrier(self, what: str) -> None:
        """Waits until all processes are here.

        Raises:
          Lost: naming the missing processes.
        """
        self.gather(what, None)
        self.decide(lambda: None)

    def require_same(self, what: str, value: str, remedy: str) -> None:
        """Refuses processes whose values differ."""
        found = self.gather(what, value)
        for link, theirs in zip(self.links, found[1:], strict=False):
            if theirs != value:
                raise UserError(
                    f"{link} has another {what} than process 0: {theirs} there, "
                    f"{value} here; {remedy}"
                )
        self.decide(lambda: None)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Marks work that the other processes do not do."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def _label(self, what: str) -> str:
        self._beat = time.monotonic()
        self._labels += 1
        return f"{what}, place {self._labels}"

    # --- stopping ---------------------------------------------------------------------

    def poll(self) -> bool:
        """Whether all processes should stop here; all must ask equally often."""
        from jax.experimental import multihost_utils

        self._beat = time.monotonic()
        self._polls += 1
        return multihost_utils.reached_preemption_sync_point(self._polls)

    def heard(self) -> None:
        """Counts the parts of long work as signs of life, and stops between them."""
        mine = threading.current_thread() is self._main
        if mine and not self._alone and not stopping.is_held() and self.poll():
            raise Terminated

    def made_ready(self, event: str, duration_secs: float, **more: Any) -> None:
        """After each compilation, waits until all processes have the program.

        Collectives time out if one process compiles what another found in a cache.
        """
        del duration_secs
        mine = threading.current_thread() is self._main
        over = self._left.is_set()
        if event == COMPILED and mine and not self._alone and not over:
            self.barrier(f"compiling {more.get('fun_name', 'a program')}")

    # --- the end ----------------------------------------------------------------------

    def watch(self) -> None:
        """Starts a thread that ends this process, with its stack, if nothing moves."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._left.wait(min(self.patience / 4, 10.0)):
            still = time.monotonic() - self._beat
            if still > self.patience:
                faulthandler.dump_traceback(all_threads=True)
                line = f"no step for {still:.0f} s in process {self.index}"
                self._break(Lost(f"{line}: its stack is in its log"), EXIT_LOST)

    def _over(self, link: Link) -> None:
        """Called in a link's thread: the other process has ended, so this one will."""
        over = link.over
        code = over.code if isinstance(over, Ended) else EXIT_LOST
        if code and not self._left.wait(GRACE):
            self._break(over, code)

    def _break(self, error: Exception | None, code: int) -> None:
        """Ends this process from a thread, even if the main thread is waiting."""
        self._tell(code, str(error))
        if str(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if self.log is not None:
            self.log.close()
        self.leave_no_empty()
        os._exit(code)

    def leave_no_empty(self) -> None:
        """Removes the folder made for the others to see, if it is still empty."""
        if self.made is not None:
            with contextlib.suppress(OSError):
                self.made.rmdir()

    def _gone(self, seconds: float) -> Exception | None:
        """How another process ended, if one does within so many seconds.

        A collective may fail before the link's thread has heard of it.
        """
        deadline = time.monotonic() + seconds
        for link in self.links:
            if link.closed.wait(max(deadline - time.monotonic(), 0)):
                return link.over
        return None

    def _tell(self, code: int, line: str = "") -> None:
        for link in self.links:
            if link.over is None:
                with contextlib.suppress(Lost):
                    # Process 0 prints for all, so the others must not repeat its line.
                    link.send({"end": code, "line": line if self.index else ""})

    def leave(self, error: BaseException | None) -> None:
        """Ends the session, with the same exit code in all processes.

        Raises:
          Lost: if another process went, and this one's work with it.
        """
        late: Exception | None = None
        if error is None:
            try:
                self.barrier("the end")
            except (Lost, Ended) as found:
                error = late = found
        self._left.set()
        code = code_of(error)
        if code == EXIT_DEFECT:
            gone = self._gone(GRACE)
            if code_of(gone) not in (0, EXIT_DEFECT):  # What it needed has gone.
                code, late = code_of(gone), gone
        said = str(error).split("\n")[0] or type(error).__name__
        self._tell(code, "" if error is None else said)
        deadline = time.monotonic() + 2 * GRACE
        for link in self.links:
            link.closed.wait(max(deadline - time.monotonic(), 0))
        if code == 0:
            import jax

            jax.distributed.shutdown()
        else:
            atexit.register(_exit_now, code)
        for link in self.links:
            link.close()
        if late is not None:
            raise late from error


def _exit_now(code: int) -> None:
    """Exits before JAX's own exit hook asks processes that are gone."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def code_of(error: BaseException | None) -> int:
    """The exit code for the exception that ends a program.

    >>> code_of(None), code_of(UserError("no")), code_of(Terminated()), code_of(Lost())
    (0, 2, 143, 134)
    """
    if isinstance(error, Ended):
        return error.code
    codes: list[tuple[type[BaseException], int]] = [
        (UserError, EXIT_USER),
        (Lost, EXIT_LOST),
        (Terminated, EXIT_TERMINATED),
        (KeyboardInterrupt, EXIT_INTERRUPTED),
        (BaseException, EXIT_DEFECT),
    ]
    return next((code for kind, code in codes if isinstance(error, kind)), 0)


def wait_of(usual: float) -> float:
    """Seconds that processes wait for each other.

    Raises:
      UserError: if the environment variable is not a number above 0.

    >>> wait_of(300.0)
    300.0
    """
    said = os.environ.get(WAIT, str(usual))
    if not re.fullmatch(r"\d+(\.\d*)?", said) or float(said) == 0:
        raise UserError(f"{WAIT}: expected seconds above 0, got {said!r}")
    return float(said)


@contextlib.contextmanager
def join(
    option: str, folder: Path | None, card: Callable[[], Mapping[str, Any]]
) -> Iterator[None]:
    """Implements :func:`sbr_jax.distributed.joined`."""
    place = meeting.find(option)
    if place is None:
        yield
        return
    links, coordinator = meet(place, card(), wait_of(ROLL_CALL))
    session = Session(place.index, place.count, links, wait_of(PATIENCE))
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, error, trace: _leave(session, error))
        CURRENT.append(session)
        if session.index:
            session.log = stack.enter_context(logs.Log(session.index))
        if folder is not None:
            if session.index == 0 and isinstance(folder, Path) and not folder.exists():
                session.made = folder
                stack.callback(session.leave_no_empty)
            logs.require_shared(session, folder)
        _initialise(session, place, coordinator)
        yield


def _leave(session: Session, error: BaseException | None) -> None:
    try:
        session.leave(error)
    finally:
        CURRENT.remove(session)
        progress.HEARD.clear()


def _initialise(session: Session, place: meeting.Meeting, coordinator: str) -> None:
    import jax

    jax.distributed.initialize(
        coordinator, place.count, place.index, shutdown_timeout_seconds=60
    )
    jax.monitoring.register_event_duration_secs_listener(session.made_ready)
    progress.HEARD.append(session.heard)
    session.watch()
