"""The sequential job: every variant and seed through every domain, resumable by stage.

For each variant and seed: the method's ``init`` on the aligned model (initial SSI),
then for each domain train → monitor and repair → ``end_domain`` (SSI update) →
evaluate. A finished stage is never done again, so the same call continues after a kill.
``results.jsonl`` then equals that of an uninterrupted run byte for byte (on one machine
and backend, seeds not mapped).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbr_jax import checks, distributed, errors
from sbr_jax.data.leaks import refuse_leaks
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.methods.base import as_aligned
from sbr_jax.progress import task
from sbr_jax.training import code_record, loop, sharding, snapshot
from sbr_jax.training.config import Config
from sbr_jax.training.csm import check_rule, repair
from sbr_jax.training.finite import require_finite, require_number
from sbr_jax.training.mapped import maps_seeds, train_mapped
from sbr_jax.training.program import init_adapter, insert, make_program
from sbr_jax.training.run_folder import RunFolder
from sbr_jax.training.stage_records import BASE, Line, read_result, write_result
from sbr_jax.training.stages import EVALUATE, REPAIR, SUBSPACE, TRAIN, last_of
from sbr_jax.training.step import TrainState
from sbr_jax.training.streams import Stream
from sbr_jax.training.study import Study, check_sizes
from sbr_jax.training.track import (
    Held,
    Job,
    Outcome,
    Track,
    Turn,
    deployed,
    init_state,
    once,
    shown,
)
from sbr_jax.typing import PyTree, UserError

PACKAGES = ("sbr_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def run(
    study: Study,
    variants: Sequence[str],
    seeds: Sequence[int],
    workdir: str | Path,
    config: Config,
    domains: Sequence[str] | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    code: Callable[[str], str] | None = None,
    start_first: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs variants × seeds × domains, or the part that is not finished.

    Args:
      study: model, domains and evaluations.
      variants: names from ``METHODS`` and ``VARIANTS``, in table order.
      seeds: of adapters, data order and dropout.
      workdir: a new or empty folder, or that of a run with the same study, settings and
        domains: its finished stages are kept, new variants and seeds are added.
      config: of the job.
      domains: names in order; None for all in the study's order.
      notes: further JSON values that decide the results (a preset's name); they are
        written and compared with the configuration.
      code: maps a variant to a hash of its code, written beside the stages that this
        call computes.
      start_first: measure the aligned model before all training, so that mistakes in
        measuring show early; else when its score is first needed. Of several processes,
        one then finds the programs that another has compiled.
      quiet: print no progress bars and no lines.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError: before any work: for an unknown name, an empty or leaking calibration
        set, wrong hyper-parameters, sizes that the data or the model cannot meet, a
        folder of another run, or damaged stages. During work: for a loss, update or
        weights that are not finite, or a folder that cannot be written.
    """
    domains = tuple(study.domains) if domains is None else tuple(domains)
    variants, seeds = list(variants), checks.seeds(seeds)
    check(study, variants, seeds, domains, config)
    decides = {
        **(notes or {}),
        **config.mathematics(),
        "domains": list(domains),
        "fingerprint": study.fingerprint,
    }
    require_same(study, config)
    folder = RunFolder(workdir)
    folder.check(decides)
    programs = {name: make_program(name, study, config) for name in variants}
    order, mapped = [*METHODS, *VARIANTS], maps_seeds(config)
    with folder.opened(decides, _environment(config)):
        mesh = programs[variants[0]].mesh
        base = sharding.place_base(mesh, study.model.params, study.model.config)
        job = Job(study, config, domains, base, folder, quiet=quiet)
        for program in programs.values():
            for seed in seeds:
                Track(job, program, seed).stages.require_usable()
        start = functools.cache(functools.partial(evaluate_start, job))
        job = dataclasses.replace(job, start_score=start)
        require_finite(base, "base model")
        if start_first:
            start()
        for program in programs.values():
            tracks = [Track(job, program, seed) for seed in seeds]
            if code is not None:
                _note_code(tracks, code)
            for group in [tracks] if mapped else [[track] for track in tracks]:
                run_group(group)
                for track in group:
                    track.stages.require_complete()
                start()
                folder.publish(order)
        return folder.publish(order)


