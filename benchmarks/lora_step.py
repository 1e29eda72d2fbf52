"""Times one LoRA step against PyTorch and peft: ``python -m benchmarks.lora_step``.

Forward, backward to the adapter, clipping, AdamW. Ours runs with several examples to a
row (the choice of ``packing="auto"``) and padded to the longest of the set; the peer
has its usual collator. All use the same examples, with lengths like those of three real
domains, and full rows of answers. If there is a device it is used, in bfloat16.

First both compute the loss and the gradient's norm on the same weights. Then each has a
process of its own, and they take turns, in both orders. Compile time is shown apart.
``of rate`` is the time that the step's products would take at the rate of a square
product in the same run (on a device: at ``--peak-tflops``); padding counts as no work.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import measure, shapes, worker

OURS = {"ours packed": "packed", "ours padded": "padded"}
PEER = "torch + peft"
COLUMNS = {
    "data": -7,
    "run": -13,
    "s/step": 8,
    "time ×": 18,
    "CPU ×": 18,
    "tokens/s": 9,
    "of rate": 8,
    "MiB": 8,
    "memory ×": 9,
    "compile s": 10,
}
TOLERANCE = 1e-4


def job_of(args: argparse.Namespace, shape: shapes.Shape, data: Any) -> dict[str, Any]:
    """The job for a child, without its layout."""
    return {
        "shape": dataclasses.asdict(shape),
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "rank": args.rank,
        "unroll": args.unroll,
        "smoke": args.smoke,
        "data": str(data),
    }


def start(
    run: str, job: Mapping[str, Any], peer: str | None, **more: Any
) -> worker.Worker | worker.Inside:
    """The process of a run; a smoke test with nothing to compare needs none."""
    if run == PEER:
        assert peer is not None
        return worker.Worker(peer, "lora_torch", {**job, **more})
    inside = job["smoke"] and peer is None
    made = {**job, "layout": OURS[run], **more}
    return worker.ours("lora_jax", made, inside=inside)


def data_of(
    name: str, args: argparse.Namespace, vocab: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """The batches of a domain and the longest example of its set."""
    if name == "dense":
        rows, length = args.dense
        found = shapes.dense(rows * args.batches, length, 0, vocab)
        return shapes.batches_of(found, rows), length
    scale = 0.1 if args.smoke else 1.0
    count = args.batch * args.batches
    found = shapes.draw(shapes.DOMAINS[name], count, shapes.SEED, vocab, scale)
    return shapes.batches_of(found, args.batch), found["tokens"].shape[1]


def parity(args: argparse.Namespace, shape: shapes.Shape, peer: str) -> str:
    """Both sides' loss and gradient norm on the same weights and examples.

    Raises:
      SystemExit: if they differ by more than 1e-4 of their size.
    """
    batches, longest = data_of("prose", args, shape.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data.npz"
        shapes.write(data, batches[:1], longest)
        job = {**job_of(args, shape, data), "dtype": "float32"}
        found = {}
        for run in OURS:
            with start(run, job, peer) as child:
                child.ask("export", folder=folder)
                found[run] = child.ask("check")
        with start(PEER, job, peer, folder=folder) as child:
            found[PEER] = child.ask("check")
    worst = 0.0
    for what in ("losses", "norms"):
        wanted = np.array(found[PEER][what])
        for run in OURS:
            gap = np.abs(np.array(found[run][what]) / wanted - 1).max()
            worst = max(worst, float(gap))
            if not gap < TOLERANCE:
                sys.exit(
                    f"expected {what} within {TOLERANCE} of the peer's {wanted}, got "
                    f"{found[run][what]} of {run}: there is nothing to compare"
                )
    loss = found[PEER]["losses"][0]
    return f"same loss ({loss:.4f}) and gradient norm: {worst:.0e} apart at most"


def measure_domain(
    name: str,
    args: argparse.Namespace,
    shape: shapes.Shape,
    peer: str | None,
    report: measure.Report,
) -> None:
    """Measures all runs on one domain and prints a row for each."""
    batches, longest = data_of(name, args, shape.vocab_size)
    runs = [*OURS, PEER] if peer else [*OURS]
    if name == "dense":
        runs.remove("ours packed")  # Full rows leave nothing to pack.
    flops = sum(shapes.step_flops(shape, args.rank, b) for b in batches)
    tokens = sum(int(b["length"].sum()) for b in batches)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        data = pathlib.Path(folder) / "data.npz"
        shapes.write(data, batches, longest)
        job = job_of(args, shape, data)
        children = {r: stack.enter_context(start(r, job, peer)) for r in runs}
        about = {run: child.ask("about") for run, child in children.items()}
        ready = {run: child.ask("prepare") for run, child in children.items()}
        turns = measure.interleave(
            {run: lambda c=child: c.ask("run") for run, child in children.items()},
            args.rounds,
        )
        memory = {run: child.ask("memory")["peak"] for run, child in children.items()}
        size = args.rate_size
        rates = {run: c.ask("rate", size=size)["rate"] for run, c in children.items()}
    peak = args.peak_tflops * 1e12 if args.device == "gpu" else max(rates.values())
    for run in runs:
        wall = [turn["wall"] for turn in turns[run]]
        cpu = [turn["cpu"] for turn in turns[run]]
        each = statistics.median(wall) / len(batches)
        values: dict[str, Any] = {
            "data": name,
            "run": run,
            "seconds_per_step": each,
            "cpu_seconds_per_step": statistics.median(cpu) / len(batches),
            "walls": wall,
            "tokens_per_second": tokens / len(batches) / each,
            "flops_per_step": flops / len(batches),
            "share_of_rate": flops / len(batches) / each / peak,
            "product_rate": rates[run],
            "peak_bytes": memory[run],
            "compile_seconds": ready[run]["compile"],
            "programs": ready[run]["programs"],
            "losses": turns[run][0]["losses"],
            **about[run],
        }
        compared = ["", "", ""]
        if peer and run != PEER:
            theirs = turns[PEER]
            times = measure.ratio(wall, [turn["wall"] for turn in theirs])
            cpus = measure.ratio(cpu, [turn["cpu"] for turn in theirs])
            more = memory[run] / memory[PEER]
            values |= {"time": times, "cpu": cpus, "memory": more}
            compared = [str(times), str(cpus), f"{more:.2f}"]
        programs = ready[run]["programs"]
        compiled = f"{ready[run]['compile']:.1f} /{programs:2}" if programs else "-"
        cells = [
            name,
            run,
            f"{each:.3f}",
            compared[0],
            compared[1],
            f"{values['tokens_per_second']:.0f}",
            f"{100 * values['share_of_rate']:.0f} %",
            f"{memory[run] / 2**20:.0f}",
            compared[2],
            compiled,
        ]
        report.row(cells, values)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, with dependent defaults filled in."""
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=sorted(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer, for a shorter run")
    parser.add_argument("--vocab", type=int, help="tokens of the vocabulary")
    parser.add_argument("--batch", type=int, help="examples of a step (8)")
    parser.add_argument("--batches", type=int, help="different steps of a turn (3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--domains", nargs="+", choices=[*shapes.DOMAINS, "dense"], metavar="NAME"
    )
    parser.add_argument(
        "--dense", type=int, nargs=2, metavar=("ROWS", "LENGTH"), help="4 256"
    )
    parser.add_argument("--unroll", type=int, default=0, help="layers, ours; 0: auto")
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--device", choices=("cpu", "gpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of a device")
    parser.add_argument("--no-parity", action="store_true", help="skip the first check")
    args = parser.parse_args(given)
    seen = shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS") != "cpu"
    args.device = args.device or ("gpu" if seen else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "gpu" else "float32")
    args.preset = args.preset or ("smoke" if args.smoke else "smollm2-135m")
    # On a CPU each round takes minutes, most of them the padded run's.
    args.batch = args.batch or (4 if args.smoke else 8)
    args.batches = args.batches or (2 if args.smoke else 3)
    args.rounds = args.rounds or (2 if args.smoke or args.device == "cpu" else 4)
    args.dense = args.dense or ([2, 32] if args.smoke else [4, 256])
    args.domains = args.domains or [*shapes.DOMAINS, "dense"]
    args.rate_size = 256 if args.smoke else 2048 if args.device == "cpu" else 8192
    return args


def main(given: list[str] | None = None) -> None:
    """Checks that both compute the same, and measures every domain."""
    args = arguments(given)
    shape = shapes.SHAPES[args.preset]
    changes = {"layers": args.layers, "vocab_size": args.vocab}
    shape = dataclasses.replace(shape, **{k: v for k, v in changes.items() if v})
    peer = worker.peer_python(args.peers, "torch", "transformers", "peft")
    columns = dict(COLUMNS)
    if args.device == "gpu":
        columns = {"MFU" if k == "of rate" else k: v for k, v in columns.items()}
    if peer and not args.no_parity:
        # A large model's weights are not worth writing to disk: the code is the same.
        large = math.prod((shape.width, shape.mlp_width, shape.layers)) > 1e8
        small = shapes.SHAPES["smollm2-135m"]
        checked = dataclasses.replace(small, layers=4) if large else shape
        print(parity(args, checked, peer))
    report = measure.Report("lora_step", columns, args)
    failed = {}
    for name in args.domains:
        # A run that does not fit into memory must not waste the others' hours.
        try:
            measure_domain(name, args, shape, peer, report)
        except worker.WorkerError as error:
            failed[name] = " ".join(str(error).split())
            print(f"{name}: left out, {failed[name]}")
    report.close(
        "× are ours / peer: median [least, largest] of the rounds; below 1 is better",
        "compile s / programs: what the first step of every shape took beside its run",
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
