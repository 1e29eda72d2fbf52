"""Analyses of the safety subspace, which turn a study into numbers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.analysis.coupling import causal, refusal_log_odds, steps
from sbr_jax.analysis.exhaustion import exhaustion as follow
from sbr_jax.analysis.harm_types import harm_types as compare_kinds
from sbr_jax.analysis.sensitivity import sensitivity as compare_sizes
from sbr_jax.analysis.sensitivity import usable_sizes
from sbr_jax.data import TokenDataset
from sbr_jax.data.batches import take
from sbr_jax.data.by_length import by_length
from sbr_jax.fisher import fisher_subspace
from sbr_jax.methods import resolve
from sbr_jax.methods._selectivity import half, held_out, shares_of
from sbr_jax.methods._ssi import Ssi
from sbr_jax.methods.base import LAYER_AXES
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.methods.probe import (
    activations,
    auroc,
    distinct_prompts,
    fit_probe,
    probe_risk,
)
from sbr_jax.models import is_lora_pair
from sbr_jax.reporting.runs import Run, layers_by_unit, read_run
from sbr_jax.studies.examples import (
    Examples,
    build_examples,
    direction,
    request_sets,
    with_direction,
)
from sbr_jax.studies.options import StudyOptions, WorldOptions
from sbr_jax.subspace import Subspace, effective_rank
from sbr_jax.training.study import Study
from sbr_jax.typing import PyTree, UserError

MOST_DOMAINS = 20
MAX_RANK, ENERGY = 64, 0.9
"""Rank cap and energy of a subspace, as published."""
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Step lengths of the causal test: norms of the whole adapter's change."""
DRAWS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Job, study and examples that the analyses share.

    Attributes:
        job: a `programs.job.Job`, or an object with its attributes.
        examples: largest number in each half of a kind, or in each measured set.
        domains: for exhaustion; empty for all of them.
        results: a finished run for exhaustion to read, instead of a new one.
    """

    job: Any
    examples: int = 60
    domains: tuple[str, ...] = ()
    results: Path | None = None

    @functools.cached_property
    def study(self) -> Study:
        """The preset's study."""
        return self.make_study(self.job.domains)

    def make_study(self, domains: Sequence[str]) -> Study:
        """The study over other domains."""
        return self.job.make_study(tuple(domains))

    @functools.cached_property
    def by_kind(self) -> Examples:
        """Examples of the testbed by kind."""
        return build_examples(
            self.study.model.tokenizer, self.job.study, examples=self.examples
        )

    @functools.cached_property
    def risky_and_harmless(self) -> Mapping[str, Mapping[str, TokenDataset]]:
        """Held-out prompts, `harmful` and `harmless`."""
        found = request_sets(self.study.model.tokenizer, self.job.study)
        # Keeps the probe from taking a domain's topic for harm.
        domains = {name: d.train for name, d in self.study.domains.items()}
        harmless = {**found["harmless"], **domains}
        return {"harmful": found["harmful"], "harmless": harmless}

    @functools.cached_property
    def adapter(self) -> PyTree:
        """A fresh adapter with the job's settings."""
        from sbr_jax.training.program import init_adapter

        return init_adapter(self.study, self.job.config, 0)

    def subspace(
        self, data: TokenDataset, start: int = 0, stop: int | None = None
    ) -> Subspace:
        """The subspace of the aligned model on some rows of a data set."""
        model, batch = self.study.model, self.job.config.hardware.fisher_microbatch
        chosen = take(data, range(len(data))[start:stop])
        least = min(
            pair.lora_a[0].size + pair.lora_b[0].size for pair in self.adapter.values()
        )
        return fisher_subspace(
            answer_loss(model.apply_fn, "sum"),
            self.adapter,
            by_length(chosen, batch, least=batch),
            max_rank=min(MAX_RANK, least),
            energy=ENERGY,
            unit=is_lora_pair,
            layer_axes=LAYER_AXES,
            args=(model.params,),
            microbatch=batch,
            memory_budget=self.job.config.training.memory_bytes,
        )

    def run(self, study: Study, domains: Sequence[str], name: str) -> Run:
        """Runs the variants through domains, in a subfolder of the job's folder."""
        from sbr_jax.training import pipeline

        job, folder = self.job, self.job.workdir / name
        pipeline.run(
            study,
            job.methods,
            job.seeds,
            folder,
            job.config,
            tuple(domains),
            notes={"analysis": name, **job.notes()},
            quiet=job.quiet,
        )
        return read_run(folder)


