"""What the rows of a run ship, out of its folder: the weights that were measured.

What a row trains is not always what it ships: its `deploy` comes in between. Nothing is
trained here, and nothing is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.typing import PyTree


def reopen(
    workdir: Path,
    row: str,
    seed: int,
    *,
    options: Mapping[str, Any],
    study: Any,
    base: PyTree,
    settings: Any,
    domains: Sequence[str],
) -> Any:
    """One row and seed of a run, with its finished stages to load.

    Args:
        workdir: the run's folder.
        row: method or ablation.
        seed: of the row.
        options: hyper-parameters of the row.
        study: the same that was run.
        base: the study's weights, placed.
        settings: of the training job.
        domains: the run's, in order.

    Returns:
        A `Track` that says nothing; none of its stages is loaded yet.
    """
    from sbr_jax.training.program import make_program
    from sbr_jax.training.results import Workdir
    from sbr_jax.training.track import Track

    return Track(
        make_program(row, tuple(sorted(options.items())), study, settings),
        study,
        base,
        settings,
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
    if plan.settings.mesh is not None:
        mesh = sharding.make_mesh(plan.settings.mesh)
    base = sharding.place_base(mesh, study.model.params, study.model.config)
    if (BASE, None) not in done:
        # A fresh adapter is no adapter (B = 0), and shares the compiled programs.
        yield BASE, None, (base, init_adapter(study, plan.settings, 0))
    for row in plan.methods:
        for seed in (seed for seed in plan.seeds if (row, seed) not in done):
            track = reopen(
                plan.workdir,
                row,
                seed,
                options=plan.row_options.get(row, {}),
                study=study,
                base=base,
                settings=plan.settings,
                domains=plan.domains,
            )
            track.load(track.number(len(plan.domains) - 1, EVALUATE))
            yield row, seed, track.deployed(track.adapter)
