"""The sequential job: every row and seed through every domain, resumable by stage.

For each method and seed: the method's ``init`` on the aligned model (initial SSI),
then for each domain train → monitor and repair → ``end_domain`` (SSI update) →
evaluate. A stage that is finished is never done again, so the same call continues
after a kill; ``results.jsonl`` is then, byte for byte, what an uninterrupted run writes
(on one machine and backend, seeds not mapped).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import errors
from sbr_jax.data.leaks import refuse_leaks
from sbr_jax.methods import METHODS, VARIANTS, Method
from sbr_jax.methods.base import as_aligned
from sbr_jax.models.lora import select_targets
from sbr_jax.training import code_record, loop, sharding
from sbr_jax.training.config import Config
from sbr_jax.training.finite import require_finite_base, require_number
from sbr_jax.training.program import Program, init_adapter, make_program
from sbr_jax.training.results import Workdir
from sbr_jax.training.stage_records import BASE, read_result, write_result
from sbr_jax.training.stages import EVALUATE, TRAIN
from sbr_jax.training.study import Study
from sbr_jax.training.track import Track, measure
from sbr_jax.typing import PyTree, UserError

PACKAGES = ("sbr_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def run(
    study: Study,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: str | Path,
    config: Config,
    domains: Sequence[str] | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    code: Callable[[str], str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs rows × seeds × domains, or what is left of them.

    Args:
      study: model, domains and measurements.
      methods: rows of ``METHODS`` and ``VARIANTS``, in table order.
      seeds: of adapters, data order and dropout.
      workdir: a new or empty folder, or one of the same study, settings and domains:
        then finished stages are kept, and other methods and seeds are added.
      config: of the job.
      domains: names in order; None for all in the study's order.
      notes: further JSON values that decide the results (a preset's name), written
        and compared with the configuration.
      code: of a row, a hash of the code that decides it, written beside the stages
        that this call computes.
      quiet: no progress bars and no lines.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError: before any work for an unknown name, an empty or leaking calibration
        set, wrong hyper-parameters, sizes that data or model cannot fill, or a folder
        of another run, or one whose stages are damaged; during work for a loss, an
        update or weights that are not finite, and where nothing can be written.
    """
    domains = tuple(study.domains) if domains is None else tuple(domains)
    methods, seeds = list(methods), [int(seed) for seed in seeds]
    check(study, methods, seeds, domains, config)
    wanted = {
        **(notes or {}),
        **config.mathematics(),
        "domains": list(domains),
        "fingerprint": study.fingerprint,
    }
    environment = {
        "versions": {name: _version(name) for name in PACKAGES},
        "hardware": {
            **dataclasses.asdict(config.hardware),
            "backend": jax.default_backend(),
        },
    }
    folder = Workdir(workdir)
    folder.check(wanted)
    programs = {row: make_program(row, study, config) for row in methods}
    mapped = _maps_seeds(config)
    order = [*METHODS, *VARIANTS]

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    with folder.opened(wanted, environment):
        mesh = next(iter(programs.values())).mesh
        base = sharding.place_base(mesh, study.model.params, study.model.config)

        def tracks_of(row: str, start_score: float | None) -> list[Track]:
            return [
                Track(
                    programs[row],
                    study,
                    base,
                    config,
                    seed,
                    domains,
                    folder,
                    start_score,
                    quiet=quiet,
                    say=say,
                )
                for seed in seeds
            ]

        for row in methods:
            for track in tracks_of(row, None):
                track.require_usable()
        start_score = _base_stage(study, base, config, domains, folder, say)
        for row in methods:
            tracks = tracks_of(row, start_score)
            last = tracks[0].number(len(domains) - 1, EVALUATE)
            left = [track for track in tracks if not track.finished(last)]
            if code is not None and left:
                by = code(row)
                for track in left:
                    code_record.add(track.folder(0).parent, by)
            for group in [tracks] if mapped else [[track] for track in tracks]:
                _run_group(group, domains, mapped)
                for track in group:
                    track.require_complete()
                folder.publish(order)
        return folder.publish(order)


def _run_group(group: list[Track], domains: tuple[str, ...], mapped: bool) -> None:
    """Tracks of one row, domain by domain; training together where mapped."""
    for track in group:
        track.init()
    for index in range(len(domains)):
        number = group[0].number(index, TRAIN)
        left = [track for track in group if not track.finished(number)]
        if mapped and len(left) > 1 and _mappable(left[0].method):
            _train_mapped(left, index)
        for track in group:
            track.train(index)
            track.repair(index)
            track.end_domain(index)
            track.evaluate(index)


def _mappable(method: Method) -> bool:
    """Whether seeds share their weights, and nothing happens between steps."""
    return method.refresh is None and method.prepare is as_aligned


