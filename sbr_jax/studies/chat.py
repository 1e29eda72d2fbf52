"""The study on a chat model: real data in its template, real measurements, a monitor.

Everything is read and checked before the weights are: prompts that two sets share,
sizes, lengths, the template. What a study was made of goes into `config.json`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.data.exchange import stop_tokens
from sbr_jax.data.registry import data_folder
from sbr_jax.data.template import process_date, reads_clock
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import check_names
from sbr_jax.evaluation import verdict_rates
from sbr_jax.evaluation.benchmarks import (
    BENCHMARKS,
    PreparedBenchmark,
    prepare,
    record,
)
from sbr_jax.evaluation.composite import headlines
from sbr_jax.evaluation.domain_scores import Remembered, TokenAccuracy, choice_accuracy
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.judges.guard import GuardJudge
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.scorer import Budget
from sbr_jax.models import Model
from sbr_jax.settings import Hardware
from sbr_jax.studies import chat_model, dates
from sbr_jax.studies.chat_data import source_of
from sbr_jax.studies.chat_parts import Parts, Split, make_parts
from sbr_jax.studies.options import ChatOptions, Sources
from sbr_jax.studies.stories import random_tokens
from sbr_jax.training.study import Domain, Study
from sbr_jax.typing import PyTree, UserError

Score = Callable[[PyTree, PyTree], dict[str, float]]
"""`(base, adapter) -> metrics` of one measurement."""

CODE_MEASURE = "humaneval"
"""What the code domain is examined with, where its answers may be run."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatStudy(Study):
    """A study that can say what it will cost.

    Its `notes` hold sources and sizes of the data, what was left out, judges and
    measurements: counts and names only.

    Attributes:
        asked: of each measurement and the probe, how many prompts, and characters of
            the average one.
    """

    asked: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)


def build_study(
    domains: Sequence[str],
    options: ChatOptions,
    sources: Sources,
    hardware: Hardware = Hardware(),
    *,
    weights: bool = True,
) -> ChatStudy:
    """Builds the study.

    Args:
        domains: names of `ROLES` (medical, legal, code) or of data sets, in order.
        options: of the study.
        sources: a checkpoint of a chat model or its id on the hub, and a folder with a
            folder for each data set.
        hardware: how weights are spread and answers batched.
        weights: False leaves them out: everything is checked, nothing can be run.

    Returns:
        The study.

    Raises:
        UserError: for anything missing or damaged, a model without a chat template,
            empty parts, prompts that are too long, and sets that share prompts.
    """
    if sources.model is None or sources.data is None:
        raise UserError(f"expected a model and data, got {sources}")
    model_folder, chosen = sources.model, options
    folder = _data_folder(sources.data)
    model, _ = chat_model.read_record(
        model_folder, date=chosen.date, thinking=chosen.thinking
    )
    judge = _judge(chosen, weights=False)
    # Every other checkpoint too, before hours go into this one.
    places = chat_model.locate_all(model_folder, chosen, weights=False)
    chat_model.check_unaligned(places, model.config)
    names = _examined(domains, chosen, folder)
    measured = _measurements(names, chosen, folder, judge)
    asked = {name: m.prompts for name, m in measured.items()}
    parts = make_parts(domains, chosen, folder, model, asked)
    described = record(measured.values(), judge, folder)
    notes = {"data": parts.record, **described, **_rendering(model, judge, chosen)}
    sizes = {name: _size(p) for name, p in {**asked, "probe": parts.probe}.items()}
    if weights:
        places = chat_model.locate_all(model_folder, chosen, weights=True)
        loaded = chat_model.load_model(
            places["model"],
            dtype=chosen.dtype,
            quantize=chosen.quantize,
            mesh=hardware.mesh,
            remat=hardware.remat,
        )
        model = dataclasses.replace(loaded, tokenizer=model.tokenizer)
        judge = _judge(chosen, weights=True)
        measured = _measurements(names, chosen, folder, judge)
    runner = _runner(model, chosen, hardware)
    scores = {name: _score(m, runner) for name, m in measured.items()}
    sets = parts.sets
    noise = random_tokens(sets["calibration"], model.config.vocab_size, seed=0)
    return ChatStudy(
        model=model,
        domains={
            name: Domain(
                train=sets[f"train {name}"],
                evaluate=_accuracy(
                    split, sets[f"test {name}"], model, runner, chosen, scores
                ),
            )
            for name, split in parts.domains.items()
        },
        calibration=sets["calibration"],
        calibration_controls={"benign": sets["benign control"], "random": noise},
        safety_mix=sets["safety mix"],
        harmful=sets["harmful"],
        unaligned=_unaligned(places, chosen, hardware) if weights else None,
        judge=chat_model.risk_judge(judge, model.tokenizer),
        evaluate=_evaluate([scores[name] for name in chosen.benchmarks]),
        probe=_probe(parts.probe, judge, runner, chosen),
        fingerprint=_fingerprint(places, parts, asked, model, chosen),
        leak_check=parts.leaks,
        notes=notes,
        asked=sizes,
    )


def _data_folder(folder: str | Path) -> Path:
    found = data_folder(folder)
    if not found.is_dir():
        raise UserError(f"--data: expected a folder, got the file {found}")
    return found


def _size(prompts: Sequence[str]) -> tuple[int, float]:
    return len(prompts), sum(map(len, prompts)) / max(len(prompts), 1)


