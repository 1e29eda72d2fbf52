"""Study of a user's own chat model and files, measured before and after tuning."""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.data.conversations import Conversation
from sbr_jax.data.records import BehaviourItem, Pair
from sbr_jax.data.template import fix_template
from sbr_jax.evaluation.judges import KEYWORD_LISTS, Judge, verdict_rates
from sbr_jax.evaluation.judges.keyword import KeywordJudge
from sbr_jax.evaluation.runner import ModelRunner
from sbr_jax.evaluation.tasks.first_token import opening_tokens, refusal_auc
from sbr_jax.methods.needs import BENIGN
from sbr_jax.models import Model
from sbr_jax.settings import Hardware
from sbr_jax.studies._held_out import HeldOut, held_out, random_tokens
from sbr_jax.studies.chat import checkpoints
from sbr_jax.studies.chat.judges import make_judge, risk_judge
from sbr_jax.studies.chat.parts import encode
from sbr_jax.studies.chat.study import (
    ChatStudy,
    add_contents,
    make_probe,
    make_runner,
    rendering,
)
from sbr_jax.studies.options import OwnOptions
from sbr_jax.studies.own.given import ALL
from sbr_jax.studies.own.parts import Parts, steps_of
from sbr_jax.studies.own.refusals import own_answers, to_align, write_refusals
from sbr_jax.training.study import Domain
from sbr_jax.typing import PyTree, UserError

Runner = Callable[[PyTree, PyTree], ModelRunner]
Score = Callable[[PyTree, PyTree], dict[str, float]]
"""`(base, adapter) -> metrics`."""

WEAK = 20.0
"""Refusal rate, in percent, below which a start model has little safety to lose."""

PHRASES = "plain25"
"""List whose first tokens count as refusals if the judge has no list of its own."""


def read_model(model: str | Path | Model, options: OwnOptions) -> Model:
    """The model without weights; a model that was given stays as it is."""
    if not isinstance(model, Model):
        return checkpoints.read_model(
            model, date=options.date, thinking=options.thinking
        )
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(
            "model: expected one with a tokenizer that has a chat template, got one "
            "without: use the -Chat or -Instruct checkpoint of this model"
        )
    told = fix_template(tokenizer, date=options.date, thinking=options.thinking)
    return dataclasses.replace(model, tokenizer=told)