def _train_mapped(tracks: list[Track], index: int) -> None:
    """One vmapped program for all seeds. Resumes by stage only."""
    began = time.perf_counter()
    first, domain = tracks[0], tracks[0].domains[index]
    program: Program = first.program
    starts, states = zip(*(track.begin(index) for track in tracks), strict=True)
    sources = [t.batches(t.dataset(domain), domain) for t in tracks]

    def batches(step: int) -> dict[str, np.ndarray]:
        return _stack([source(step) for source in sources], np.stack)

    done = loop.train(
        program.mapped_step,
        first.base,
        _stack(starts, jnp.stack),
        _stack(states, jnp.stack),
        batches,
        jnp.stack([track.key(2, domain) for track in tracks]),
        steps=first.config.training.steps_per_domain,
        where=[track.where(domain) for track in tracks],
        log_every=first.config.hardware.log_every,
        quiet=first.quiet,
    )
    share = done.seconds_per_step / len(tracks)
    for place, track in enumerate(tracks):
        own = loop.Trained(
            jax.tree.map(lambda x, i=place: x[i], done.train),
            None,
            {},
            done.seconds / len(tracks),
            share,
        )
        track.trained(index, own, loop.summarise(done.history, place), began)


def _stack(trees: Sequence[PyTree], stack: Callable[..., Any]) -> PyTree:
    return jax.tree.map(lambda *leaves: stack(leaves), *trees)


def _maps_seeds(config: Config) -> bool:
    """Whether seeds are mapped: on accelerators, or where asked for."""
    if config.hardware.vmap_seeds == "yes" and config.hardware.mesh is not None:
        raise UserError(
            "vmap_seeds='yes' with a mesh: expected one of the two; seeds run one "
            "after the other on a mesh"
        )
    if config.hardware.mesh is not None:
        return False
    if config.hardware.vmap_seeds == "auto":
        return jax.default_backend() != "cpu"
    return config.hardware.vmap_seeds == "yes"


def _base_stage(
    study: Study,
    base: PyTree,
    config: Config,
    domains: tuple[str, ...],
    folder: Workdir,
    say: Callable[[str], None],
) -> float | None:
    """Measures the aligned model once; returns the monitor's s_0."""
    path = folder.stage(BASE, None, 0, "base")
    record = read_result(path, folder.run)
    if record is None:
        began = time.perf_counter()
        require_finite_base(base, "base model")
        # A fresh adapter is no adapter (B = 0), and shares the compiled programs.
        adapter = init_adapter(study, config, 0)
        metrics = measure(study, base, adapter, domains)
        accuracies = [metrics[f"accuracy/{name}"] for name in domains]
        metrics["domain_accuracy"] = float(np.mean(accuracies))
        if study.probe is not None:
            score = study.probe(base, adapter)
            metrics["probe"] = require_number(score, "base model, probe")
        seconds = time.perf_counter() - began
        folder.require_held()
        record = write_result(
            path,
            run=folder.run,
            method=BASE,
            seed=None,
            stage="base",
            domain=None,
            index=-1,
            metrics=metrics,
            timing={"seconds": seconds},
        )
        shown = record["line"]["metrics"].get("composite")
        say(f"base  {seconds:.1f} s" + (f"  composite {shown:.4g}" if shown else ""))
    return record["line"]["metrics"].get("probe")


def check(
    study: Study,
    methods: Sequence[str],
    seeds: Sequence[int],
    domains: Sequence[str],
    config: Config,
) -> None:
    """Refuses what `run` would refuse, without the weights of the model.

    Args:
      study: its model may lack weights.
      methods: rows.
      seeds: of the runs.
      domains: in order.
      config: of the job.

    Raises:
      UserError: for the first mistake.
    """
    _check(study, methods, seeds, domains)
    _check_sizes(study, domains, config)
    _maps_seeds(config)


def _check(
    study: Study,
    methods: Sequence[str],
    seeds: Sequence[int],
    domains: Sequence[str],
) -> None:
    """Everything that can be refused before work is spent."""
    for kind, given in (("method", methods), ("seed", seeds), ("domain", domains)):
        errors.check_some(kind, given)
    errors.check_names("method", methods, [*METHODS, *VARIANTS])
    errors.check_names("domain", domains, study.domains)
    errors.check_names("seed", map(str, seeds), map(str, seeds))
    if min(seeds) < 0:
        raise UserError(f"expected seeds of at least 0, got {min(seeds)}")
    if len(study.calibration) == 0:
        raise UserError(
            "expected a safety calibration set with at least one example, got none"
        )
    for name in domains:
        if len(study.domains[name].train) == 0:
            raise UserError(f"expected training examples in domain {name}, got none")
    refuse_leaks(study.leak_check)


def _check_sizes(study: Study, domains: Sequence[str], config: Config) -> None:
    """Sizes that neither the data nor the model can fill."""
    for name in domains:
        size = len(study.domains[name].train)
        # A set of ten may be smaller than a batch; to see all of it twice is a mistake.
        if (batch := config.training.batch_size) >= 2 * size:
            raise UserError(
                f"expected training.batch_size to be less than {2 * size}, twice the "
                f"{size} training examples of domain {name}, got {batch}"
            )
    model = study.model.config
    targets = select_targets(config.training.lora_targets)
    sides = {name: min(model.projection(name)) for name in targets}
    least = min(sides, key=lambda name: sides[name])
    if config.training.lora_rank > sides[least]:
        raise UserError(
            f"expected training.lora_rank to be at most {sides[least]}, the smaller "
            f"side of {least}, got {config.training.lora_rank}: lower it, or change "
            "lora_targets"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
