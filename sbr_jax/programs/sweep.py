"""Run a named list of runs, seed by seed, and collect them in one table.

    python -m experiments.sweep NAME [--workdir DIR] [--seeds N] [--cells A B ...]
        [--jobs J] [--dry-run]
    python -m experiments.sweep --list

Each cell of the sweep (`recipes/sweeps.py`) is a working directory `DIR/CELL` of
`experiments.run` or `experiments.attack`, which can continue or report it. The first
seed of all cells runs first, so that a whole table appears early; with `--jobs` each
cell goes through its own seeds. Finished stages are kept: the same command continues
after a kill. A variant that refuses its settings does not stop the others; it is named
at the end.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sbr_jax import errors, recipes
from sbr_jax.methods import METHODS
from sbr_jax.programs import attack_job, cli, job, spread, terminal
from sbr_jax.programs.job import Job, JobArguments, make_job
from sbr_jax.programs.parsing import REQUIRED
from sbr_jax.programs.sweep_state import (
    Part,
    Sweep,
    clock,
    note_memory,
    remaining,
    spent,
    write_table,
)
from sbr_jax.recipes.sweeps import SWEEPS
from sbr_jax.reporting.tables import Table, to_markdown
from sbr_jax.settings import restore
from sbr_jax.typing import UserError

PROGRAM = cli.command("sweep")
MOST = 1000
"""Largest number of seeds or processes; a larger one is a typing mistake."""
POLL_SECONDS = 0.1
"""Seconds between looks at the running cells."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run a named sweep."""

    name: Annotated[tyro.conf.Positional[str], REQUIRED] = ""
    """Name of a sweep; --list shows them."""
    workdir: Path | None = None
    """Folder for the cells and the table; default: runs/NAME."""
    seeds: int = 5
    """Number of seeds, from 0 (or a cell's own first seed)."""
    cells: tuple[str, ...] = ()
    """Run only these cells; default: all."""
    jobs: int = 1
    """Cells to run at a time, each in its own process."""
    dry_run: bool = False
    """Print what is left and stop."""
    list: bool = False
    """List sweeps and their cells."""
    quiet: bool = False
    """Print nothing but errors."""


def make_sweep(arguments: Arguments) -> Sweep:
    """Checks a command line and every cell's settings."""
    if not arguments.name:
        known = ", ".join(SWEEPS)
        raise UserError(f"expected a sweep, got none (known: {known})")
    errors.check_names("sweep", [arguments.name], SWEEPS)
    for name in ("seeds", "jobs"):
        if not 1 <= getattr(arguments, name) <= MOST:
            raise UserError(
                f"--{name}: expected from 1 to {MOST}, got {getattr(arguments, name)}"
            )
    cells = SWEEPS[arguments.name]
    errors.check_names("cell", arguments.cells, cells)
    workdir = arguments.workdir or Path("runs") / arguments.name
    cli.check_folder(workdir)
    if (workdir / "config.json").exists():
        raise UserError(
            f"--workdir: {workdir} is the folder of one run; choose another for a sweep"
        )
    seeds = tuple(range(arguments.seeds))
    jobs = {
        name: make_cell(fields, workdir / name, seeds)
        for name, fields in cells.items()
        if not arguments.cells or name in arguments.cells
    }
    for cell in jobs.values():
        job.check_folder(cell)
    if (workdir / "table.md").exists() and not any(workdir.glob("*/config.json")):
        raise UserError(
            f"--workdir: expected to write {workdir}/table.md, found one there, but no "
            "cell of a sweep: choose another folder, or move it away"
        )
    return Sweep(arguments.name, workdir, jobs, seeds)


def make_cell(fields: Mapping[str, Any], folder: Path, seeds: tuple[int, ...]) -> Job:
    """The job of a cell, with the checks of its program."""
    known = ("preset", "methods", "domains", "changes", "attack", "first_seed")
    errors.check_names("field of a cell", fields, known)
    preset, first = recipes.load(fields["preset"]), fields.get("first_seed", 0)
    own = {
        "study": preset.study,
        "training": preset.training,
        "methods": preset.hyperparameters,
    }
    changes = fields.get("changes", {})
    errors.check_names("change of a cell", changes, own)
    made = {name: restore(own[name], changes.get(name, {}), name) for name in own}
    arguments: dict[str, Any] = {
        "study": made["study"],
        "training": made["training"],
        "hardware": preset.hardware,
        "hyperparameters": made["methods"],
        "workdir": folder,
        "methods": tuple(fields.get("methods") or METHODS),
        "seed": tuple(first + seed for seed in seeds),
        "domains": tuple(fields.get("domains", preset.domains)),
        "quiet": True,
    }
    if "attack" in fields:
        attack = attack_job.AttackArguments(**arguments, **fields["attack"])
        return attack_job.make_attack(preset, attack)
    return make_job(preset, JobArguments(**arguments))


