"""Study of a chat model: real data in its template, benchmarks and a monitor.

Everything else is read and checked before the weights: prompts that two sets share,
sizes, lengths, the template. `config.json` records what the study was made of.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data import TokenDataset
from sbr_jax.data.exchange import stop_tokens
from sbr_jax.data.registry import data_folder
from sbr_jax.data.template import process_date, reads_clock
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import check_names
from sbr_jax.evaluation import verdict_rates
from sbr_jax.evaluation.benchmarks import BENCHMARKS, PreparedBenchmark, prepare, record
from sbr_jax.evaluation.composite import headlines
from sbr_jax.evaluation.domain_scores import Remembered, TokenAccuracy, choice_accuracy
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.judges.guard import GuardJudge
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.scorer import Budget
from sbr_jax.models import Model
from sbr_jax.settings import Hardware
from sbr_jax.studies import dates
from sbr_jax.studies._held_out import random_tokens
from sbr_jax.studies.chat import checkpoints
from sbr_jax.studies.chat.judges import make_judge, risk_judge
from sbr_jax.studies.chat.parts import Split, make_parts
from sbr_jax.studies.chat.sources import source_of
from sbr_jax.studies.options import ChatOptions, ModelOptions, Sources
from sbr_jax.training.study import Domain, Study
from sbr_jax.typing import PyTree, UserError

Score = Callable[[PyTree, PyTree], dict[str, float]]
"""`(base, adapter) -> metrics` of one benchmark."""

CODE_BENCHMARK = "humaneval"
"""Benchmark of the code domain if its answers may be run."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatStudy(Study):
    """A study that also holds what a forecast of its cost needs.

    Its `notes` hold counts and names only: sources and sizes of the data, what was left
    out, judges and benchmarks.

    Attributes:
        asked: number of prompts and their mean characters, for each benchmark and the
            probe.
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
        sources: a chat model's checkpoint or hub id, and a folder with one folder for
            each data set; None for the hub's copies.
        hardware: how weights are spread and answers batched.
        weights: False to read no weights: everything is checked, nothing can be run.

    Raises:
        UserError: for anything missing or damaged, a model without a chat template,
            empty parts, prompts that are too long, and sets that share prompts.
    """
    if sources.model is None:
        raise UserError(f"expected a model, got {sources}")
    folder = None if sources.data is None else data_folder(sources.data)
    if folder is not None and not folder.is_dir():
        raise UserError(f"expected a data folder, got the file {folder}")
    model = checkpoints.read_model(
        sources.model, date=options.date, thinking=options.thinking
    )
    judge = make_judge(options, weights=False)
    # Find every other checkpoint too, before hours are spent on this one.
    places = checkpoints.locate_all(sources.model, options, weights=False)
    checkpoints.check_unaligned(places, model.config)
    names = _benchmarks(domains, options, folder)
    prepared = _prepare(names, options, folder, judge)
    asked = {name: m.prompts for name, m in prepared.items()}
    parts = make_parts(domains, options, folder, model, asked)
    described = record(prepared.values(), judge, folder)
    unaligned = None
    if weights:
        places = checkpoints.locate_all(sources.model, options, weights=True)
        loaded = checkpoints.load_model(places["model"], options, hardware)
        model = dataclasses.replace(loaded, tokenizer=model.tokenizer)
        judge = make_judge(options)
        prepared = _prepare(names, options, folder, judge)
        if "unaligned_folder" in places:
            dense = dataclasses.replace(options, quantize=None)
            place = places["unaligned_folder"]
            unaligned = checkpoints.load_model(place, dense, hardware).params
    runner = make_runner(model, options, hardware)
    scores = {name: _score(m, runner) for name, m in prepared.items()}
    sets = parts.sets
    noise = random_tokens(sets["calibration"], model.config.vocab_size, seed=0)

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name in options.benchmarks:
            metrics |= scores[name](base, adapter)
        return {**metrics, **headlines(metrics)}

    def learnt(name: str, split: Split) -> Callable[[PyTree, PyTree], float]:
        if _runs_code(split.source, options):
            return _pass_rate(scores[CODE_BENCHMARK])
        if split.items:
            return choice_accuracy(split.items, runner)
        return TokenAccuracy(model.apply_fn, sets[f"test {name}"])

    texts = {**asked, "probe": parts.probe}
    return ChatStudy(
        model=model,
        domains={
            name: Domain(sets[f"train {name}"], learnt(name, split))
            for name, split in parts.domains.items()
        },
        calibration=sets["calibration"],
        calibration_controls={"benign": sets["benign control"], "random": noise},
        safety_mix=sets["safety mix"],
        harmful=sets["harmful"],
        unaligned=unaligned,
        judge=risk_judge(judge, model.tokenizer),
        evaluate=evaluate,
        probe=make_probe(parts.probe, judge, runner, options),
        probe_size=len(parts.probe),
        fingerprint=_fingerprint(places, sets, texts, model, options),
        leak_check=parts.leaks,
        notes={"data": parts.record, **described, **rendering(model, judge, options)},
        asked={name: _size(prompts) for name, prompts in texts.items()},
    )


