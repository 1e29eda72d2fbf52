"""Options of the commands that set one model of ours beside the same of a peer."""

import argparse
import dataclasses
import os
import shutil
from typing import Any

from benchmarks import measure, shapes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how many threads."""
    parser.add_argument("--preset", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer, for a shorter run")
    parser.add_argument("--threads", type=int, default=measure.cores())


def ours_and_peer(
    args: argparse.Namespace, folder: str
) -> tuple[shapes.Shape, dict[str, Any]]:
    """The model's shape, and what both children are told of it."""
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
