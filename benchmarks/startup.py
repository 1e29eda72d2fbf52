"""Times start-up: ``python -m benchmarks.startup``.

Whole processes are timed, from start to end: ``import sbr_jax`` against its imports JAX
and Optax; ``sbr-jax --help`` against an interpreter that does nothing; and the first
training step of the testbed's size with nothing compiled against the same with the
programs' persistent cache (``JAX_COMPILATION_CACHE_DIR``).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks import measure, worker

FIRST_STEP = """
import jax
from benchmarks import study
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.block_until_ready(study.Steps("plain", study.{size})())
"""


def process(command: Sequence[str], **env: str) -> Callable[[], float]:
    """Seconds of a whole process."""
    full = {**os.environ, "PYTHONPATH": str(worker.ROOT), **env}

    def run() -> float:
        start = time.perf_counter()
        subprocess.run(
            command, check=True, env=full, cwd=worker.ROOT, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - start

    return run


def python(code: str, **env: str) -> Callable[[], float]:
    """Seconds of an interpreter that runs some lines of code."""
    return process([sys.executable, "-c", code], **env)


def main(given: list[str] | None = None) -> None:
    """Runs all of them in turn."""
    args = measure.options(__doc__, given)
    report = measure.Pairs("startup", args)
    code = "from sbr_jax.programs import main; main()"
    runs = {
        "sbr-jax --help": process([sys.executable, "-c", code, "--help"]),
        "python -c pass": python("pass"),
    }
    report.measure("help", runs, [("sbr-jax --help", "python -c pass")])
    if not args.smoke:
        runs = {
            "import sbr_jax": python("import sbr_jax"),
            "import jax, optax": python("import jax, optax"),
        }
        report.measure("import", runs, [("import sbr_jax", "import jax, optax")])
        first = FIRST_STEP.format(size="TESTBED")
        with tempfile.TemporaryDirectory() as folder:
            runs = {
                "cache": python(first, JAX_COMPILATION_CACHE_DIR=folder),
                "no cache": python(first, JAX_ENABLE_COMPILATION_CACHE="false"),
            }
            report.measure("first step", runs, [("cache", "no cache")])
    report.close("ms are of whole processes; the first of each is not counted")


if __name__ == "__main__":
    main()