@functools.lru_cache(maxsize=8)
def _study(options: Any, domains: tuple[str, ...], sources: Any, hardware: Any) -> Any:
    """Builds each study once, because programs are compiled for each study."""
    return options.build(domains, sources, hardware)


def summary(sweep: Sweep) -> str:
    """A sweep cell by cell: what is done, what is left, and the time it needs."""
    times = spent(sweep)
    left = [part for part in sweep.parts if not times.get(part, (0.0, False))[1]]
    rows = []
    for name, cell in sweep.jobs.items():
        mine = [part for part in left if part.cell == name]
        total = len(cell.methods) * len(sweep.seeds)
        ahead = clock(remaining(mine, times)) if mine else "–"
        count = f"{total - len(mine)} of {total}"
        rows.append((name, ", ".join(cell.methods), count, ahead))
    table = to_markdown(Table(("cell", "variants", "done", "left"), tuple(rows)))
    ahead = f", {clock(remaining(left, times))}" if left else ""
    count = f"{len(left)} of {len(sweep.parts)} variants and seeds left"
    return f"{table}\n\n{sweep.name}: {count}{ahead}"


def execute(sweep: Sweep, *, quiet: bool) -> None:
    """Runs the remaining parts, writing the table after each.

    Raises:
        UserError: at the end, naming the first part that could not be run.
    """
    failed: dict[Part, str] = {}
    total = len(sweep.parts)
    for number, part in enumerate(sweep.parts, 1):
        times = spent(sweep)
        rest = sweep.parts[number - 1 :]
        left = [p for p in rest if not times.get(p, (0.0, False))[1]]
        if part not in left:
            continue
        cell = sweep.jobs[part.cell]
        if not quiet:
            print(
                f"[{number}/{total}] {part.cell}  {part.variant}  seed {part.seed}  "
                f"(left: {clock(remaining(left, times))})",
                file=sys.stderr,
                flush=True,
            )
        one = dataclasses.replace(cell, methods=(part.variant,), seeds=(part.seed,))
        try:
            if isinstance(one, attack_job.AttackJob):
                attack_job.execute(one)
            else:
                study = _study(one.study, one.domains, one.sources, one.config.hardware)
                job.execute(one, study)
                note_memory(one, study, part.variant)
        except UserError as error:
            failed[part] = " ".join(str(error).split())
            if not quiet:
                print(f"failed: {failed[part]}", file=sys.stderr, flush=True)
        write_table(sweep)
    if failed:
        part, message = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {total} could not be run, the first being {part.cell}, "
            f"{part.variant}, seed {part.seed}: {message}"
        )


def cell_command(sweep: Sweep, name: str, *, quiet: bool) -> list[str]:
    """The command that runs one cell in a process of its own."""
    command = [*terminal.python("sbr_jax.programs"), "sweep", sweep.name]
    command += [f"--workdir={sweep.workdir}", "--cells", name]
    command += ["--seeds", str(len(sweep.seeds))]
    return [*command, *(["--quiet"] if quiet else [])]


def execute_cells(sweep: Sweep, jobs: int, *, quiet: bool) -> None:
    """Runs every cell in a process of its own with its own cores, ``jobs`` at a time.

    However this process ends, no cell outlives it; a later command could not use its
    folder.

    Raises:
        UserError: at the end, for cells that could not be finished.
    """
    environment = {**os.environ, terminal.PARENT: str(os.getpid())}
    waiting, running, failed = list(sweep.jobs), {}, []
    free = [spread.cores()[place::jobs] for place in range(jobs)]
    held: dict[str, list[int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, own = waiting.pop(0), free.pop(0)
                command = cell_command(sweep, name, quiet=quiet)
                with spread.on(own):
                    running[name] = subprocess.Popen(command, env=environment)
                held[name] = own
            ended = [name for name in running if running[name].poll() is not None]
            for name in ended:
                failed += [name] if running.pop(name).returncode else []
                free.append(held[name])
                write_table(sweep)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise UserError(f"could not finish {', '.join(failed)}; see the lines above")


def listing() -> str:
    """The sweeps and their cells, as `--list` prints them."""
    lines = []
    for name, cells in SWEEPS.items():
        lines += [name, *(f"  {cell}" for cell in cells)]
    return "\n".join(lines)


def sweep(args: Sequence[str]) -> None:
    """Carries out a command line."""
    arguments = cli.parse(Arguments, args, PROGRAM)
    if arguments.list:
        print(listing())
        return
    found = make_sweep(arguments)
    if not arguments.quiet:
        print(summary(found), flush=True)
    if arguments.dry_run:
        return
    if arguments.jobs > 1 and len(found.jobs) > 1:
        execute_cells(found, arguments.jobs, quiet=arguments.quiet)
    else:
        execute(found, quiet=arguments.quiet)
    if not arguments.quiet:
        print(f"table: {write_table(found)}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.start(sweep, args, None)