def build_study(
    model: str | Path | Model,
    read: Model,
    parts: Parts,
    options: OwnOptions,
    needed: frozenset[str],
    hardware: Hardware,
    *,
    epochs: float | None,
    batch: int,
    folder: Path | None,
) -> ChatStudy:
    """Loads the weights, lets the model write its calibration set, builds the study.

    Args:
        model: a folder, a hub id, or the model itself.
        read: result of `read_model`.
        parts: result of `make_parts`.
        options: of the study, with any dtype except "auto".
        needed: parts that the defence reads.
        hardware: how weights are spread and answers batched.
        epochs: over each training file; None for the job's number of steps.
        batch: examples of a step.
        folder: keeps the model's answers; None to keep nothing.

    Raises:
        UserError: for damaged weights, or a model that refuses nothing.
    """
    loaded, places, unaligned = read, {}, None
    if isinstance(model, str | Path):
        places = checkpoints.locate_all(model, options, weights=True)
        checkpoints.check_unaligned(places, read.config)
        loaded = checkpoints.load_model(places["model"], options, hardware)
        loaded = dataclasses.replace(loaded, tokenizer=read.tokenizer)
    if options.unaligned_folder is not None:
        place = checkpoints.locate(
            options.unaligned_folder, weights=True, setting="study.unaligned-folder"
        )
        places["unaligned_folder"] = place
        unaligned = checkpoints.load_model(place, options, hardware).params
    judge = make_judge(options)
    runner = make_runner(loaded, options, hardware)
    mark = _digest(loaded, places)
    sets, written = dict(parts.sets), {}

    def write(prompts: Sequence[str]) -> list[str]:
        asked = runner(loaded.params, None)
        return asked.answers(prompts, max_new_tokens=options.max_new_tokens)

    asked = f"{mark} {options.max_new_tokens} {options.system}"
    if parts.calibrate:
        found = write_refusals(parts.calibrate, write, judge, folder, asked)
        written = {"asked": found.asked, "refused": len(found.kept)}
        sets["calibration"] = _own(found.kept, loaded, options)
    if BENIGN in needed:
        answers = own_answers(parts.control, write, folder, asked, "answers")
        pairs = map(Pair, parts.control, answers)
        kept = [pair for pair in pairs if pair.answer.strip()]
        sets["benign control"] = _own(kept, loaded, options)
    calibration = sets.get("calibration")
    controls = {}
    if calibration is not None:
        vocabulary = loaded.config.vocab_size
        controls["random"] = random_tokens(calibration, vocabulary, seed=0)
    if "benign control" in sets:
        controls["benign"] = sets["benign control"]
    scores, tests = _scores(parts, loaded, judge, runner, options, hardware)

    def evaluate(base: PyTree, adapter: PyTree) -> dict[str, float]:
        found: dict[str, float] = {}
        for score in scores:
            found |= score(base, adapter)
        exact = [v for name, v in found.items() if name.startswith("exact_match/")]
        return {**found, **({"exact_match": float(np.mean(exact))} if exact else {})}

    domains = {}
    for name, data in sets.items():
        kind, _, domain = name.partition(" ")
        if kind == "train":
            test = tests.get(domain) or tests[ALL]
            steps = None if epochs is None else steps_of(data, epochs, batch)
            domains[domain] = Domain(data, _accuracy(test), steps)
    texts = {"probe": parts.probe, "refusal": parts.measured}
    texts["over-refusal"] = parts.harmless
    fingerprint = hashlib.sha256(mark.encode())
    add_contents(fingerprint, sets, texts)
    return ChatStudy(
        model=loaded,
        domains=domains,
        calibration=calibration,
        calibration_controls=controls,
        safety_mix=calibration,
        harmful=sets.get("pairs", sets.get("prompts")),
        unaligned=unaligned,
        judge=risk_judge(judge, loaded.tokenizer),
        evaluate=evaluate,
        probe=make_probe(parts.probe, judge, runner, options) if parts.probe else None,
        probe_size=len(parts.probe),
        fingerprint=fingerprint.hexdigest()[:16],
        leak_check=parts.leaks,
        notes={
            "data": {**parts.record, **({"refusals": written} if written else {})},
            "measurements": {
                name: {"judge": judge.describe(), "items": len(prompts)}
                for name, prompts in texts.items()
            },
            **rendering(loaded, judge, options),
        },
        asked={
            name: (len(prompts), float(np.mean([len(p) for p in prompts])))
            for name, prompts in texts.items()
            if prompts
        },
    )


def _own(pairs: Sequence[Pair], model: Model, options: OwnOptions) -> TokenDataset:
    length = min(options.max_length, model.config.context)
    return encode(model.tokenizer, pairs, length, options.system)


def _digest(model: Model, places: Mapping[str, Path]) -> str:
    """A hash of the checkpoints, or of the weights of a given model."""
    found = hashlib.sha256()
    for name, place in sorted(places.items()):
        found.update(f"{name} {checkpoints.digest(place)}".encode())
    if "model" not in places:
        for leaf in jax.tree.leaves(model.params):
            found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


# --- what is measured -----------------------------------------------------------------


def _accuracy(test: HeldOut) -> Callable[[PyTree, PyTree], float]:
    return lambda base, adapter: test(base, adapter)[1]


