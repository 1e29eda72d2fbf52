"""Links between process 0 and the others: JSON lines over TCP, and the roll call.

Everything that processes agree on goes through process 0, which has a link to each of
the others. A thread reads each link, so that the end of a process is noticed at once.
"""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sbr_jax.distributed.errors import Ended, Lost
from sbr_jax.distributed.meeting import Meeting
from sbr_jax.typing import UserError

PAUSE = 0.1
"""Seconds between two tries to reach process 0."""
GREETING = 10.0
"""Seconds in which a new connection must say who it is."""
LONGEST = 2**24
"""Most bytes of a line; our processes send no longer ones."""


class Link:
    """A connection to another process.

    Attributes:
      index: the other process's index.
      name: its host's name.
      over: the exception that ended it; None while it is open.
    """

    def __init__(self, index: int, name: str, connection: socket.socket):
        """Takes over a connection; nothing is read yet."""
        self.index, self.name = index, name
        self.over: Ended | Lost | None = None
        self.closed = threading.Event()
        self._socket, self._file = connection, connection.makefile("rb")
        self._listening = False
        self._lock = threading.Lock()
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __str__(self) -> str:
        """The process's name in messages."""
        return f"process {self.index} ({self.name})"

    def listen(self, ended: Callable[["Link"], None]) -> None:
        """Starts reading; ``ended`` is called in a thread when the link is over."""
        self._listening = True
        threading.Thread(target=self._read, args=(ended,), daemon=True).start()

    def _read(self, ended: Callable[["Link"], None]) -> None:
        over: Ended | Lost = Lost(f"{self} is gone: its connection has ended")
        with contextlib.suppress(OSError, ValueError):
            while line := self._file.readline(LONGEST):
                found = json.loads(line)
                if "end" in found:
                    said = f"{self}: {found['line']}" if found["line"] else ""
                    over = Ended(found["end"], said)
                    break
                self._values.put(found)
        self._file.close()
        self.over = over
        self._values.put(over)
        self.closed.set()
        ended(self)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a line.

        Raises:
          Lost: if the other process has gone.
        """
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Lost(f"{self} is gone: its connection has ended") from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """Reads one line, before a thread reads the link.

        Raises:
          OSError, ValueError: if no line comes.
        """
        self._socket.settimeout(seconds)
        line = self._file.readline(LONGEST)
        self._socket.settimeout(None)
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found

    def take(self, what: str, seconds: float) -> Any:
        """The value that the other process sends for ``what``.

        Raises:
          TimeoutError: if none comes in time.
          Lost: if the other process has gone.
          Ended: if the other process has ended the job.
        """
        try:
            found = self._values.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"{self}: {what}") from None
        if isinstance(found, Exception):
            self._values.put(found)
            raise found
        if found["what"] != what:
            raise RuntimeError(f"{self} is at {found['what']}, this process at {what}")
        return found["value"]

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if not self._listening:
            self._file.close()


def meet(
    meeting: Meeting, card: Mapping[str, Any], seconds: float
) -> tuple[list[Link], str]:
    """The roll call: every process reports to process 0 or is named as missing.

    Args:
      meeting: where the processes meet.
      card: this process's values that must be the same in all of them.
      seconds: how long process 0 waits for the others.

    Returns:
      In process 0 the links to all others, elsewhere the one to process 0; and the
      address at which JAX's own coordinator is to listen.

    Raises:
      UserError: naming who is missing, or what differs.
      Ended: if process 0 has refused.
    """
    mine = {**card, "index": meeting.index, "count": meeting.count}
    mine["name"] = socket.gethostname()
    mine = json.loads(json.dumps(mine))
    if meeting.index:
        return _call_in(meeting, mine, seconds)
    with _server(meeting) as server:
        links = _await_all(meeting, server, mine, seconds)
    coordinator = f"{meeting.host}:{_free_port()}"
    for link in links:
        link.send({"coordinator": coordinator})
    return links, coordinator


def _server(meeting: Meeting) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", meeting.port), family=family, dualstack_ipv6=both, backlog=512
        )
    except OSError as error:
        raise UserError(
            f"--distributed: process 0 cannot listen at port {meeting.port} "
            f"({error.strerror}): end what uses it, or name another port"
        ) from error


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _await_all(
    meeting: Meeting, server: socket.socket, mine: Mapping[str, Any], seconds: float
) -> list[Link]:
    deadline = time.monotonic() + seconds
    links: dict[int, Link] = {}
    met: list[Link] = []
    try:
        while len(links) < meeting.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise UserError(_missing(meeting, links, seconds)) from None
            found = _greeted(connection)
            if found is None:
                continue
            link, card = found
            met.append(link)
            _require_same(link, mine, card)
            if not 0 < link.index < meeting.count or link.index in links:
                raise UserError(
                    f"expected each process from 1 to {meeting.count - 1} once, got "
                    f"another {link}: give every host its own number"
                )
            links[link.index] = link
    except UserError:
        for link in met:
            with contextlib.suppress(Lost):
                link.send({"end": 2})
            link.close()
        raise
    return [links[index] for index in sorted(links)]


def _greeted(connection: socket.socket) -> tuple[Link, dict[str, Any]] | None:
    """Identifies a new connection; None for a stranger."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = Link(-1, "", connection)
    try:
        card = link.receive(GREETING)
        link.index, link.name = int(card["index"]), str(card["name"])
    except (OSError, ValueError, KeyError, TypeError):
        link.close()
        return None
    return link, card


def _missing(meeting: Meeting, links: Mapping[int, Link], seconds: float) -> str:
    missing = [i for i in range(1, meeting.count) if i not in links]
    named = ", ".join(meeting.name(i) for i in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return (
        f"expected {meeting.count} processes at {meeting.host}:{meeting.port}, "
        f"{meeting.count - len(missing)} came within {seconds:.0f} s; missing: {named}"
        f"{more}: start the same command on every host at once"
    )


def _require_same(
    link: Link, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    for key in (k for k in mine if k not in ("index", "name")):
        if theirs.get(key) == mine[key]:
            continue
        raise UserError(
            f"{link} has another {key} than process 0 ({mine['name']}): "
            f"{_differing(theirs.get(key), mine[key])}; start the same command, with "
            "the same code, on every host"
        )


def _differing(theirs: Any, mine: Any) -> str:
    """Describes where two values differ; for sequences, only the differing words."""
    if isinstance(mine, Sequence) and not isinstance(mine, str):
        others = list(theirs or [])
        ours, others = (
            " ".join(str(x) for x in one if x not in other) or "nothing more"
            for one, other in ((mine, others), (others, mine))
        )
        return f"{others} there, {ours} here"
    return f"{theirs} there, {mine} here"


def _call_in(
    meeting: Meeting, mine: Mapping[str, Any], seconds: float
) -> tuple[list[Link], str]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((meeting.host, meeting.port), 5.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{meeting.name(0)} does not answer at {meeting.host}:"
                    f"{meeting.port} within {seconds:.0f} s ({error.strerror or error})"
                    ": start the same command on every host at once"
                ) from error
            time.sleep(PAUSE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = Link(0, meeting.host, connection)
    try:
        link.send(mine)
        answer = link.receive(seconds + GREETING)
    except (OSError, ValueError, Lost) as error:
        link.close()
        raise UserError(
            f"{link} has left the roll call without a word: look at what it has printed"
        ) from error
    if "end" in answer:
        link.close()
        raise Ended(answer["end"])
    return [link], answer["coordinator"]
