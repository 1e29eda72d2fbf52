"""Options of the commands that compare one of our models with a peer's."""

import argparse
import dataclasses
import os
import shutil
from typing import Any

from benchmarks import measure, shapes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds options for the model and the number of threads."""
    parser.add_argument("--preset", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer, for a shorter run")
    parser.add_argument("--threads", type=int, default=measure.cores())


def ours_and_peer(
    args: argparse.Namespace, folder: str
) -> tuple[shapes.Shape, dict[str, Any]]:
    """The model's shape, and the job for both children."""
    preset = args.preset or ("smoke" if args.smoke else "smollm2-135m")
    shape = shapes.SHAPES[preset]
    if args.layers:
        shape = dataclasses.replace(shape, layers=args.layers)
    gpu = shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS") != "cpu"
    return shape, {
        "shape": dataclasses.asdict(shape),
        "dtype": "bfloat16" if gpu else "float32",
        "threads": args.threads,
        "folder": folder,
    }
