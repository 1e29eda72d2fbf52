"""Files that a user gives, read before any part of a model."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbr_jax.data.conversations import Read, read_conversations, read_prompts
from sbr_jax.data.harmless import HARMLESS
from sbr_jax.data.readers import whole_text
from sbr_jax.errors import counted, option
from sbr_jax.methods.needs import ABOUT, HARMFUL, JUDGE, MIX, PAIRS, SAFE, UNALIGNED
from sbr_jax.studies.options import RATERS, OwnOptions
from sbr_jax.typing import UserError

Source = str | Path | Iterable[Any]
"""Where rows are (a path or a hub id), or the rows themselves."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Rows of a user's files.

    Attributes:
        train: by domain, in order of training.
        evaluation: by domain, or under "all" for all domains; empty to hold rows back.
        safe: exchanges with safe answers.
        harmful: different prompts.
        pairs: harmful requests with compliant answers.
        harmless: prompts that the model should not refuse.
        general: texts or exchanges of another kind.
    """

    train: Mapping[str, Read]
    evaluation: Mapping[str, Read]
    safe: Read | None
    harmful: Sequence[str]
    pairs: Read | None
    harmless: Sequence[str]
    general: Sequence[str] | Read | None


ALL = "all"
"""Key of evaluation rows that serve all domains."""


def read_given(
    train: Sequence[Source],
    evaluation: Sequence[Source],
    safe: Source | None,
    harmful: Source | None,
    options: OwnOptions,
) -> Given:
    """Reads all files that were given.

    There may be no evaluation file, one for all domains, or one for each.
    """
    if not train:
        add = option("train", "FILE")
        raise UserError(f"expected training examples, got none: add {add}")
    if len(evaluation) not in (0, 1, len(train)):
        raise UserError(
            f"{option('eval')}: expected one file, or as many as {option('train')} "
            f"has ({len(train)}), got {len(evaluation)}"
        )
    found: dict[str, Read] = {}
    for source in train:
        read = read_conversations(source, option("train"))
        name, number = read.name, 1
        while name in found:
            number += 1
            name = f"{read.name}-{number}"
        found[name] = read
    names = [ALL] if len(evaluation) < len(found) else list(found)
    tests = {
        name: read_conversations(source, option("eval"))
        for name, source in zip(names, evaluation, strict=bool(evaluation))
    }
    pairs, harmless = options.pairs_file, options.harmless_file
    return Given(
        train=found,
        evaluation=tests,
        safe=None if safe is None else read_conversations(safe, option("safety")),
        harmful=[] if harmful is None else _each_once(harmful, "harmful"),
        pairs=read_conversations(pairs, option("study.pairs-file")) if pairs else None,
        harmless=_each_once(harmless, "study.harmless-file") if harmless else HARMLESS,
        general=_general(options.general_file),
    )


def _each_once(source: Source, name: str) -> list[str]:
    """The different prompts of a source; warns of repeated ones."""
    found, repeats = read_prompts(source, option(name))
    # Repeats in a public set are not the user's mistake.
    own = not isinstance(source, str | Path) or Path(source).is_file()
    if own and repeats:
        count = counted(len(found) + repeats, "prompt")
        warnings.warn(
            f"{option(name)}: {repeats} of {count} repeat another; each is taken once",
            stacklevel=2,
        )
    return found


def _general(file: str | None) -> Sequence[str] | Read | None:
    """Paragraphs of a text file, or exchanges."""
    if file is None:
        return None
    name = option("study.general-file")
    if Path(file).suffix != ".txt":
        return read_conversations(file, name)
    if not Path(file).is_file():
        raise UserError(f"{name}: expected a text file, found no {file}")
    found = [part.strip() for part in whole_text(Path(file)).split("\n\n")]
    if not any(found):
        raise UserError(f"{name}: expected text in {file}, got none")
    return [text for text in found if text]


def require_needed(
    variant: str, needed: Iterable[str], given: Given, options: OwnOptions
) -> None:
    """Refuses a defence if a part that it needs was not given."""
    own = bool(given.harmful)
    there = {
        SAFE: own or given.safe is not None,
        MIX: own or given.safe is not None,
        HARMFUL: own,
        PAIRS: given.pairs is not None,
        UNALIGNED: options.unaligned_folder is not None,
        JUDGE: options.judge in RATERS,
    }
    for part in sorted(needed):
        if not there.get(part, True):
            raise UserError(
                f"{option('method', variant)}: expected {_about(part)}, got none; none "
                f"comes with this program. {option('method', 'plain')} needs none, and "
                "defends nothing"
            )


def _about(part: str) -> str:
    """What a part is made of, and how the caller gives it."""
    given = r"--([\w.-]+) ([\w-]+)"
    return re.sub(given, lambda found: option(found[1], found[2]), ABOUT[part])
