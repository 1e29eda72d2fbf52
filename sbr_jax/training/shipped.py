"""What the rows of a run ship, out of its folder: the weights that were measured.

What a row trains is not always what it ships: its `deploy` comes in between. Nothing is
trained here, and nothing is written.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.typing import PyTree


def reopen(
    workdir: Path,
    row: str,
    seed: int,
    *,
    study: Any,
    base: PyTree,
    config: Any,
    domains: Sequence[str],
) -> Any:
    """One row and seed of a run, with its finished stages to load.

    Args:
        workdir: the run's folder.
        row: method or ablation.
        seed: of the row.
        study: the same that was run.
        base: the study's weights, placed.
        config: of the training job.
        domains: the run's, in order.

    Returns:
        A `Track` that says nothing; none of its stages is loaded yet.
    """
    from sbr_jax.training.program import make_program
    from sbr_jax.training.results import Workdir
    from sbr_jax.training.track import Track

    return Track(
        make_program(row, study, config),
        study,
        base,
        config,
        seed,
        tuple(domains),
        Workdir(workdir),
        None,
        quiet=True,
        say=lambda line: None,
    )


def deployments(
    plan: Any, study: Any, done: set[tuple[str, int | None]]
) -> Iterator[tuple[str, int | None, tuple[PyTree, PyTree]]]:
    """The start model, then what each row and seed ships after its last domain.

    Args:
        plan: of `experiments.run`; its run is finished.
        study: the same that was run.
        done: rows and seeds to pass over.

    Yields:
        Row, seed, and `(base, adapter)`.
    """
    from sbr_jax.training import sharding
    from sbr_jax.training.program import init_adapter
    from sbr_jax.training.stage_records import BASE
    from sbr_jax.training.stages import EVALUATE

    mesh = None
    if plan.config.hardware.mesh is not None:
        mesh = sharding.make_mesh(plan.config.hardware.mesh)
    base = sharding.place_base(mesh, study.model.params, study.model.config)
    if (BASE, None) not in done:
        # A fresh adapter is no adapter (B = 0), and shares the compiled programs.
        yield BASE, None, (base, init_adapter(study, plan.config, 0))
    for row in plan.methods:
        for seed in (seed for seed in plan.seeds if (row, seed) not in done):
            track = reopen(
                plan.workdir,
                row,
                seed,
                study=study,
                base=base,
                config=plan.config,
                domains=plan.domains,
            )
            track.load(track.number(len(plan.domains) - 1, EVALUATE))
            yield row, seed, track.deployed(track.adapter)
