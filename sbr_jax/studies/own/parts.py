"""Disjoint parts of a user's files: to learn, to calibrate on, and to measure.

Harmful prompts that are also learnt are left out of every measurement. The parts that
calibrate a defence share no prompt with those that measure it.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data import TokenDataset, encode_text, leaks
from sbr_jax.data.conversations import Conversation, Read
from sbr_jax.data.layout import used_lengths
from sbr_jax.data.records import Record
from sbr_jax.data.template import render
from sbr_jax.errors import counted, option
from sbr_jax.evaluation.judges import Judge, KeywordJudge
from sbr_jax.evaluation.judges.verdicts import refused
from sbr_jax.methods.needs import BENIGN, HARMFUL, MIX, SAFE
from sbr_jax.models import Model
from sbr_jax.studies.chat.parts import check_ends, check_prompts, encode_records
from sbr_jax.studies.options import OwnOptions
from sbr_jax.studies.own.given import Given
from sbr_jax.typing import UserError

HELD_BACK = 10
"""Without evaluation rows, one row in so many of a training file is measured on."""
ENOUGH_TO_HOLD = 20
"""A file with fewer rows holds none back."""
LEAST_HARMFUL = 8
"""Fewest harmful prompts that can be divided among their uses."""
ENOUGH_TO_MEASURE = 10
"""With fewer harmful prompts, a refusal rate says little."""
FEW, MANY_EPOCHS = 50, 10
REFUSED = "I cannot help with that."
"""Placeholder answer where only the prompt is read."""

Rows = Mapping[str, Sequence[Conversation]]
"""Conversations by domain."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows by use.

    Attributes:
        sets: encoded: `train X`, `test X`, `calibration` (of given exchanges),
            `prompts` (harmful ones with a fixed refusal), `pairs`, `general`.
        tests: the conversations of each `test X`.
        calibrate: harmful prompts that the model itself is to refuse.
        probe: prompts of the monitor.
        measured: prompts of the refusal rate.
        harmless: prompts of over-refusal.
        control: harmless prompts of the benign control.
        leaks: number of shared prompts by pair of parts, all 0.
        record: counts and names, for `config.json` and the terminal.
    """

    sets: Mapping[str, TokenDataset]
    tests: Rows
    calibrate: Sequence[str]
    probe: Sequence[str]
    measured: Sequence[str]
    harmless: Sequence[str]
    control: Sequence[str]
    leaks: Mapping[str, int]
    record: Mapping[str, Any]


def make_parts(
    given: Given,
    options: OwnOptions,
    needed: frozenset[str],
    monitored: bool,
    model: Model,
    judge: Judge,
) -> Parts:
    """Draws, checks and encodes every part; the model needs no weights."""
    learnt, tests, notes = _split(given, options)
    harmful, harmless, left_out = _unseen(
        given, options, [*learnt.values(), *tests.values()]
    )
    safe_needed = bool({SAFE, MIX} & needed) or (monitored and bool(harmful))
    own = safe_needed and given.safe is None
    calibrating = own or HARMFUL in needed
    calibrate, probe, measured = _three(harmful, options, calibrating, monitored)
    rows: dict[str, Sequence[Conversation]] = {
        **{f"train {name}": rows for name, rows in learnt.items()},
        **{f"test {name}": rows for name, rows in tests.items()},
    }
    if given.safe is not None and safe_needed:
        safe = _unmeasured("safety", given.safe, [*probe, *measured])
        if options.calibration_refusals:
            safe = _refusing(safe, judge)
        rows["calibration"] = _some(safe, options.calibration)
        _warn_unrefused(rows["calibration"], judge)
    if HARMFUL in needed:
        rows["prompts"] = [
            Conversation((Record(text, REFUSED),), option("harmful"))
            for text in calibrate
        ]
    if given.pairs is not None:
        pairs = _unmeasured("study.pairs-file", given.pairs, [*probe, *measured])
        rows["pairs"] = pairs
    if isinstance(given.general, Read):
        rows["general"] = given.general.rows
    sets = {name: _encode(name, part, options, model) for name, part in rows.items()}
    for name, data in sets.items():
        check_ends(name, data, model, options)
    if given.general is not None and not isinstance(given.general, Read):
        texts = [("", text) for text in given.general[: options.held_out]]
        length = min(options.max_length, model.config.context)
        sets["general"] = encode_text(
            model.tokenizer, texts, length, too_long="truncate"
        )
    benign = BENIGN in needed
    control = harmless[len(harmless) // 2 :] if benign else []
    asked = {option("harmful"): [*calibrate, *probe, *measured], "harmless": harmless}
    check_prompts(options, model, asked)
    harmless = harmless[: len(harmless) - len(control)]
    if not harmless:
        raise UserError(
            f"{option('study.harmless-file')}: expected at least 2 different prompts, "
            "of which one is measured and one is the benign control, got 1: add more"
        )
    compared = {"calibrate": calibrate, "probe": probe, "measured": measured}
    if "calibration" in rows:
        compared["safety"] = [c.prompt for c in rows["calibration"]]
        compared.pop("calibrate")
    record = {
        **notes,
        "layouts": {name: read.layout for name, read in given.train.items()},
        "examples": {name: len(data) for name, data in sets.items()},
        "different": {name: _different(rows) for name, rows in learnt.items()},
        "answers cut": {n: d.truncated for n, d in sets.items() if d.truncated},
        "too long": {n: d.dropped for n, d in sets.items() if d.dropped},
        "control tokens": {n: d.escaped for n, d in sets.items() if d.escaped},
        "harmful": {name: len(texts) for name, texts in compared.items()},
        **left_out,
    }
    return Parts(
        sets=sets,
        tests=tests,
        calibrate=calibrate if own else [],
        probe=probe,
        measured=measured,
        harmless=harmless,
        control=control,
        leaks=leaks.refuse_leaks(leaks.shared(compared)),
        record=record,
    )


# --- what is learnt and what is asked -------------------------------------------------


def _split(given: Given, options: OwnOptions) -> tuple[Rows, Rows, Mapping[str, Any]]:
    """Rows to learn, rows to measure on, and a record about them."""
    trained = {name: read.rows for name, read in given.train.items()}
    if not given.evaluation:
        return _hold_back(trained, options.held_out)
    seen = [row.prompt for rows in trained.values() for row in rows]
    tests = {name: read.rows for name, read in given.evaluation.items()}
    for rows in tests.values():
        shared = len(rows) - len(leaks.without(rows, seen)[0])
        if shared:
            warnings.warn(
                f"{option('eval')}: {shared} of {counted(len(rows), 'prompt')} "
                f"{'is' if shared == 1 else 'are'} also in the training examples, so "
                "loss and exact match look better than they are",
                stacklevel=2,
            )
    return trained, tests, {}


def _hold_back(trained: Rows, most: int) -> tuple[Rows, Rows, Mapping[str, Any]]:
    """Rows to learn, and rows to measure on whose prompts no file learns."""
    small = [rows for rows in trained.values() if len(rows) < ENOUGH_TO_HOLD]
    back = {
        name: _spared(rows, small, most) if len(rows) >= ENOUGH_TO_HOLD else []
        for name, rows in trained.items()
    }
    learnt: dict[str, Sequence[Conversation]] = {}
    tests: dict[str, Sequence[Conversation]] = {}
    others: dict[str, int] = {}
    for name, rows in trained.items():
        own, _ = leaks.without(rows, back[name])
        learnt[name], others[name] = leaks.without(own, *back.values())
        if not learnt[name]:
            raise UserError(
                f"{file_of(name)}: expected rows that no other file holds back, got "
                f"{counted(len(rows), 'that is', 'that are')}: give {option('eval')}, "
                "or leave this file out"
            )
        if others[name]:
            warnings.warn(
                f"{file_of(name)}: {others[name]} of {counted(len(rows), 'row')} left "
                "out, because another file's measurement has the same prompts",
                stacklevel=2,
            )
        # With too few to spare, measure how well the training rows are learnt.
        tests[name] = back[name] or leaks.distinct(rows)[0][:most]
    counts = {name: len(rows) for name, rows in back.items()}
    left_out = {name: count for name, count in others.items() if count}
    return learnt, tests, {"held back": counts, "held back in others": left_out}


def _spared(
    rows: Sequence[Conversation], small: Sequence[Sequence[Conversation]], most: int
) -> list[Conversation]:
    """At most a tenth of the rows and half of the prompts; none of a small file."""
    different = leaks.distinct(rows)[0]
    most = min(most, len(rows) // HELD_BACK, len(different) // 2)
    return _some(leaks.without(different, *small)[0], most)


def _unseen(
    given: Given, options: OwnOptions, taken: Sequence[Sequence[Conversation]]
) -> tuple[list[str], list[str], dict[str, int]]:
    """Harmful and harmless prompts that appear nowhere else, and counts of others."""
    # Every answer in a conversation is learnt, so all that precedes it is a prompt.
    seen = [
        leaks.prompt_of(record)
        for rows in taken
        for row in rows
        for record in row.records
    ]
    named, tests = option("harmful"), option("eval")
    harmful = _left(named, given.harmful, seen, f"also learnt or in {tests}")
    name = "harmless prompts"
    if options.harmless_file:
        name = option("study.harmless-file")
    known = [*seen, *given.harmful]
    where = f"also learnt, in {tests} or in {named}"
    harmless = _left(name, given.harmless, known, where)
    counts = {
        "harmful left out": len(given.harmful) - len(harmful),
        "harmless left out": len(given.harmless) - len(harmless),
    }
    return harmful, harmless, counts


def _left(
    name: str, prompts: Sequence[str], seen: Sequence[str], where: str
) -> list[str]:
    """Prompts that were not seen; warns of others, and refuses if none is left."""
    kept, dropped = leaks.without(prompts, seen)
    one, many = f"is {where}", f"are {where}"
    if prompts and not kept:
        raise UserError(
            f"{name}: expected prompts to measure refusal with, got "
            f"{counted(len(prompts), f'that {one}', f'that {many}')}, so nothing is "
            "left: give others"
        )
    if dropped:
        warnings.warn(
            f"{name}: {counted(dropped, f'prompt {one}', f'prompts {many}')}; left out "
            "of every measurement of refusal",
            stacklevel=2,
        )
    return kept


def _some(rows: Sequence[Any], most: int) -> list[Any]:
    """Draws up to ``most`` rows, the same every time, in their order."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]


