"""Times every method's step against plain LoRA's: ``python -m benchmarks.methods``.

A random Llama of width 256 and 6 layers, 16 full rows of 128 tokens. Memory is what the
compiled program plans for its arguments, results and intermediates. A method's work
outside its steps (a Fisher before a domain, a stage before training) is not included:
``sbr-jax run PRESET --dry-run`` forecasts it, and ``benchmarks.fisher`` measures it.
"""

from benchmarks import measure, study
from sbr_jax.methods import METHODS, VARIANTS

SMOKE = ("plain", "interleaving")


def main(given: list[str] | None = None) -> None:
    """Measures all methods, each in turn with plain."""
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *VARIANTS], metavar="NAME"
    )
    args = parser.parse_args(given)
    args.rounds = args.rounds or (2 if args.smoke else 6)
    size = study.SMOKE if args.smoke else study.SMALL
    report = measure.Pairs("methods", args)
    made = study.make(size)
    plain = study.Steps("plain", size, made)
    for name in args.methods or (SMOKE if args.smoke else METHODS):
        if name == "plain":
            continue
        one = study.Steps(name, size, made)
        report.measure(
            f"{size.shape.layers} x {size.shape.width}",
            {name: measure.timed(one), "plain": measure.timed(plain)},
            [(name, "plain")],
            memory={name: one.bytes, "plain": plain.bytes},
        )
    report.close()


if __name__ == "__main__":
    main()
