"""Compiles programs in separate processes, and caches the results.

Results are kept as JSON in the user's cache folder, keyed by sizes, versions and code,
so the same question is answered at once.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sbr_jax import files
from sbr_jax.planning.case import Case
from sbr_jax.planning.chips import Topology
from sbr_jax.planning.layouts import Layout
from sbr_jax.planning.shapes import read_shape
from sbr_jax.settings import Training
from sbr_jax.typing import UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
ROOT = Path(__file__).parents[1]
SILENT = ("analysis", "attacks", "evaluation", "programs", "provenance", "recipes")
SILENT += ("reporting", "studies", "testbed", "tuning.py", "planning/chips.py")
SILENT += ("planning/job.py", "planning/layouts.py", "planning/planner.py")
SILENT += ("planning/report.py", "planning/rooflines.py", "planning/compiler.py")
"""Code that affects no compiled program."""


class CompilerError(Exception):
    """The compiler itself failed; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The compiler's result for one part of a job, for one chip.

    Attributes:
        flops: of matrix products.
        bytes: read from and written to main memory.
        links: bytes received, by kind and number of devices.
        held: bytes of the arguments, by kind.
        peak: most bytes at once, arguments included.
        room: bytes available, if they do not suffice.
        unknown: loops whose number of rounds depends on data.
    """

    flops: float = 0.0
    bytes: float = 0.0
    links: tuple[tuple[str, int, float], ...] = ()
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak: float = 0.0
    room: float | None = None
    unknown: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def link_bytes(self) -> float:
        """Bytes received over links, of all kinds."""
        return sum(size for _, _, size in self.links)

    @property
    def working(self) -> float:
        """Bytes other than arguments: activations and other temporaries."""
        return max(self.peak - sum(self.held.values()), 0.0)


def require_compiler() -> None:
    """Refuses a machine without the compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "expected libtpu, the compiler for TPUs (no TPU is needed), found none: "
            "pip install 'sbr_jax[tpu]'"
        )


def compile_part(
    case: Case,
    layout: Layout,
    topology: Topology,
    part: str,
    *,
    quick: bool = False,
    cache: Path | None = None,
) -> Found:
    """Compiles one part of a job, or returns the cached result.

    Args:
        case: the job.
        layout: its mesh.
        topology: the slice.
        part: a key of `aot.PARTS`.
        quick: skips what only speeds up memory access: products and links are the same,
            while memory use and traffic are upper bounds.
        cache: folder of results; None for the user's.

    Raises:
        CompilerError: if the compiler fails, in one line.
        UserError: if the job itself is refused.
    """
    request = {
        "case": dataclasses.asdict(case),
        "layout": dataclasses.asdict(layout),
        "topology": str(topology),
        "part": part,
        "quick": quick,
    }
    path = (cache or files.cache_folder() / "plan") / f"{digest(request)}.json"
    if path.is_file():
        return _read(json.loads(path.read_text("utf-8"))["found"])
    found = _asked(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({"request": request, "found": found}), "utf-8")
    written.replace(path)
    return _read(found)


def case_of(written: Mapping[str, Any]) -> Case:
    """Rebuilds a case from its JSON form."""
    return Case(**{**written, "training": Training(**written["training"])})


def _read(found: Mapping[str, Any]) -> Found:
    if "full" in found:
        return Found(held=found["held"], peak=found["full"], room=found["room"])
    links = tuple((kind, count, size) for kind, count, size in found["links"])
    names = ("flops", "bytes", "held", "peak", "unknown")
    return Found(links=links, **{name: found[name] for name in names})


def digest(request: Mapping[str, Any]) -> str:
    """A digest of a request, the model's settings, package versions, and our code."""
    config = dataclasses.asdict(read_shape(request["case"]["model"]))
    versions = {name: _version(name) for name in PACKAGES}
    known = json.dumps([request, config, versions, _code()], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:20]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """A digest of the code that affects a program."""
    found = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.partition("/")[0] not in SILENT and place not in SILENT:
            found.update(place.encode() + path.read_bytes())
    return found.hexdigest()


# --- the process ----------------------------------------------------------------------


def environment(folder: str) -> dict[str, str]:
    """Environment of a process that compiles for TPUs on a machine without one."""
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": folder,
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TMPDIR": folder,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path]),
    }


def _asked(request: Mapping[str, Any]) -> dict[str, Any]:
    """A process's answer to a request."""
    with tempfile.TemporaryDirectory(prefix="sbr-jax-plan-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "sbr_jax.planning.worker"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment(folder),
            check=False,
        )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = complaint(done.stderr)
    if done.returncode > 0 and last.startswith(REFUSED):
        raise UserError(last.removeprefix(REFUSED))
    raise CompilerError(f"the compiler failed ({_ending(done.returncode)}): {last}")


REFUSED = "sbr_jax.typing.UserError: "
"""How Python's last line begins if the job itself was refused."""


def _ending(code: int) -> str:
    """Describes how a process ended.

    >>> _ending(-6), _ending(1)
    ('SIGABRT', 'exit code 1')
    """
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def complaint(text: str) -> str:
    r"""The line of a failed process's output that says why.

    >>> complaint("F1130 01:02:03 7 file.cc:5] Check failed: a == b\n@ 0x1 main\n")
    'Check failed: a == b'
    >>> complaint("Traceback ...\nValueError: no\n")
    'ValueError: no'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    if fatal:
        return fatal[0].partition("] ")[2][:300]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]
