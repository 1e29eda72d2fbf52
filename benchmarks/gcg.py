"""Times a GCG step against plain PyTorch: ``python -m benchmarks.gcg``.

One prompt, 20 suffix tokens, k = 256, as many candidates as requested. The peer follows
the paper: every candidate runs from its first token on. Ours does the same, and also
runs with the keys and values before the suffix cached, as an attack does.
"""

import contextlib
import tempfile
from typing import Any

import numpy as np

from benchmarks import measure, worker
from benchmarks.pair import add_options, ours_and_peer


def main(given: list[str] | None = None) -> None:
    """Runs all variants in turn."""
    parser = measure.parser(__doc__)
    add_options(parser)
    parser.add_argument("--candidates", type=int, default=128, help="512 published")
    parser.add_argument("--before", type=int, default=80, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    args = parser.parse_args(given)
    args.rounds = args.rounds or (2 if args.smoke else 4)
    peer = worker.peer_python(args.peers, "torch", "transformers")
    inside = args.smoke and peer is None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shape, job = ours_and_peer(args, folder)
        source = np.random.default_rng(0)
        draw = lambda n: source.integers(1, shape.vocab_size, n).tolist()  # noqa: E731
        job: dict[str, Any] = {
            **job,
            "what": "gcg",
            "before": draw(8 if args.smoke else args.before),
            "target": draw(10),
            "first": 5,
            "suffix": 20,
            "top_k": 32 if args.smoke else 256,
            "candidates": 32 if args.smoke else args.candidates,
            "chunk": 64,
            "steps": args.steps,
            "cached": False,
        }
        children = worker.both(stack, peer, job, folder, inside=inside)
        children["ours cached"] = stack.enter_context(
            worker.ours("jax_child", {**job, "cached": True}, inside=inside)
        )
        report = measure.Pairs("gcg", args)
        runs = {
            n: lambda c=c: c.ask("run")["wall"] / args.steps
            for n, c in children.items()
        }
        peers = [name for name in children if not name.startswith("ours")]
        pairs = [(n, p) for p in peers for n in ("ours", "ours cached")]
        pairs.append(("ours cached", "ours"))
        for child in children.values():
            child.ask("run")
        memory = {name: c.ask("memory")["peak"] for name, c in children.items()}
        report.measure(f"B = {job['candidates']}", runs, pairs, memory=memory)
    report.close("ms are of a step; losses of both fall, by draws of their own")


if __name__ == "__main__":
    main()
