"""Judges of a study on a chat model: of answers, and of training pairs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sbr_jax import models
from sbr_jax.data.template import fix_template
from sbr_jax.errors import option
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.judges.guard import (
    GuardJudge,
    first_tokens,
    harmbench_classifier,
    llama_guard,
    wild_guard,
)
from sbr_jax.methods.judges import as_text, label_likelihood_judge
from sbr_jax.methods.risk import Judge as RiskJudge
from sbr_jax.models import hf_config
from sbr_jax.models.weights import check_weights
from sbr_jax.studies.chat.checkpoints import locate
from sbr_jax.studies.options import ModelOptions
from sbr_jax.typing import UserError

HEADER_END, BREAKS = "<|end_header_id|>", "\n\n"
"""How a turn of the Llama 3 family begins: end of the header, then two line breaks."""


def _llama_guard(model: models.Model, *, breaks: bool = False) -> GuardJudge:
    """Llama Guard, which may write two line breaks before its label.

    Version 3's template stops after the header of the guard's own turn, so the guard
    itself writes the two line breaks first. With earlier templates the label comes
    first.

    Args:
        model: the guard.
        breaks: expect the line breaks whatever the template, unless it writes them.
    """
    judge = llama_guard(model)
    end = model.tokenizer.decode(judge.encode("?", "!")[-2:])
    if not (end.endswith(HEADER_END) or (breaks and not end.endswith(BREAKS))):
        return judge
    settings = {**judge.settings, "lead": BREAKS}
    return dataclasses.replace(llama_guard(model, lead=BREAKS), settings=settings)


GUARDS: dict[str, Callable[[models.Model, Path], GuardJudge]] = {
    "llama-guard": lambda model, folder: _llama_guard(model),
    "llama-guard-3": lambda model, folder: _llama_guard(model, breaks=True),
    "wildguard": lambda model, folder: wild_guard(model, folder / "template.txt"),
    "harmbench": lambda model, folder: harmbench_classifier(
        model, folder / "template.txt"
    ),
}
"""Judges with a checkpoint. The last two read their question from a file beside it.

`llama-guard` is any version with its publisher's template. `llama-guard-3` names the
version explicitly, for a checkpoint with another template."""


def make_judge(options: ModelOptions, *, weights: bool = True) -> Judge:
    """The judge of answers that a study names.

    Without weights it can only describe itself.

    Raises:
        UserError: for an unknown name or list, and a folder without a guard.
    """
    name, folder = options.judge, options.judge_folder
    kind, _, words = name.partition(":")
    if kind == "keyword":
        return KeywordJudge(words) if words else KeywordJudge()
    if folder is None:
        raise UserError(
            f"{option('study.judge', name)}: expected the folder or hub id of that "
            f"guard, got none: add {option('study.judge-folder', 'FOLDER')}, or leave "
            "both out for a word list"
        )
    place = locate(folder, weights=weights, setting="study.judge-folder")
    config = hf_config.read(place)
    tokenizer = models.load_tokenizer(place, vocab_size=config.vocab_size)
    if tokenizer is None:
        raise UserError(
            f"{option('study.judge-folder')}: expected a tokenizer in {place}, found "
            "none"
        )
    if weights:
        model = models.load(place, dtype=jnp.dtype(options.dtype))
    else:
        if Path(folder).is_dir():
            check_weights(place, config)
        model = models.make_model(config, None, tokenizer)
    told = fix_template(tokenizer, date=options.date)
    return GUARDS[name](dataclasses.replace(model, tokenizer=told), place)


def risk_judge(judge: Judge, tokenizer: Any) -> RiskJudge | None:
    """The judge of training pairs: the guard's own label, where it has one.

    A list of refusal words shows whether an answer refuses, not whether it does harm.
    It would call every harmless answer a risk, so such a judge rates nothing.

    Returns:
        `(dataset) -> risk [N]`, or None.
    """
    if not isinstance(judge, GuardJudge) or judge.labels is None:
        return None
    harmless, harmful = first_tokens(judge.model.tokenizer, judge.labels)
    render = as_text(tokenizer, judge.encode)
    return label_likelihood_judge(judge.model, None, (harmful, harmless), render)