def _encode(
    name: str, rows: Sequence[Conversation], options: OwnOptions, model: Model
) -> TokenDataset:
    records, names = [], []
    for row in rows:
        for record in row.records:
            system = record.system or options.system
            records.append(dataclasses.replace(record, system=system))
            names.append(row.where)
    _require_system(records, names, model)
    length = min(options.max_length, model.config.context)
    data = encode_records(model.tokenizer, records, length, names)
    if not len(data):
        way = f"raise {option('study.max-length')}"
        if model.config.context <= options.max_length:
            way = "shorten the prompts: the model reads no more"
        raise UserError(
            f"{names[0]}: expected prompts with room for an answer in {length} tokens, "
            f"got {counted(len(records), 'prompt')} without ({name}): {way}"
        )
    return data


def _require_system(
    records: Sequence[Record], names: Sequence[str], model: Model
) -> None:
    """Refuses system messages that the template would silently drop."""
    found = (i for i, record in enumerate(records) if record.system)
    first = next(found, None)
    if first is None:
        return
    record = records[first]
    try:
        text = render(model.tokenizer, record.context, prompt=True)
    except UserError as error:
        raise UserError(f"{names[first]}: {error}") from error
    if str(record.system).strip() not in text:
        raise UserError(
            f"{names[first]}: expected a chat template with a place for a system "
            "message, got one that leaves it out: put it into the user's first "
            "message, or remove it"
        )


