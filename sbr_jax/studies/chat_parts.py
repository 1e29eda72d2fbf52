"""All parts of a study on a chat model: drawn, encoded, and checked for length."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data import TokenDataset
from sbr_jax.data.control import holds_control
from sbr_jax.data.exchange import stop_tokens, unstopped
from sbr_jax.data.records import ChoiceItem
from sbr_jax.data.registry import SOURCES
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import check_names
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.models import Model
from sbr_jax.studies import chat_data
from sbr_jax.studies.chat_data import Example, Ledger
from sbr_jax.studies.options import ChatOptions
from sbr_jax.typing import UserError

HELD_OUT_SHARE = 5
"""A domain without a test split gives up a fifth of its examples at most."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A domain before it is encoded.

    Attributes:
        source: the data set.
        train: what is learnt.
        test: what is asked.
        items: the same as questions with options; empty where there are none.
    """

    source: str
    train: Sequence[Example]
    test: Sequence[Example]
    items: Sequence[ChoiceItem]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a study is made of.

    Attributes:
        domains: by name.
        sets: encoded parts by name: `train X`, `test X`, `calibration`, `safety mix`,
            `harmful`, `benign control`.
        probe: prompts of the monitor.
        leaks: shared prompts by pair of parts, all 0.
        record: counts and names, for `config.json`.
    """

    domains: Mapping[str, Split]
    sets: Mapping[str, TokenDataset]
    probe: Sequence[str]
    leaks: Mapping[str, int]
    record: Mapping[str, Any]


def make_parts(
    domains: Sequence[str],
    options: ChatOptions,
    folder: Path,
    model: Model,
    measured: Mapping[str, Sequence[str]],
) -> Parts:
    """Draws, checks and encodes every part.

    Args:
        domains: names, in order.
        options: of the study.
        folder: the data folder.
        model: its tokenizer and context; no weights are needed.
        measured: prompts of each measurement.

    Raises:
        UserError: for missing files, empty parts, shared prompts, prompts too long.
    """
    _check_lengths(options, model)
    ledger = Ledger(measured, options.drop_overlaps)
    splits, drawn = _draw(domains, options, folder, ledger)
    leaks = ledger.check([f"test {name}" for name in splits])
    probe = [item.prompt for item in drawn.pop("probe")]
    _check_prompts(options, model, {**measured, "probe": probe})
    sets = {
        name: chat_data.encode(
            model.tokenizer, rows, options.max_length, options.system
        )
        for name, rows in drawn.items()
    }
    for name, data in sets.items():
        if not len(data):
            raise UserError(
                f"expected at least one example for {name}, got none: the prompts of "
                f"all {len(drawn[name])} leave no room for an answer in max_length="
                f"{options.max_length}: raise it with --study.max-length"
            )
        _check_ends(name, data, model, options)
    record = {
        "sources": {name: split.source for name, split in splits.items()},
        "calibration": calibration_source(options, folder),
        "sizes": {**{n: len(data) for n, data in sets.items()}, "probe": len(probe)},
        "questions": {name: len(split.items) for name, split in splits.items()},
        "answers cut": _counts(sets, "truncated"),
        "too long": _counts(sets, "dropped"),
        "control tokens": {
            **_counts(sets, "escaped"),
            **_with_control(model, {**measured, "probe": probe}),
        },
        "repeated": dict(ledger.repeated),
        "left out": dict(ledger.dropped),
        "pairs compared": len(leaks),
    }
    return Parts(splits, sets, probe, leaks, record)


def calibration_source(options: ChatOptions, folder: Path) -> str:
    """The data set of the calibration set and the safety mix."""
    name = options.calibration_source
    return chat_data.source_of("calibration", folder) if name == "auto" else name


