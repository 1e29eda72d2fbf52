"""Disjoint parts of a study on a chat model: drawn, encoded, checked for length.

Measured sets are drawn first. Every later part takes only prompts that no part before
it has. If two published files are known to share prompts, the part gives way to the
benchmark. Any other overlap with a benchmark refuses the run.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.data import TokenDataset, encode_chat, leaks
from sbr_jax.data.control import holds_control
from sbr_jax.data.exchange import stop_tokens, unstopped
from sbr_jax.data.records import ChoiceItem, Record
from sbr_jax.data.registry import SOURCES
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import check_names, option
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.evaluation.benchmarks import BENCHMARKS
from sbr_jax.evaluation.judges.verdicts import refused
from sbr_jax.models import Model
from sbr_jax.studies.chat.sources import (
    Example,
    families,
    questions,
    read_domain,
    read_probe,
    source_of,
)
from sbr_jax.studies.options import ChatOptions, ModelOptions
from sbr_jax.typing import UserError

HELD_OUT_SHARE = 5
"""A domain without a test split gives up at most a fifth of its examples."""


@dataclasses.dataclass
class Ledger:
    """Ledger of the prompts in each part, and of those left out.

    Attributes:
        measured: prompts of each benchmark.
        drop_overlaps: whether parts give way to every benchmark, not only to related
            ones.
        sets: normalised prompts of each part so far.
        pools: the file or files that each part was drawn from.
        dropped: `{"part/other": number of the part's prompts that the other has}`,
            unless both were drawn from the same files.
        repeated: number of repeated prompts in the files of each part.
    """

    measured: Mapping[str, Sequence[str]]
    drop_overlaps: bool = False
    sets: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    pools: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    repeated: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._measured = {
            name: {
                leaks.normalised(text) for prompt in prompts for text in _asked(prompt)
            }
            for name, prompts in self.measured.items()
        }

    def take(
        self,
        part: str,
        source: str,
        items: Sequence[Any],
        size: int,
        *,
        examined: bool = False,
    ) -> list[Any]:
        """Draws up to ``size`` items whose prompts are free; the same ones every time.

        A test set, ``examined``, may share prompts with benchmarks.

        Returns:
            At least one item.
        """
        free, repeats = leaks.distinct(items)
        keys = [leaks.normalised(item.prompt) for item in free]
        banned = dict(self.sets)
        if not examined:
            banned |= {
                name: prompts
                for name, prompts in self._measured.items()
                if self.drop_overlaps
                or part in ("probe", "harmful")
                or families(name) & families(source)
            }
        if repeats:
            self.repeated[part] = repeats
        for other, prompts in banned.items():
            count = sum(key in prompts for key in keys)
            if count and self.pools.get(other) != source:
                self.dropped[f"{part}/{other}"] = count
        taken = set().union(*banned.values()) if banned else set()
        left = [i for i, key in enumerate(keys) if key not in taken]
        order = np.random.default_rng(0).permutation(len(left))[:size]
        if not len(order):
            raise UserError(
                f"expected at least one example of '{source}' for {part}, got none: "
                f"{len(items)} read, {repeats} repeated, {len(keys)} different, all of "
                "them in other sets: make those smaller, or take another data set"
            )
        chosen = [left[i] for i in order]
        self.sets[part], self.pools[part] = {keys[i] for i in chosen}, source
        return [free[i] for i in chosen]

    def check(self, examined: Sequence[str]) -> dict[str, int]:
        """Refuses parts that share prompts with a benchmark or with each other.

        Parts in ``examined`` may share prompts with benchmarks.

        Returns:
            `{"part/other": 0}` for every pair that was compared.
        """
        counts, names = {}, list(self.sets)
        for place, part in enumerate(names):
            others = {name: self.sets[name] for name in names[place + 1 :]}
            if part not in examined:
                others |= self._measured
            for name, prompts in others.items():
                counts[f"{part}/{name}"] = len(self.sets[part] & prompts)
        return leaks.refuse_leaks(
            counts,
            f"{option('study.drop-overlaps')} leaves them out of the first of each "
            "pair, or take another data set",
        )


def _asked(prompt: str) -> tuple[str, str]:
    """A measured prompt, with and without the answer options at its end."""
    return prompt, prompt.partition("\nA. ")[0]


@dataclasses.dataclass(frozen=True)
class Split:
    """A domain before it is encoded.

    Attributes:
        source: the data set.
        train: examples to learn.
        test: examples to ask.
        items: the test examples as multiple-choice questions, if they are any.
    """

    source: str
    train: Sequence[Example]
    test: Sequence[Example]
    items: Sequence[ChoiceItem]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Data of a study.

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
    folder: Path | None,
    model: Model,
    measured: Mapping[str, Sequence[str]],
) -> Parts:
    """Draws, checks and encodes every part.

    The model needs no weights.

    Raises:
        UserError: for missing files, empty parts, shared prompts, prompts too long.
    """
    for name in ("max_length", "max_new_tokens"):
        if getattr(options, name) > model.config.context:
            raise UserError(
                f"{option(f'study.{name}')}: expected at most the model's context of "
                f"{model.config.context} tokens, got {getattr(options, name)}"
            )
    ledger = Ledger(measured, options.drop_overlaps)
    splits, drawn = _draw(domains, options, folder, ledger)
    leaks = ledger.check([f"test {name}" for name in splits])
    probe = [item.prompt for item in drawn.pop("probe")]
    asked = {**measured, "probe": probe}
    check_prompts(options, model, asked)
    sets = {
        name: encode(model.tokenizer, rows, options.max_length, options.system)
        for name, rows in drawn.items()
    }
    for name, data in sets.items():
        if not len(data):
            raise UserError(
                f"expected at least one example for {name}, got none: the prompts of "
                f"all {len(drawn[name])} leave no room for an answer in max_length="
                f"{options.max_length}: raise {option('study.max-length')}, up to the "
                f"model's {model.config.context}"
            )
        check_ends(name, data, model, options)

    def counts(what: str) -> dict[str, int]:
        return {name: n for name, data in sets.items() if (n := getattr(data, what))}

    control = {
        name: sum(holds_control(model.tokenizer, prompt) for prompt in prompts)
        for name, prompts in asked.items()
    }
    record = {
        "sources": {name: split.source for name, split in splits.items()},
        "calibration": calibration_source(options, folder),
        "sizes": {**{n: len(data) for n, data in sets.items()}, "probe": len(probe)},
        "questions": {name: len(split.items) for name, split in splits.items()},
        "answers cut": counts("truncated"),
        "too long": counts("dropped"),
        # Prompts and answers encode them as plain text.
        "control tokens": {
            **counts("escaped"),
            **{name: count for name, count in control.items() if count},
        },
        "repeated": dict(ledger.repeated),
        "left out": dict(ledger.dropped),
        "pairs compared": len(leaks),
    }
    return Parts(splits, sets, probe, leaks, record)


def encode(
    tokenizer: Any, examples: Sequence[Any], max_length: int, system: str | None = None
) -> TokenDataset:
    """Encodes exchanges in the chat template, cut to a length and padded alike."""
    records = [Record(e.prompt, e.answer, system=system) for e in examples]
    return encode_records(tokenizer, records, max_length)


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    max_length: int,
    names: Sequence[str] | None = None,
) -> TokenDataset:
    """Like :func:`encode`, for records; errors use their ``names``."""
    data = encode_chat(tokenizer, records, max_length, too_long="truncate", names=names)
    # Padding costs as much as tokens, so cut the padding that no example needs.
    ends = np.where(data.mask > 0, np.arange(data.length) + 1, 1)
    longest = int(ends.max(initial=1))
    return dataclasses.replace(
        data, tokens=data.tokens[:, :longest], mask=data.mask[:, :longest]
    )


def calibration_source(options: ChatOptions, folder: Path | None) -> str:
    """The data set for the calibration set and the safety mix."""
    name = options.calibration_source
    return source_of("calibration", folder) if name == "auto" else name


def only_refusals(examples: Sequence[Example], options: ModelOptions) -> list[Example]:
    """Exchanges whose answer refuses, according to the study's list of words."""
    kind, _, words = options.judge.partition(":")
    judge = KeywordJudge(words) if kind == "keyword" and words else KeywordJudge()
    answers = [example.answer for example in examples]
    kept = refused(judge, examples, [""] * len(answers), answers)
    if not kept:
        raise UserError(
            f"study.calibration_refusals: expected safe exchanges that refuse, got "
            f"{len(examples)} that do not: give others, or leave the option out"
        )
    return kept