def check(
    study: Study,
    variants: Sequence[str],
    seeds: Sequence[int],
    domains: Sequence[str],
    config: Config,
) -> None:
    """Makes the checks of `run` before any work; the model may lack weights.

    Raises:
      UserError: for the first mistake.
    """
    for kind, given in (("method", variants), ("domain", domains)):
        errors.check_some(kind, given)
    errors.check_names("method", variants, [*METHODS, *VARIANTS])
    errors.check_names("domain", domains, study.domains)
    checks.seeds(seeds)
    refuse_leaks(study.leak_check)
    check_sizes(study, domains, config.training)
    if study.probe is not None:
        check_rule(config.training, study.probe_size)
    sharding.check_mesh(config.hardware, config.training, study.model.config)
    maps_seeds(config)


def require_same(study: Study, config: Config) -> None:
    """Refuses processes with different data or weights, or without a common mesh."""
    remedy = "give every host the same files"
    distributed.require_same("data or model", study.fingerprint, remedy)
    session = distributed.current()
    if session is not None and config.hardware.mesh is None:
        raise UserError(
            f"expected a mesh over the {jax.device_count()} devices of all "
            f"{session.count} processes, got none: add "
            f"{errors.option('mesh', f'fsdp={jax.device_count()}')}"
        )


def evaluate_start(job: Job) -> float | None:
    """Evaluates the aligned model once; returns the monitor's s_0, if it has one."""
    study, folder = job.study, job.folder
    path = folder.stage(BASE, None, 0, "base")
    record = distributed.decide(lambda: read_result(path, folder.run))
    if record is None:
        began = time.perf_counter()
        # A fresh adapter changes nothing (B = 0) and shares the compiled programs.
        adapter = init_adapter(study, job.config, 0)
        with task("start model, measured"):
            metrics = _scores(study, job.base, adapter, job.domains)
            accuracies = [metrics[f"accuracy/{name}"] for name in job.domains]
            metrics["domain_accuracy"] = float(np.mean(accuracies))
            if study.probe is not None:
                score = study.probe(job.base, adapter)
                metrics["probe"] = require_number(score, "base model, probe")
        seconds = time.perf_counter() - began
        folder.require_held()
        line = Line(BASE, None, "base", None, -1, metrics)
        timing = {"seconds": seconds}
        record = distributed.decide(
            lambda: write_result(path, folder.run, line, timing)
        )
        job.say(f"base  {seconds:.1f} s  {shown(metrics)}".rstrip())
    return record["line"]["metrics"].get("probe")


def run_group(tracks: Sequence[Track]) -> None:
    """Takes tracks of one variant through the domains; several train together."""
    held = [once(Turn(track, -1), 0, init, None) for track in tracks]
    method = tracks[0].method
    # Only seeds that share the base weights and do nothing between steps can.
    together = method.refresh is None and method.prepare is as_aligned
    for index in range(len(tracks[0].job.domains)):
        turns = [Turn(track, index) for track in tracks]
        if together:
            held = train_mapped(turns, held)
        for place, turn in enumerate(turns):
            for kind in turn.track.stages.kinds:
                stage = STAGES[kind]
                held[place] = once(turn, turn.number(kind), stage, held[place])


# --- the stages -----------------------------------------------------------------------


def init(turn: Turn, held: Held) -> Outcome:
    """Stage 0: the method's ``init`` on the aligned model."""
    state, diagnostics = init_state(turn.track, held.adapter)
    return Outcome(state=state, diagnostics=diagnostics)


def train(turn: Turn, held: Held) -> Outcome:
    """Trains on the domain, from its start or from a checkpoint inside it."""
    track, job, program = turn.track, turn.track.job, turn.program
    start = loop.Progress(program.start(held.adapter, held.state), held.state)
    start = _resumed(turn, start)
    begun = turn.begin(held.state)
    batches = track.batches(begun["examples"], turn.domain)
    key = track.key(Stream.STEPS, turn.domain)
    save = functools.partial(_checkpoint, turn, held.state)
    with track.stages.writing():
        done = loop.train(
            lambda train, state, step: program.step(
                track.base, train, state, batches(step), key
            ),
            start,
            program.problem.training.steps_per_domain,
            where=turn.where,
            log_every=job.config.hardware.log_every,
            refresh=_refresher(turn),
            checkpoint=loop.Every(job.config.hardware.checkpoint_every, save),
            quiet=job.quiet,
        )
    return Outcome(
        {**loop.summarise(done.history), **begun["metrics"]},
        done.train.adapter,
        done.state if track.method.refresh is not None else None,
        timing={"seconds_per_step": done.seconds_per_step},
    )


