"""A child process that answers one request at a time, so that two can take turns.

Each framework has its own process and so its own threads, compiled programs and peak
memory. The parent writes a line of JSON, and the child answers with one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


class WorkerError(RuntimeError):
    """A child that ended before it answered."""


class Worker:
    """A child process and the lines to and from it.

    Args:
      python: the interpreter.
      module: a module of ``benchmarks`` that calls :func:`serve`.
      job: the child's only argument, as JSON.
      env: further environment variables.
    """

    def __init__(
        self,
        python: str | pathlib.Path,
        module: str,
        job: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ):
        """Starts the child."""
        self._name = module
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            [str(python), "-m", f"benchmarks.{module}", json.dumps(job)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, what: str, **options: Any) -> dict[str, Any]:
        """Has the child call a function and returns its answer.

        Raises:
          WorkerError: with the end of the child's output, if it ended.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps([what, options]) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._child.wait()
            self._log.seek(0)
            end = self._log.read()[-3000:]
            raise WorkerError(f"{self._name} ended with {self._child.returncode}:{end}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the child."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(functions: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """Answers the parent until it closes the pipe."""
    # Libraries print; their output must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what, options = json.loads(line)
        print(json.dumps(functions[what](**options)), file=answers, flush=True)


def pin(threads: int) -> None:
    """Restricts this process to some cores; call it before a framework counts them."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def clock(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of a call in this process, and its result."""
    cpu, wall = time.process_time(), time.perf_counter()
    value = run()
    spent = time.perf_counter() - wall
    return {"wall": spent, "cpu": time.process_time() - cpu}, value


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peer_python(given: str | None, *modules: str) -> str | None:
    """The interpreter that has the peers; None, after printing what is missing.

    Args:
      given: from the command line; None for ``.venv-peers``, else this interpreter.
      *modules: modules that it must have.
    """
    own = PEER_PYTHON if PEER_PYTHON.is_file() else sys.executable
    python = shutil.which(str(given or own))
    if python is None:
        print(f"no {given}: {', '.join(modules)} are missing, so ours alone")
        return None
    look = (
        "import importlib.util, sys;"
        "print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    )
    command = [python, "-c", look, *modules]
    missing = subprocess.run(command, capture_output=True, text=True, check=True)
    if names := missing.stdout.split():
        hint = "make bench-venv installs them into .venv-peers"
        print(f"not installed: {', '.join(names)} ({hint}), so ours alone")
        return None
    return python


class Inside:
    """The functions of one of our children, run in this process.

    For a smoke test: nothing is imported or compiled again.
    """

    def __init__(self, module: str, job: Mapping[str, Any]):
        """Prepares what the child would have prepared."""
        found = importlib.import_module(f"benchmarks.{module}")
        self._functions = found.functions(json.loads(json.dumps(job)))

    def ask(self, what: str, **options: Any) -> dict[str, Any]:
        """Returns what the child would have answered."""
        return json.loads(json.dumps(self._functions[what](**options)))

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def ours(
    module: str, job: Mapping[str, Any], *, inside: bool = False
) -> Worker | Inside:
    """A process of ours that leaves the peer a share of a device's memory."""
    if inside:
        return Inside(module, job)
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Worker(sys.executable, module, job, env)


def both(
    stack: contextlib.ExitStack,
    python: str | None,
    job: Mapping[str, Any],
    folder: str,
    *,
    inside: bool = False,
) -> dict[str, Worker | Inside]:
    """Our child and, if installed, the peer's, on the weights that ours wrote.

    Args:
      stack: closes them.
      python: the peer's interpreter, or None.
      job: for both.
      folder: for the weights.
      inside: our child, if it runs in this process.

    Returns:
      The children by name.
    """
    found = ours("jax_child", job, inside=inside)
    children: dict[str, Worker | Inside] = {"ours": stack.enter_context(found)}
    if python:
        children["ours"].ask("export", folder=folder)
        child = Worker(python, "torch_child", job)
        children["transformers"] = stack.enter_context(child)
    return children
