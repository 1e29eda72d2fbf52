"""Times N seeds in one mapped program against N runs: ``python -m benchmarks.seeds``.

Both cases take a step of all seeds: once as one vmapped program over stacked states,
once as N steps of the plain program. ``hardware.vmap_seeds`` chooses between them.
"""

import dataclasses

from benchmarks import measure, study

SEEDS = (2, 4)


def main(given: list[str] | None = None) -> None:
    """Measures plain and a projecting method on a small and a smaller model."""
    args = measure.options(__doc__, given)
    report = measure.Pairs("seeds", args)
    sizes = {"256 wide": study.SMALL}
    short = dataclasses.replace(study.SMALL.shape, width=64, mlp_width=176, layers=4)
    sizes["64 wide"] = dataclasses.replace(study.SMALL, shape=short, length=32)
    for name, size in ({"smoke": study.SMOKE} if args.smoke else sizes).items():
        made = study.make(size)
        for variant in ("plain",) if args.smoke else ("plain", "safeanchor-exact"):
            single = study.Steps(variant, size, made)
            for count in SEEDS[:1] if args.smoke else SEEDS:
                mapped = study.Steps(variant, size, made, seeds=count)
                once, turns = f"{variant}, {count} mapped", f"{count} runs"
                one = measure.timed(single, calls=count)
                report.measure(
                    name,
                    {
                        once: measure.timed(mapped),
                        turns: lambda one=one, count=count: count * one(),
                    },
                    [(once, turns)],
                    memory={once: mapped.bytes, turns: single.bytes},
                )
    report.close("memory ×: the mapped program over that of one seed")


if __name__ == "__main__":
    main()