def end_domain(turn: Turn, held: Held) -> Outcome:
    """The method's ``end_domain``: a new subspace, a new reference or an edit."""
    track = turn.track
    problem = dataclasses.replace(
        track.program.problem, domain=turn.examples(held.state)
    )
    key = track.key(Stream.END_DOMAIN, turn.domain)
    adapter, state = track.method.end_domain(
        problem, track.base, held.adapter, held.state, key
    )
    state = dict(state)
    diagnostics = state.pop("diagnostics", {})
    mesh = track.program.mesh
    state = sharding.place_state(mesh, state, track.base)
    diagnostics = sharding.place_state(mesh, diagnostics)
    if adapter is held.adapter:
        return Outcome({}, None, state, diagnostics)
    return Outcome({}, sharding.place_state(mesh, adapter), state, diagnostics)


def evaluate(turn: Turn, held: Held) -> Outcome:
    """All scores after a domain."""
    track, job = turn.track, turn.track.job
    base, adapter = deployed(track, held.adapter, held.state)
    where = f"{turn.where}, weights to evaluate"
    require_finite(adapter, where)
    if base is not track.base:
        require_finite(base, where)
    return Outcome(_scores(job.study, base, adapter, job.domains[: turn.index + 1]))


STAGES = {TRAIN: train, REPAIR: repair, SUBSPACE: end_domain, EVALUATE: evaluate}


# --- parts of them --------------------------------------------------------------------


def _scores(
    study: Study, base: PyTree, adapter: PyTree, domains: Sequence[str]
) -> dict[str, float]:
    """The study's metrics and the test accuracy of some domains, 0 to 100."""
    metrics = {k: float(v) for k, v in study.evaluate(base, adapter).items()}
    for name in domains:
        metrics[f"accuracy/{name}"] = float(study.domains[name].evaluate(base, adapter))
    return metrics


def _resumed(turn: Turn, start: loop.Progress) -> loop.Progress:
    """The newest checkpoint inside the train stage, or its start."""
    like = snapshot.changed(start.train, start.state)
    partial = turn.track.stages.partial(turn.number(TRAIN), like)
    if partial is None:
        return start
    found, record = partial
    train, state = snapshot.put_back(found, start.train, start.state)
    if any(name.startswith("state") for name in found):
        opt_state = insert(train.opt_state, state)
        train = TrainState(train.adapter, opt_state, train.step)
    return loop.Progress(train, state, record["step"], record["history"])


def _checkpoint(turn: Turn, before: PyTree, now: loop.Progress) -> None:
    require_finite((now.train, now.state), f"{turn.where}, after step {now.step}")
    found = snapshot.changed(now.train, now.state, before)
    number = turn.number(TRAIN)
    turn.track.stages.save_partial(number, now.step, found, now.history)


def _refresher(turn: Turn) -> loop.Every | None:
    """The method's ``refresh`` inside a domain, if it has one."""
    track, program = turn.track, turn.track.program
    refresh, key = track.method.refresh, track.key(Stream.REFRESH, turn.domain)
    if refresh is None:
        return None

    def call(now: loop.Progress) -> loop.Progress:
        train, step_key = now.train, jax.random.fold_in(key, now.step)
        state = refresh(program.problem, track.base, train.adapter, now.state, step_key)
        state = {k: v for k, v in state.items() if k != "diagnostics"}
        state = sharding.place_state(program.mesh, state, track.base)
        opt_state = insert(train.opt_state, state)
        train = TrainState(train.adapter, opt_state, train.step)
        return dataclasses.replace(now, train=train, state=state)

    return loop.Every(track.method.refresh_every, call)


def _note_code(tracks: Sequence[Track], code: Callable[[str], str]) -> None:
    """Records the code of the tracks that are not finished."""
    last = last_of(len(tracks[0].job.domains))
    left = [track.stages for track in tracks if not track.stages.finished(last)]
    if left:
        by = code(left[0].variant)
        for stages in left:
            place = stages.path(0).parent
            distributed.decide(lambda place=place: code_record.add(place, by))


def _environment(config: Config) -> dict[str, Any]:
    """Versions and hardware of a run; recorded but not compared."""
    hardware = dataclasses.asdict(config.hardware)
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "hardware": {**hardware, "backend": jax.default_backend()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