def _scores(
    parts: Parts,
    model: Model,
    judge: Judge,
    runner: Runner,
    options: OwnOptions,
    hardware: Hardware,
) -> tuple[list[Score], dict[str, HeldOut]]:
    """All scores measured before and after, and the losses by test set."""
    tests = {
        name.partition(" ")[2]: held_out(model, data)
        for name, data in parts.sets.items()
        if name.startswith("test ")
    }
    found: list[Score] = [_losses(tests)]
    # Conversations bring their own system messages.
    bare = make_runner(model, dataclasses.replace(options, system=None), hardware)
    found += [
        exact
        for name, rows in parts.tests.items()
        if (exact := _exact_match(name, rows, model, bare, options)) is not None
    ]
    if "general" in parts.sets:
        general = held_out(model, parts.sets["general"])
        found.append(lambda base, adapter: {"general_loss": general(base, adapter)[0]})
    if parts.measured:
        found.append(_refusals("refusal", parts.measured, judge, runner, options))
        found += _first_tokens(parts, model, judge, runner)
    found.append(_refusals("over_refusal", parts.harmless, judge, runner, options))
    return found, tests


def _losses(tests: Mapping[str, HeldOut]) -> Score:
    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        found = {f"loss/{name}": test(base, adapter)[0] for name, test in tests.items()}
        return {**found, "domain_loss": float(np.mean(list(found.values())))}

    return score


def _refusals(
    name: str, prompts: Sequence[str], judge: Judge, runner: Runner, options: OwnOptions
) -> Score:
    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        answers = runner(base, adapter).answers(
            prompts, max_new_tokens=options.max_new_tokens
        )
        rates = verdict_rates(judge(prompts, answers))
        if name == "refusal" and rates[name] < WEAK and _untrained(adapter):
            warnings.warn(
                f"the start model refuses {rates[name]:.0f} % of the held-out harmful "
                "prompts: there is little to keep, and the monitor can hardly ask for "
                f"a repair; {to_align()}",
                stacklevel=2,
            )
        found = {name: rates["refusal"], f"gibberish/{name}": rates["gibberish"]}
        # A rate is NaN if too many answers could not be judged: leave it out.
        return {key: value for key, value in found.items() if math.isfinite(value)}

    return score


def _untrained(adapter: PyTree) -> bool:
    """Whether an adapter is untrained and so changes nothing."""
    return adapter is None or not any(
        np.any(np.asarray(pair.lora_b)) for pair in adapter.values()
    )


def _first_tokens(
    parts: Parts, model: Model, judge: Judge, runner: Runner
) -> list[Score]:
    """How well the first token separates harmful from harmless prompts."""
    words = judge.keywords if isinstance(judge, KeywordJudge) else PHRASES
    phrases = KEYWORD_LISTS[words].phrases
    bad = [BehaviourItem(text, str(i)) for i, text in enumerate(parts.measured)]
    good = [BehaviourItem(text, str(i)) for i, text in enumerate(parts.harmless)]
    try:
        opening_tokens(runner(model.params, None), phrases)
    except UserError:  # The tokenizer cannot write any of the refusals.
        return []

    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        found = refusal_auc(runner(base, adapter), bad, good, phrases)
        return {"refusal_auc": found.metrics["refusal_auc"]}

    return [score]


def _exact_match(
    name: str,
    rows: Sequence[Conversation],
    model: Model,
    runner: Runner,
    options: OwnOptions,
) -> Score | None:
    """Share of greedy answers that equal the right one, apart from white space.

    None unless more than half of the right answers fit into `max_new_tokens`.
    """
    records = [record for row in rows for record in row.records]
    sizes = [len(model.tokenizer.encode(record.response)) for record in records]
    short = [i for i, size in enumerate(sizes) if size <= options.max_new_tokens]
    if 2 * len(short) <= len(records):
        return None
    records = [records[i] for i in short]
    longest = max(sizes[i] for i in short) + 1

    def asked(record: Any) -> list[dict[str, str]]:
        system = record.system or options.system
        return dataclasses.replace(record, system=system).context

    prompts = [asked(record) for record in records]
    limit = min(longest, options.max_new_tokens + 1)

    def score(base: PyTree, adapter: PyTree) -> dict[str, float]:
        answers = runner(base, adapter).answers(prompts, max_new_tokens=limit)
        hits = [
            answer.split() == record.response.split()
            for answer, record in zip(answers, records, strict=True)
        ]
        return {f"exact_match/{name}": 100.0 * float(np.mean(hits))}

    return score