def _size(prompts: Sequence[str]) -> tuple[int, float]:
    return len(prompts), sum(map(len, prompts)) / max(len(prompts), 1)


def rendering(model: Model, judge: Judge, options: ModelOptions) -> dict[str, Any]:
    """The date given to the templates, if one asks for it."""
    tokenizers = [model.tokenizer]
    if isinstance(judge, GuardJudge):
        tokenizers.append(judge.model.tokenizer)
    if not any(map(reads_clock, tokenizers)):
        return {}
    return {dates.KEY: {"date": options.date or process_date()}}


def _benchmarks(
    domains: Sequence[str], options: ChatOptions, folder: Path | None
) -> tuple[str, ...]:
    """Benchmarks of the study, including the one for a domain's accuracy."""
    check_names("benchmark", options.benchmarks, BENCHMARKS)
    code = any(_runs_code(source_of(name, folder), options) for name in domains)
    more = (CODE_BENCHMARK,) if code else ()
    return tuple(dict.fromkeys([*options.benchmarks, *more]))


def _runs_code(source: str, options: ChatOptions) -> bool:
    return options.allow_code and source.startswith("codealpaca")


def _prepare(
    names: Sequence[str], options: ChatOptions, folder: Path | None, judge: Judge
) -> dict[str, PreparedBenchmark]:
    return {
        name: prepare(
            name,
            folder,
            limit=options.limit,
            judge=judge,
            allow_code=options.allow_code,
            output=Path(options.output_folder) if options.output_folder else None,
            max_new_tokens=(
                None if BENCHMARKS[name].answer_tokens else options.max_new_tokens
            ),
        )
        for name in names
    }


def make_runner(
    model: Model, options: ModelOptions, hardware: Hardware
) -> Callable[..., ModelRunner]:
    """`(base, adapter) -> runner` in the model's template."""

    def runner(base: PyTree, adapter: PyTree) -> ModelRunner:
        return ModelRunner(
            model,
            base,
            adapter,
            chat=True,
            system=options.system,
            # Only solved examples before a question can be cut; prompts were checked.
            too_long="left",
            budget=Budget(tokens=hardware.score_tokens),
            batch_size=hardware.generation_batch,
        )

    return runner


def _score(benchmark: PreparedBenchmark, runner: Callable[..., ModelRunner]) -> Score:
    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        return benchmark(runner(base, adapter))

    # A domain's accuracy may use the same result.
    return Remembered(score) if benchmark.name == CODE_BENCHMARK else score


def _pass_rate(score: Score) -> Callable[[PyTree, PyTree], float]:
    def passed(base: PyTree, adapter: PyTree) -> float:
        found = score(base, adapter)
        return next(v for k, v in found.items() if k.startswith("pass@1/"))

    return passed


def make_probe(
    prompts: Sequence[str],
    judge: Judge,
    runner: Callable[..., ModelRunner],
    options: ModelOptions,
) -> Callable[[PyTree, PyTree], float]:
    """`(base, adapter) -> refusal rate` on the monitor's prompts, 0 to 100."""

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


def add_contents(
    found: Any, sets: Mapping[str, TokenDataset], texts: Mapping[str, Sequence[str]]
) -> None:
    """Adds all tokens and all questions to a digest of `hashlib`."""
    for name, data in sorted(sets.items()):
        found.update(name.encode() + data.tokens.tobytes() + data.mask.tobytes())
    lists = {name: list(prompts) for name, prompts in texts.items()}
    found.update(json.dumps(lists, sort_keys=True).encode())


def _fingerprint(
    places: Mapping[str, Path],
    sets: Mapping[str, TokenDataset],
    texts: Mapping[str, Sequence[str]],
    model: Model,
    options: ChatOptions,
) -> str:
    """A digest of the checkpoints, all tokens, all questions and how they are asked."""
    found = hashlib.sha256(checkpoints.digest(places["model"]).encode())
    for name in sorted(places.keys() - {"model"}):
        found.update(name.encode() + checkpoints.digest(places[name]).encode())
    add_contents(found, sets, texts)
    # Only settings beyond the checkpoint's own stops and the learnt prompts.
    stops = stop_tokens(model.tokenizer, system=options.system)
    if more := sorted(set(stops) - set(model.config.eos)):
        found.update(json.dumps({"stops": more}).encode())
    if options.thinking:
        prompts = encode_prompts(model.tokenizer, ["Hello."], system=options.system)
        found.update(json.dumps({"asked": prompts}).encode())
    return found.hexdigest()[:16]
