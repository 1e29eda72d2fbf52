"""Deployed weights of a finished run: the weights that were evaluated.

A variant's ``deploy`` may change the trained weights before they are evaluated. This
module neither trains nor writes.
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
    """A finished run as a quiet job; no stage is loaded yet."""
    model, mesh = study.model, sharding.mesh_of(config.hardware)
    base = sharding.place_base(mesh, model.params, model.config)
    return Job(study, config, tuple(domains), base, RunFolder(folder), quiet=True)


def weights(
    job: Job, variant: str, seed: int, stage: int | None = None
) -> tuple[PyTree, PyTree]:
    """The weights that a variant and seed deploy after a stage (None: the last).

    Returns:
      ``(base, adapter)``; ``base`` is the job's own unless the variant changed it.

    Raises:
      UserError: if a later stage has replaced the state that is needed.
      DamagedError: if a stage or one of its checkpoints is missing or damaged.
    """
    track = Track(job, make_program(variant, job.study, job.config), seed)
    stages = track.stages
    numbers = [n for n in stages.numbers if stage is None or n <= stage]
    if track.method.deploy is as_trained:
        # Not `load`: the state is not needed, and a later stage may have replaced it.
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
    """The start model, then the weights each variant and seed finally deploys.

    The run in ``folder`` is finished; the caller gives its study, configuration and
    domains.

    Yields:
      Variant, seed and ``(base, adapter)``; ``("base", None, …)`` for the start model.
      Skips those in ``done``.
    """
    job = reopen(folder, study, config, domains)
    if (BASE, None) not in done:
        # A fresh adapter changes nothing (B = 0) and shares the compiled programs.
        yield BASE, None, (job.base, init_adapter(study, config, 0))
    for variant in variants:
        for seed in (seed for seed in seeds if (variant, seed) not in done):
            yield variant, seed, weights(job, variant, seed)
