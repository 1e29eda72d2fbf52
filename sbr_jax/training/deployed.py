"""Deployed weights out of a finished run: those that were evaluated.

What a variant trains is not always what it deploys: its ``deploy`` comes in between.
Nothing is trained here, and nothing is written.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from sbr_jax.errors import option
from sbr_jax.methods.base import as_trained
from sbr_jax.training import sharding
from sbr_jax.training.config import Config
from sbr_jax.training.program import init_adapter, make_program
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import BASE
from sbr_jax.training.study import Study
from sbr_jax.training.track import Job, Track, deployed, load, restore
from sbr_jax.typing import PyTree, UserError


def reopen(
    folder: Path | str, study: Study, config: Config, domains: Sequence[str]
) -> Job:
    """A finished run as a job that says nothing; none of its stages is loaded yet."""
    model, mesh = study.model, sharding.mesh_of(config.hardware)
    base = sharding.place_base(mesh, model.params, model.config)
    return Job(study, config, tuple(domains), base, RunFolder(folder), quiet=True)


def weights(
    job: Job, variant: str, seed: int, stage: int | None = None
) -> tuple[PyTree, PyTree]:
    """What a variant and seed deploy after the stage of a number; None for the last.

    Returns:
      ``(base, adapter)``; the job's own ``base`` where it was not changed.

    Raises:
      UserError: where a later stage has replaced what is deployed.
      DamagedError: where a stage, or what it left, is missing or damaged.
    """
    track = Track(job, make_program(variant, job.study, job.config), seed)
    stages = track.stages
    numbers = [n for n in stages.numbers if stage is None or n <= stage]
    if track.method.deploy is as_trained:
        # Not `load`: the state is not asked for, and may have been replaced since.
        stages.require_finished(numbers)
        holder = stages.holder("adapter", numbers[-1] + 1)
        adapter = track.first_adapter()
        if holder is not None:
            adapter = restore(track, holder / "adapter", adapter)
        return track.base, adapter
    if not any((stages.path(n) / "state").is_dir() for n in numbers):
        raise UserError(
            f"{option('stage', stage)}: expected the state from which {track.name} "
            "makes its deployed weights, but a later stage has replaced it: name a "
            "later one"
        )
    held = load(track, numbers[-1] + 1)
    return deployed(track, held.adapter, held.state)


def deployments(
    folder: Path | str,
    study: Study,
    config: Config,
    variants: Sequence[str],
    seeds: Sequence[int],
    domains: Sequence[str],
    done: Collection[tuple[str, int | None]] = (),
) -> Iterator[tuple[str, int | None, tuple[PyTree, PyTree]]]:
    """The start model, then what each variant and seed deploys after its last domain.

    Of a finished run, whose study, configuration and domains are given.

    Yields:
      Variant, seed, and ``(base, adapter)``; ``("base", None, …)`` for the start. Those
      in ``done`` are passed over.
    """
    job = reopen(folder, study, config, domains)
    if (BASE, None) not in done:
        # A fresh adapter is no adapter (B = 0), and shares the compiled programs.
        yield BASE, None, (job.base, init_adapter(study, config, 0))
    for variant in variants:
        for seed in (seed for seed in seeds if (variant, seed) not in done):
            yield variant, seed, weights(job, variant, seed)
