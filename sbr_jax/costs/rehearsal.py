"""Finds a run's own refusals without weights and without training.

A variant's code refuses some things only once it has seen data and model (a rank that
no adapter holds, a layer that the model lacks, a part that the study does not have). So
that code runs on shapes: JAX traces it, and nothing is computed. By the time it asks
for a number, which a shape does not have, its checks of sizes have passed.
"""

import dataclasses
from typing import Any

import jax

from sbr_jax.typing import PyTree

UNKNOWN = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    AttributeError,
)
"""Errors that JAX raises if a traced program asks for a number, or for its location."""


class _Asked(Exception):
    """The variant has got as far as asking the study's judge."""


def _unasked(*args: Any, **kwargs: Any) -> Any:
    raise _Asked


def rehearse(job: Any, study: Any) -> None:
    """Refuses what the variants of a job would refuse before and between domains.

    Args:
        job: a `programs.job.Job`; its mesh may have other devices.
        study: its model may lack weights.

    Raises:
        UserError: the run's error, for the first such variant.
    """
    from sbr_jax.training.program import make_program

    # The judge is a model too, and the mesh may need devices that are not here.
    judge = None if study.judge is None else _unasked
    shown = dataclasses.replace(study, judge=judge)
    alone = dataclasses.replace(job.config.hardware, mesh=None)
    config = dataclasses.replace(job.config, hardware=alone)
    base = base_shapes(job, study)
    unaligned = study.unaligned
    if unaligned is None and getattr(job.study, "unaligned_folder", None):
        unaligned = base  # Checked before: it has the same architecture.
    for variant in job.methods:
        program = make_program(variant, shown, config)
        for name in job.domains:
            try:
                program.method.mix(program.problem, study.domains[name].train, 0)
            except _Asked:
                continue
        try:
            jax.eval_shape(_first_stage(program, shown, config), base, unaligned)
        except (*UNKNOWN, _Asked):
            continue


def base_shapes(job: Any, study: Any) -> PyTree:
    """Shapes and types of the base weights; dense if the study has none."""
    from sbr_jax.models import init_params

    if study.model.params is not None:
        return jax.eval_shape(lambda x: x, study.model.params)
    dtype = job.study.dtype
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), study.model.config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def _first_stage(program: Any, study: Any, config: Any) -> Any:
    """A run's code before the first step, with one seed: `prepare`, then `init`."""
    from sbr_jax.training.program import init_adapter

    def stage(base: PyTree, unaligned: PyTree) -> None:
        problem = dataclasses.replace(program.problem, unaligned=unaligned)
        adapter, key = init_adapter(study, config, 0), jax.random.key(0)
        prepared = program.method.prepare(problem, base, adapter, key)
        program.start(adapter, program.method.init(problem, prepared, adapter, key))

    return stage