def _draw(
    domains: Sequence[str], options: ChatOptions, folder: Path | None, ledger: Ledger
) -> tuple[dict[str, Split], dict[str, list[Any]]]:
    """Draws all parts, disjoint: tests, probe and training sets, then the rest."""
    sources = {name: source_of(name, folder) for name in domains}
    check_names("data set", sources.values(), SOURCES)
    pools = {name: read_domain(s, folder) for name, s in sources.items()}
    parts: dict[str, list[Any]] = {}

    def take(part: str, source: str, pool: Sequence[Any], size: int, **more: bool):
        parts[part] = ledger.take(part, source, pool, size, **more)

    for name, (pool, own) in pools.items():
        size = options.held_out
        if not own:
            size = max(min(size, len(pool) // HELD_OUT_SHARE), 1)
        take(f"test {name}", sources[name], own or pool, size, examined=True)
    source = options.probe_source
    take("probe", source, read_probe(source, folder), options.probe)
    for name, (pool, _) in pools.items():
        take(f"train {name}", sources[name], pool, options.train)
    safe = calibration_source(options, folder)
    harmful = source_of(options.harmful_source, folder)
    control = source_of(options.control_source, folder)
    for part, source, size in (
        ("calibration", safe, options.calibration),
        ("safety mix", safe, options.safety_mix),
        ("harmful", harmful, options.harmful),
        ("benign control", control, options.calibration),
    ):
        pool = read_domain(source, folder)[0]
        if source == safe and options.calibration_refusals:
            pool = only_refusals(pool, options)
        take(part, source, pool, size)
    splits = {}
    for name, (pool, own) in pools.items():
        test = parts[f"test {name}"]
        items = questions(test, [*pool, *own])
        # If at least half of the answers are free text, treat all as free text.
        if len(items) <= len(test) // 2:
            items = []
        splits[name] = Split(sources[name], parts[f"train {name}"], test, items)
    return splits, parts


def check_ends(
    name: str, data: TokenDataset, model: Model, options: ModelOptions
) -> None:
    """Refuses training answers whose end token would not stop generation."""
    own = stop_tokens(model.tokenizer, system=options.system)
    stops = sorted({*model.config.eos, *own})
    if count := unstopped(data, stops):
        known = ", ".join(map(str, stops)) or "there is none"
        raise UserError(
            f"{name}: expected answers that end with a token at which generation stops "
            f"({known}), got {count} of {len(data)} that do not: have the template "
            "end an answer with {{ eos_token }} or a special token of its own"
        )


def check_prompts(
    options: ModelOptions, model: Model, asked: Mapping[str, Sequence[str]]
) -> None:
    """Refuses prompts that leave no room for an answer, before hours of training."""
    (around,) = encode_prompts(model.tokenizer, ["Hello."], system=options.system)
    for name, prompts in asked.items():
        own = BENCHMARKS[name].answer_tokens if name in BENCHMARKS else None
        answer = own or options.max_new_tokens
        room = max(model.config.context - answer, 0)
        # A token is at least one byte, so most prompts need no counting.
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
