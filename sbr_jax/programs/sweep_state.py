"""State of a sweep: finished parts, remaining time, and its table."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.programs.job import Job
from sbr_jax.progress import duration
from sbr_jax.reporting.runs import read_run
from sbr_jax.reporting.tables import Cell, Table, comparison, row_cells, to_markdown

MEMORY = "memory.json"
"""File in a cell's folder with the bytes of one training step, by variant."""
LOST = "delete it, and the table has no memory for what is finished"


@dataclasses.dataclass(frozen=True)
class Part:
    """One variant of one cell with one seed, which runs in one go."""

    cell: str
    variant: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep: its cells as jobs, and its seeds.

    Attributes:
        name: of the sweep.
        workdir: parent folder of all cells.
        jobs: the job of each cell, with all its variants and seeds.
        seeds: positions 0 to N − 1 in a cell's seeds; a cell has its own first seed.
    """

    name: str
    workdir: Path
    jobs: Mapping[str, Job]
    seeds: tuple[int, ...]

    @property
    def parts(self) -> list[Part]:
        """All parts in order: every part of one seed before the next seed."""
        return [
            Part(name, variant, job.seeds[place])
            for place in range(len(self.seeds))
            for name, job in self.jobs.items()
            for variant in job.methods
        ]


def spent(sweep: Sweep) -> dict[Part, tuple[float, bool]]:
    """Seconds spent on every started part, and whether it is finished."""
    from sbr_jax.training.run_folder import RunFolder, read_config
    from sbr_jax.training.stages import last_of, name_of

    found: dict[Part, tuple[float, bool]] = {}
    for name, job in sweep.jobs.items():
        if not (job.workdir / "config.json").exists():
            continue
        number = last_of(len(read_config(job.workdir)["domains"]))
        folder = RunFolder(job.workdir)
        for record in folder.lines(job.methods):
            line = record["line"]
            if line["seed"] is None:
                continue
            part = Part(name, line["method"], line["seed"])
            last = folder.stage(part.variant, part.seed, number, name_of(number))
            seconds, _ = found.get(part, (0.0, False))
            seconds += record["timing"].get("seconds", 0.0)
            found[part] = seconds, (last / "result.json").exists()
    return found


def remaining(
    parts: Sequence[Part], times: Mapping[Part, tuple[float, bool]]
) -> float | None:
    """Estimates the seconds that these parts will take, from the finished parts.

    A part is taken to last as long as the same variant in the same cell, or else in
    other cells, or else as any part. Time already spent on it is subtracted.

    Returns:
        The estimate, or None if nothing is finished.

    >>> done = {Part("c", "plain", 0): (8.0, True), Part("c", "plain", 1): (3.0, False)}
    >>> remaining([Part("c", "plain", 1), Part("c", "sbr", 0)], done)
    13.0
    """
    done = {part: seconds for part, (seconds, whole) in times.items() if whole}
    total = 0.0
    for part in parts:
        alike = {p: s for p, s in done.items() if p.variant == part.variant}
        near = [s for p, s in alike.items() if p.cell == part.cell]
        near = near or list(alike.values()) or list(done.values())
        if not near:
            return None
        total += max(float(np.mean(near)) - times.get(part, (0.0, False))[0], 0.0)
    return total


def clock(seconds: float | None) -> str:
    """A duration in words.

    >>> clock(59.0), clock(9000.0), clock(None)
    ('about 59 s', 'about 2.5 h', 'time not known yet')
    """
    if seconds is None:
        return "time not known yet"
    return f"about {duration(round(seconds))}"


def note_memory(job: Job, study: Any, variant: str) -> None:
    """Records the memory of a variant's training step, once for each cell."""
    from sbr_jax.training.records import read_json, write_record

    path = job.workdir / MEMORY
    known = read_json(path, LOST) if path.exists() else {}
    if variant not in known:
        known[variant] = step_bytes(job, study, variant)
        write_record(path, known, indent=1)


def step_bytes(job: Job, study: Any, variant: str) -> int:
    """Peak memory of one training step, as the compiler plans it.

    It covers arguments, outputs and temporaries of the program that trains. Unlike a
    process's peak, it does not depend on what ran before.
    """
    import jax

    from sbr_jax.costs.devices import planned_bytes
    from sbr_jax.data.batches import batch
    from sbr_jax.methods import InertProjectionWarning
    from sbr_jax.training.program import init_adapter, make_program

    program = make_program(variant, study, job.config)
    adapter, base = init_adapter(study, job.config, 0), study.model.params
    with warnings.catch_warnings():
        # The run itself gave this warning.
        warnings.simplefilter("ignore", InertProjectionWarning)
        state = program.method.init(program.problem, base, adapter, jax.random.key(0))
    state = {name: value for name, value in state.items() if name != "diagnostics"}
    domain = study.domains[job.domains[0]].train
    data = program.method.mix(program.problem, domain, 0)
    lowered = program.step.lower(
        base,
        program.start(adapter, state),
        state,
        batch(data, job.config.training.batch_size, 0, 0),
        jax.random.key(0),
    )
    return planned_bytes(lowered.compile())


def merged_table(sweep: Sweep) -> Table:
    """Mean ± standard deviation over seeds, one line per variant of each cell."""
    from sbr_jax.training.records import read_json

    finished = {part.cell for part, (_, whole) in spent(sweep).items() if whole}
    lines, sizes = [], []
    for name, job in sweep.jobs.items():
        if name not in finished:
            continue
        found = read_run(job.workdir)
        path = job.workdir / MEMORY
        memory = read_json(path, LOST) if path.exists() else {}
        for variant in found.methods:
            if seeds := found.seeds(variant):
                head = (variant, name, str(len(seeds)))
                lines.append((head, row_cells(found, variant)))
                size = memory[variant] / 2**20 if variant in memory else None
                sizes.append(Cell(size).text())
    table = comparison(("method", "cell", "seeds"), lines)
    note = "step memory: arguments, outputs and temporaries of one compiled step; lower"
    table = table.with_column("step memory, MiB", sizes)
    return dataclasses.replace(table, notes=(*table.notes, note))


def write_table(sweep: Sweep) -> Path | None:
    """Writes `table.md` once the first part is finished.

    A sweep of one cell writes it into the cell's own folder, so that processes with one
    cell each do not write the same file.
    """
    from sbr_jax.training.records import write_atomically

    table = merged_table(sweep)
    if not table.rows:
        return None
    cells = list(sweep.jobs)
    folder = sweep.workdir / cells[0] if len(cells) == 1 else sweep.workdir
    notes = [f"- {note}" for note in table.notes]
    text = "\n".join([f"# {sweep.name}", "", to_markdown(table), "", *notes, ""])
    write_atomically(folder / "table.md", text)
    return folder / "table.md"
