"""A step's time and memory along one size at a time: ``python -m benchmarks.growth``.

The sizes are layers, width, tokens of a row, LoRA rank, vocabulary (a plain step), and
calibration examples (a Fisher pass). Every point is compared with the first of its row.
If time grows with a size to the power p, p = log time / log size is shown beside the
size's own ratio.
"""

import dataclasses
import math

from benchmarks import measure, study

AXES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512),
    "tokens": (64, 128, 256, 512),
    "rank": (4, 16, 64),
    "vocabulary": (49_152, 128_256, 256_000),
    "calibration": (16, 32, 64, 128),
}
COLUMNS = {
    "size": -12,
    "value": 8,
    "ms": 10,
    "time ×": 19,
    "power": 6,
    "MiB": 9,
    "memory ×": 9,
}


def size_of(axis: str, value: int, smoke: bool) -> study.Size:
    """A small size with one number changed."""
    size = study.SMOKE if smoke else dataclasses.replace(study.SMALL, batch=8)
    if axis in ("rank", "calibration"):
        return dataclasses.replace(size, **{axis: value})
    if axis == "tokens":
        return dataclasses.replace(size, length=value)
    changes = {axis: value}
    if axis == "width":
        changes = {"width": value, "mlp_width": 11 * value // 4}
    if axis == "vocabulary":
        changes = {"vocab_size": value}
    return dataclasses.replace(size, shape=dataclasses.replace(size.shape, **changes))


def main(given: list[str] | None = None) -> None:
    """Measures every axis, all its points in turn."""
    parser = measure.parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), metavar="NAME")
    args = parser.parse_args(given)
    args.rounds = args.rounds or (2 if args.smoke else 6)
    report = measure.Report("growth", COLUMNS, args)
    for axis in args.axes or (("layers", "rank") if args.smoke else AXES):
        values = (2, 4) if args.smoke else AXES[axis]
        runs, memory = {}, {}
        for value in values:
            size = size_of(axis, value, args.smoke)
            if axis == "calibration":
                runs[str(value)] = measure.timed(study.Calibration(size, 16).fisher)
                continue
            steps = study.Steps("plain", size)
            runs[str(value)], memory[value] = measure.timed(steps), steps.bytes
        for run in runs.values():
            run()
        found = measure.interleave(runs, args.rounds)
        first = values[0]
        for value in values:
            times = measure.ratio(found[str(value)], found[str(first)])
            middle = sorted(found[str(value)])[args.rounds // 2]
            row = {"axis": axis, "value": value, "seconds": middle, "time": times}
            power, mib, share = "", "", ""
            if value != first:
                row["power"] = math.log(times.median) / math.log(value / first)
                power = f"{row['power']:.2f}"
            if value in memory:
                row["bytes"] = memory[value]
                mib = f"{memory[value] / 2**20:.0f}"
                share = f"{memory[value] / memory[first]:.2f}"
            cells = [axis, str(value), f"{1e3 * middle:.2f}", str(times), power]
            report.row([*cells, mib, share], row)
    report.close("×: over the first of the axis")


if __name__ == "__main__":
    main()