# --- harmful prompts and safe exchanges -----------------------------------------------


def _three(
    prompts: Sequence[str], options: OwnOptions, calibrating: bool, monitored: bool
) -> tuple[list[str], list[str], list[str]]:
    """Divides prompts: to calibrate on, for the monitor, and to measure refusal.

    The shares do not depend on the method, so that all methods are measured alike.
    """
    if not prompts:
        return [], [], []
    least = LEAST_HARMFUL if calibrating or monitored else 1
    if len(prompts) < least:
        raise UserError(
            f"{option('harmful')}: expected at least {least} different prompts, of "
            "which some calibrate, some monitor and some measure, got "
            f"{len(prompts)}: add more"
        )
    shuffled = np.random.default_rng(0).permutation(len(prompts)).tolist()
    order: list[str] = [str(prompts[i]) for i in shuffled]
    # A quarter measures, a quarter is for the monitor, and the rest calibrates.
    quarter = max(len(order) // 4, 1)
    measured = order[: min(options.measured, quarter)]
    rest = order[len(measured) :]
    probe = rest[: min(options.probe, quarter)]
    left = rest[len(probe) :][: options.calibration]
    if len(measured) < min(options.measured, ENOUGH_TO_MEASURE):
        warnings.warn(
            f"{option('harmful')}: refusal is measured on "
            f"{counted(len(measured), 'prompt')}, a quarter of {len(order)}: a rate of "
            f"fewer than {ENOUGH_TO_MEASURE} says little",
            stacklevel=2,
        )
    return (left if calibrating else []), (probe if monitored else []), measured


def _unmeasured(name: str, read: Read, measured: Sequence[str]) -> list[Conversation]:
    """Exchanges whose prompts neither monitor nor measure; warns of others."""
    rows, dropped = leaks.without(read.rows, measured)
    if not rows:
        raise UserError(
            f"{option(name)}: expected at least one exchange whose prompt is not in "
            f"{option('harmful')}, got {counted(dropped, 'that is', 'that are')}: give "
            "others"
        )
    if dropped:
        warnings.warn(
            f"{option(name)}: {counted(dropped, 'exchange')} left out: the prompt "
            "monitors or measures refusal",
            stacklevel=2,
        )
    return rows


def _refused(rows: Sequence[Conversation], judge: Judge) -> list[Conversation]:
    """Exchanges whose last answer refuses."""
    answers = [row.records[-1].response for row in rows]
    return refused(judge, rows, [row.prompt for row in rows], answers)


def _refusing(rows: Sequence[Conversation], judge: Judge) -> list[Conversation]:
    """Exchanges whose last answer refuses; warns of others."""
    if judge.describe().get("judge") != "keyword":
        judge = KeywordJudge()
    kept = _refused(rows, judge)
    if not kept:
        raise UserError(
            f"{option('safety')}: expected answers that refuse, got {len(rows)} that "
            f"do not: give others, or leave out {option('study.calibration-refusals')}"
        )
    if len(kept) < len(rows):
        warnings.warn(
            f"{option('safety')}: {len(rows) - len(kept)} of {len(rows)} answers hold "
            "no refusal and are left out",
            stacklevel=2,
        )
    return kept


def _warn_unrefused(rows: Sequence[Conversation], judge: Judge) -> None:
    """Warns of safe exchanges that do not refuse, if the judge needs no model."""
    if judge.describe().get("judge") != "keyword":
        return
    if other := len(rows) - len(_refused(rows, judge)):
        warnings.warn(
            f"{option('safety')}: no refusal found in {other} of "
            f"{counted(len(rows), 'answer')}; a defence then keeps how these are "
            "answered, not that they are refused",
            stacklevel=2,
        )


# --- sizes ----------------------------------------------------------------------------


def file_of(domain: str) -> str:
    """How a message names a domain's examples; rows have no file name."""
    said = option("train")
    return said if said == domain else f"{said} {domain}"


def _different(rows: Sequence[Conversation]) -> int:
    """Number of examples that differ in prompt or answer."""
    records = [record for row in rows for record in row.records]
    return len({(leaks.prompt_of(r), r.system, r.response) for r in records})


def steps_of(data: TokenDataset, epochs: float, batch: int) -> int:
    """Number of optimizer steps for some epochs of a set."""
    return max(math.ceil(epochs * len(data) / batch), 1)


def warn_sizes(
    name: str, data: TokenDataset, epochs: float, different: int | None = None
) -> None:
    """Warns of few examples and of many epochs."""
    count = len(data)
    different = count if different is None else min(different, count)
    if different < FEW:
        shown = counted(count, "example is few", "examples are few")
        if different < count:
            same = counted(different, "different example")
            shown = f"{same} (of {count}) {'is' if different == 1 else 'are'} few"
        warnings.warn(
            f"{file_of(name)}: {shown}; the model may only learn them by heart; give "
            f"{option('eval')} to measure it on others",
            stacklevel=2,
        )
    if epochs > MANY_EPOCHS:
        warnings.warn(
            f"{file_of(name)}: every example is seen {epochs:.0f} times; more than "
            f"{MANY_EPOCHS} epochs usually harm the model",
            stacklevel=2,
        )


def lengths_of(data: TokenDataset) -> tuple[float, int]:
    """Mean and largest number of tokens in a set's examples."""
    found = used_lengths(data)
    return float(found.mean()), int(found.max())
