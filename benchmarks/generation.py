"""Times greedy answers against transformers: ``python -m benchmarks.generation``.

32 prompts of lengths like a real domain's, 64 new tokens each, one left-padded batch,
keys and values cached; the same random weights, read from one folder. The share of
equal tokens is printed: rounding decides some tokens, and then all that follow.
"""

import contextlib
import tempfile
from typing import Any

import numpy as np

from benchmarks import measure, shapes, worker
from benchmarks.pair import add_options, ours_and_peer


def main(given: list[str] | None = None) -> None:
    """Lets both answer in turn."""
    parser = measure.parser(__doc__)
    add_options(parser)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    args = parser.parse_args(given)
    args.rounds = args.rounds or (2 if args.smoke else 4)
    count, new = (4, 8) if args.smoke else (args.prompts, args.new)
    scale = 0.1 if args.smoke else 1.0
    peer = worker.peer_python(args.peers, "torch", "transformers")
    inside = args.smoke and peer is None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shape, job = ours_and_peer(args, folder)
        found = shapes.draw(
            shapes.DOMAINS["prose"], count, shapes.SEED, shape.vocab_size, scale
        )
        prompts = [
            tokens[:length].tolist()
            for tokens, length in zip(found["tokens"], found["length"], strict=True)
        ]
        job: dict[str, Any] = {**job, "prompts": prompts, "new": new}
        job["what"] = "generation"
        children = worker.both(stack, peer, job, folder, inside=inside)
        report = measure.Pairs("generation", args)
        runs = {n: lambda c=c: c.ask("run")["wall"] for n, c in children.items()}
        pairs = [("ours", name) for name in children if name != "ours"]
        for child in children.values():
            child.ask("run")
        memory = {name: c.ask("memory")["peak"] for name, c in children.items()}
        more = {"prompts": count, "new_tokens": new}
        middle = report.measure(
            f"{count} x {new}",
            runs,
            pairs or [("ours", "ours")],
            memory=memory,
            more=more,
        )
        for name, spent in middle.items():
            print(f"  {name}: {count * new / spent:.0f} new tokens/s")
        if pairs:
            answers = [np.array(c.ask("value")["value"]) for c in children.values()]
            print(f"  equal tokens: {100 * np.mean(answers[0] == answers[1]):.0f} %")
    report.close()


if __name__ == "__main__":
    main()