def _judge(options: ChatOptions, *, weights: bool) -> Judge:
    return chat_model.make_judge(
        options.judge,
        options.judge_folder,
        dtype=options.dtype,
        weights=weights,
        date=options.date,
    )


def _rendering(model: Model, judge: Judge, options: ChatOptions) -> dict[str, Any]:
    """The date that was told, if a template asks for it."""
    tokenizers = [model.tokenizer]
    if isinstance(judge, GuardJudge):
        tokenizers.append(judge.model.tokenizer)
    if not any(map(reads_clock, tokenizers)):
        return {}
    return {dates.KEY: {"date": options.date or process_date()}}


# --- measuring ------------------------------------------------------------------------


def _examined(
    domains: Sequence[str], options: ChatOptions, folder: Path
) -> tuple[str, ...]:
    """Every measurement of the study: those of safety, and of a domain's accuracy."""
    check_names("benchmark", options.benchmarks, BENCHMARKS)
    code = any(_runs_code(source_of(name, folder), options) for name in domains)
    return tuple(
        dict.fromkeys([*options.benchmarks, *([CODE_MEASURE] if code else [])])
    )


def _runs_code(source: str, options: ChatOptions) -> bool:
    return options.allow_code and source.startswith("codealpaca")


def _measurements(
    names: Sequence[str], options: ChatOptions, folder: Path, judge: Judge
) -> dict[str, PreparedBenchmark]:
    return {
        name: prepare(
            name,
            folder,
            limit=options.limit,
            judge=judge,
            allow_code=options.allow_code,
            output=Path(options.output_folder) if options.output_folder else None,
            max_new_tokens=None
            if BENCHMARKS[name].answer_tokens
            else options.max_new_tokens,
        )
        for name in names
    }


def _runner(
    model: Model, options: ChatOptions, hardware: Hardware
) -> Callable[..., ModelRunner]:
    def runner(base: PyTree, adapter: PyTree) -> ModelRunner:
        return ModelRunner(
            model,
            base,
            adapter,
            chat=True,
            system=options.system,
            # Solved examples before a question may be cut; prompts were checked.
            too_long="left",
            budget=Budget(tokens=hardware.score_tokens),
            batch_size=hardware.generation_batch,
        )

    return runner


def _score(benchmark: PreparedBenchmark, runner: Callable[..., ModelRunner]) -> Score:
    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        return benchmark(runner(base, adapter))

    # What a domain is examined with may be asked for beside it.
    return Remembered(score) if benchmark.name == CODE_MEASURE else score


def _evaluate(scores: Sequence[Score]):
    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for score in scores:
            metrics |= score(base, adapter)
        return {**metrics, **headlines(metrics)}

    return evaluate


def _probe(prompts: Sequence[str], judge: Any, runner: Any, options: ChatOptions):
    def probe(base: PyTree, adapter: PyTree) -> float:
        answers = runner(base, adapter).answers(
            prompts, max_new_tokens=options.max_new_tokens
        )
        rates = verdict_rates(judge(prompts, answers))
        if math.isnan(rates["refusal"]):
            raise UserError(
                "monitor: expected a judge that can read the probe's answers, got "
                f"{rates['unparsed']:.1f} % unparsed, from which no refusal rate "
                "follows; use another judge (study.judge)"
            )
        return rates["refusal"]

    return probe


def _accuracy(
    split: Split,
    test: TokenDataset,
    model: Model,
    runner: Callable[..., ModelRunner],
    options: ChatOptions,
    scores: Mapping[str, Score],
) -> Callable[[PyTree, PyTree], float]:
    """How well a domain is learnt: HumanEval, a choice, or the next token."""
    if _runs_code(split.source, options):
        code = scores[CODE_MEASURE]

        def passed(base: PyTree, adapter: PyTree) -> float:
            found = code(base, adapter)
            return next(v for k, v in found.items() if k.startswith("pass@1/"))

        return passed
    if split.items:
        return choice_accuracy(split.items, runner)
    return TokenAccuracy(model.apply_fn, test)


def _unaligned(
    places: Mapping[str, Path], options: ChatOptions, hardware: Hardware
) -> PyTree | None:
    place = places.get("unaligned_folder")
    if place is None:
        return None
    return chat_model.load_model(place, dtype=options.dtype, mesh=hardware.mesh).params


def _fingerprint(
    places: Mapping[str, Path],
    parts: Parts,
    asked: Mapping[str, Sequence[str]],
    model: Model,
    options: ChatOptions,
) -> str:
    """A digest of the checkpoints, all tokens, and all that is asked and how."""
    found = hashlib.sha256(chat_model.digest(places["model"]).encode())
    for name in sorted(places.keys() - {"model"}):
        found.update(name.encode() + chat_model.digest(places[name]).encode())
    for name, data in sorted(parts.sets.items()):
        found.update(name.encode() + np.ascontiguousarray(data.tokens).tobytes())
        found.update(np.ascontiguousarray(data.mask).tobytes())
    texts = {**asked, "probe": parts.probe}
    lists = {name: list(prompts) for name, prompts in texts.items()}
    found.update(json.dumps(lists, sort_keys=True).encode())
    # What goes beyond the checkpoint's own stops and the prompts that were learnt.
    stops = stop_tokens(model.tokenizer, system=options.system)
    if more := sorted(set(stops) - set(model.config.eos)):
        found.update(json.dumps({"stops": more}).encode())
    if options.thinking:
        prompts = encode_prompts(model.tokenizer, ["Hello."], system=options.system)
        found.update(json.dumps({"asked": prompts}).encode())
    return found.hexdigest()[:16]