def harm_types(context: Context) -> dict[str, Any]:
    """Subspaces of single kinds, each from two disjoint halves."""
    sets = dict(context.by_kind.kinds)
    random = context.study.calibration_controls.get("random")
    count = min(len(data) // 2 for data in sets.values())
    if random is not None and len(random) >= 2 * count:
        sets["random tokens"] = random
    halves = {
        kind: (
            context.subspace(data, 0, count),
            context.subspace(data, count, 2 * count),
        )
        for kind, data in sets.items()
    }
    return {"examples": count, **compare_kinds(halves)}


def sensitivity(context: Context) -> dict[str, Any]:
    """Subspaces of the first N_s calibration examples, and of the next N_s."""
    data = context.study.calibration
    sizes = usable_sizes(len(data))
    whole = {n: context.subspace(data, 0, n) for n in sizes}
    twins = {n: context.subspace(data, n, 2 * n) for n in sizes if 2 * n <= len(data)}
    return compare_sizes(whole, twins)


def exhaustion(context: Context) -> dict[str, Any]:
    """Ranks, removed gradient and accuracy over many domains, by variant."""
    if context.results is not None:
        return exhaustion_of(read_run(context.results))
    domains = context.domains
    if not domains:
        known = tuple(context.job.study.known_domains())
        # Other studies may lack the data of a known domain.
        domains = known[:MOST_DOMAINS] if labelled(context.job.study) else ()
    domains = domains or context.job.domains
    return exhaustion_of(
        context.run(context.make_study(domains), domains, "exhaustion")
    )


def exhaustion_of(found: Run) -> dict[str, Any]:
    """Exhaustion of every variant of a run.

    Raises:
        UserError: when no variant has accuracies.
    """
    plain = found.accuracy("plain")
    variants = {}
    for variant in found.methods:
        accuracy = found.accuracy(variant)
        if not len(accuracy):
            continue
        ranks, cap = _ranks(found, variant)
        removed = [
            [
                line["metrics"].get("removed")
                for line in found.lines
                if (line["method"], line["seed"], line["stage"])
                == (variant, seed, "train")
            ]
            for seed in found.seeds(variant)
        ]
        known = all(value is not None for seed in removed for value in seed)
        variants[variant] = follow(
            found.domains,
            accuracy,
            ranks=ranks,
            cap=cap,
            removed=removed if known else None,
            reference=plain if len(plain) and variant != "plain" else None,
        )
    if not variants:
        raise UserError(
            f"exhaustion: expected accuracies of every domain in {found.folder}, got "
            "none; continue that run, or name another"
        )
    return variants


def _ranks(found: Run, variant: str) -> tuple[np.ndarray | None, int | None]:
    """Effective ranks ``[1 + T, U]`` of a variant and their cap, or None."""
    seen = dict(found.diagnostics(variant, "subspace", "effective_rank"))
    spectra = found.diagnostics(variant, "subspace", "spectrum")
    if -1 not in seen or not spectra:
        return None, None
    ranks: list[np.ndarray] = []
    for index in range(-1, len(found.domains)):
        # A variant that keeps its first subspace reports it once.
        value = layers_by_unit(seen.get(index))
        ranks.append(np.concatenate(list(value.values())) if value else ranks[-1])
    widths = (unit.shape[-1] for unit in layers_by_unit(spectra[0][1]).values())
    return np.stack(ranks), max(widths)


def coupling(context: Context) -> dict[str, Any]:
    """Drift of the refusal direction over domains, and the causal test."""
    study, examples = context.study, context.by_kind
    tracked = with_direction(study, examples)
    found = context.run(tracked, context.job.domains, "coupling")
    names = ("direction_cosine", "refusal_log_odds", "refusal")
    tracks = {
        name: {variant: found.metric(variant, name) for variant in found.methods}
        for name in names
    }
    benign = study.calibration_controls.get("benign")
    directions = steps(
        jax.random.key(0),
        context.adapter,
        context.subspace(study.calibration),
        None if benign is None else context.subspace(benign),
        draws=DRAWS,
    )
    base = study.model.params
    tested = causal(
        lambda adapter: (
            direction(study.model, base, adapter, examples),
            refusal_log_odds(
                study.model, base, adapter, examples.refusing, examples.complying
            ),
        ),
        context.adapter,
        directions,
        STEPS,
    )
    return {"stages": found.stages, **tracks, "causal": tested}


def probe(context: Context) -> dict[str, Any]:
    """AUROC of the risk probe on unseen prompts, by layer.

    Raises:
        UserError: if the study has no harmful or no benign prompts.
    """
    study, model = context.study, context.study.model
    harmful, benign = study.harmful, study.calibration_controls.get("benign")
    if harmful is None or benign is None:
        raise UserError(
            "probe: expected harmful and calibration_controls['benign'] in the study, "
            "got not both: the probe learns to tell their prompts apart"
        )

    def states(data: TokenDataset) -> np.ndarray:
        """``[N, L + 1, D]``."""
        found = activations(model.apply_fn, model.params, None, distinct_prompts(data))
        return found.reshape(len(found), model.config.layers + 1, -1)

    fitted = {1: harmful, 0: benign}
    seen = {label: states(data) for label, data in fitted.items()}
    labels = np.repeat(list(seen), [len(part) for part in seen.values()])
    examples = np.concatenate(list(seen.values()))
    layers = range(examples.shape[1])
    # First all layers together, as the defence reads them, then each by itself.
    readings = [list(layers), *([layer] for layer in layers)]
    probes = [
        fit_probe(
            examples[:, which].reshape(len(examples), -1), labels, key=jax.random.key(0)
        )
        for which in readings
    ]
    unseen = {
        side: {name: states(data) for name, data in sets.items()}
        for side, sets in context.risky_and_harmless.items()
    }
    pairs = {
        name: {
            other: [
                _auroc(p, harmful[:, which], harmless[:, which])
                for p, which in zip(probes, readings, strict=True)
            ]
            for other, harmless in unseen["harmless"].items()
        }
        for name, harmful in unseen["harmful"].items()
    }
    return {
        "fitted": len(examples),
        "validation": float(probes[0].auroc),
        "calibration_error": float(probes[0].calibration_error),
        "auroc": pairs,
    }


def _auroc(found: Any, harmful: np.ndarray, harmless: np.ndarray) -> float:
    """AUROC of a probe on harmful and harmless states ``[N, layers, D]``."""
    sides = [x.reshape(len(x), -1) for x in (harmful, harmless)]
    scores = probe_risk(found, jnp.asarray(np.concatenate(sides)))
    return auroc(np.asarray(scores), np.repeat([1, 0], [len(x) for x in sides]))


def selectivity(context: Context) -> dict[str, Any]:
    """Shares of held-out safety and of other gradients in each row's subspace.

    Raises:
        UserError: if no row projects anything.
    """
    from sbr_jax.training.program import make_program

    study, job = context.study, context.job
    at = study.model.params, context.adapter
    halves: dict[str, tuple[Ssi, Any, Subspace]] = {}
    for variant in job.methods:
        _, options = resolve(variant, job.config.methods)
        if getattr(options, "projection", "none") == "none":
            continue
        ssi, problem = Ssi.of(options), make_program(variant, study, job.config).problem
        found = half(ssi, problem, *at, jax.random.key(0))
        if found is not None:
            halves[variant] = ssi, problem, found
    means: dict[str, dict[str, float]] = {variant: {} for variant in halves}
    # Rows that see the same gradients share a pass over each set.
    for seen in dict.fromkeys(map(_sees, halves.values())):
        group = {v: x for v, x in halves.items() if _sees(x) == seen}
        ssi, problem, _ = next(iter(group.values()))
        sets = {"held out": held_out(problem)}
        sets |= {name: domain.train for name, domain in study.domains.items()}
        controls = study.calibration_controls.items()
        sets |= {f"{name} control": x for name, x in controls}
        for name, dataset in sets.items():
            subspaces = [subspace for *_, subspace in group.values()]
            most = context.examples
            found = shares_of(ssi, problem, *at, dataset, subspaces, most)
            for variant, tree in zip(group, found, strict=True):
                layers = [np.mean(x) for x in jax.tree.leaves(tree)]
                means[variant][name] = float(np.mean(layers))
    rows = {}
    for variant, (*_, subspace) in halves.items():
        held = means[variant].pop("held out")
        ranks = [np.mean(x) for x in jax.tree.leaves(effective_rank(subspace))]
        rows[variant] = {
            "rank": float(np.mean(ranks)),
            "held_out": held,
            "share": means[variant],
            "selectivity": {
                k: held / v if v else None for k, v in means[variant].items()
            },
        }
    if not rows:
        raise UserError(
            "selectivity: expected rows that project, got "
            f"{', '.join(job.methods)}: add --methods safeanchor-exact"
        )
    return {"examples": len(study.calibration) // 2, "rows": rows}


def _sees(row: tuple[Ssi, Any, Subspace]) -> tuple[Any, ...]:
    """The settings of a row that decide which gradients its shares are measured on."""
    return row[0].calibration_tokens, row[0].reduction


ANALYSES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "harm-types": harm_types,
    "sensitivity": sensitivity,
    "exhaustion": exhaustion,
    "coupling": coupling,
    "probe": probe,
    "selectivity": selectivity,
}
LABELLED = ("harm-types", "coupling", "probe")
"""Analyses that need to know the kind of each example."""


def labelled(options: StudyOptions) -> bool:
    """Whether a study uses a testbed's world, where each example's kind is known."""
    return isinstance(options, WorldOptions)