def _check_ends(
    name: str, data: TokenDataset, model: Model, options: ChatOptions
) -> None:
    """Refuse answers whose learnt end stops nothing: they would run on for ever."""
    stops = {
        *model.config.eos,
        *stop_tokens(model.tokenizer, system=options.system),
    }
    if count := unstopped(data, sorted(stops)):
        known = ", ".join(map(str, sorted(stops))) or "there is none"
        raise UserError(
            f"{name}: expected answers that end with a token at which generation stops "
            f"({known}), got {count} of {len(data)} that do not: have the template "
            "end an answer with {{ eos_token }} or a special token of its own"
        )


def _with_control(model: Model, asked: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many prompts hold control tokens, which are encoded as plain text."""
    tokenizer = model.tokenizer
    counts = {
        name: sum(holds_control(tokenizer, prompt) for prompt in prompts)
        for name, prompts in asked.items()
    }
    return {name: count for name, count in counts.items() if count}


def _counts(sets: Mapping[str, TokenDataset], what: str) -> dict[str, int]:
    return {name: n for name, data in sets.items() if (n := getattr(data, what))}


def _draw(
    domains: Sequence[str], options: ChatOptions, folder: Path, ledger: Ledger
) -> tuple[dict[str, Split], dict[str, list[Any]]]:
    """All parts, disjoint; tests first, then what defenders and attackers hold."""
    sources = {name: chat_data.source_of(name, folder) for name in domains}
    check_names("data set", sources.values(), SOURCES)
    pools = {name: chat_data.read_domain(s, folder) for name, s in sources.items()}
    parts: dict[str, list[Any]] = {}
    for name, (pool, own) in pools.items():
        part = f"test {name}"
        size = options.held_out
        if not own:
            size = max(min(size, len(pool) // HELD_OUT_SHARE), 1)
        parts[part] = ledger.take(part, sources[name], own or pool, size, examined=True)
    source = options.probe_source
    behaviours = chat_data.read_probe(source, folder)
    parts["probe"] = ledger.take("probe", source, behaviours, options.probe)
    for name, (pool, _) in pools.items():
        part = f"train {name}"
        parts[part] = ledger.take(part, sources[name], pool, options.train)
    safe = calibration_source(options, folder)
    for part, source, size in (
        ("calibration", safe, options.calibration),
        ("safety mix", safe, options.safety_mix),
        ("harmful", options.harmful_source, options.harmful),
        ("benign control", options.control_source, options.calibration),
    ):
        pool, _ = chat_data.read_domain(source, folder)
        parts[part] = ledger.take(part, source, pool, size)
    splits = {}
    for name, (pool, own) in pools.items():
        test = parts[f"test {name}"]
        items = chat_data.questions(test, [*pool, *own])
        # Where most answers are free text, all are measured as such.
        if len(items) <= len(test) // 2:
            items = []
        splits[name] = Split(sources[name], parts[f"train {name}"], test, items)
    return splits, parts


def _check_lengths(options: ChatOptions, model: Model) -> None:
    context = model.config.context
    for name in ("max_length", "max_new_tokens"):
        if getattr(options, name) > context:
            raise UserError(
                f"study.{name}: expected at most the model's context of {context} "
                f"tokens, got {getattr(options, name)}"
            )


def _check_prompts(
    options: ChatOptions, model: Model, asked: Mapping[str, Sequence[str]]
) -> None:
    """Refuses prompts that would leave no room for an answer, hours from now."""
    (around,) = encode_prompts(model.tokenizer, ["Hello."], system=options.system)
    for name, prompts in asked.items():
        own = BENCHMARKS[name].answer_tokens if name in BENCHMARKS else None
        answer = own or options.max_new_tokens
        room = max(model.config.context - answer, 0)
        # A token is a byte at least, so most prompts need no counting.
        spare = room // 2 - len(around)
        unsure = [p for p in prompts if len(p.encode()) > spare]
        encoded = encode_prompts(model.tokenizer, unsure, system=options.system)
        long = [len(tokens) for tokens in encoded if len(tokens) > room]
        if long:
            raise UserError(
                f"{name}: expected prompts of at most {room} tokens (the context of "
                f"{model.config.context} less {answer} for an answer), got {len(long)} "
                f"longer ones, up to {max(long)}: use a model with a longer context, "
                f"or leave {name} out"
            )
