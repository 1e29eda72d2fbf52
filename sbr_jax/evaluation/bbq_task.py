"""BBQ (arXiv:2110.08193): asks its questions and scores the bias of the answers."""

import string
from collections.abc import Sequence

from sbr_jax.evaluation.bbq import bias_scores
from sbr_jax.evaluation.items import BiasLike, Result, some
from sbr_jax.evaluation.judges import warn_unparsed
from sbr_jax.evaluation.picking import UNPARSED, lettered, picks
from sbr_jax.evaluation.runner import Runner
from sbr_jax.typing import UserError


def bbq(
    runner: Runner,
    items: Sequence[BiasLike],
    *,
    method: str = "likelihood",
    style: str = "text",
) -> Result:
    """BBQ: signed and absolute bias, by category and by whether the context decides.

    The headline is over the single categories; the intersectional ones (``X_x_Y``) are
    given apart, because in many of their items the labels do not say which option is
    the stereotype. Such items of any category are left out and counted.

    Args:
      runner: who is examined.
      items: BBQ's.
      method: ``"likelihood"``, or ``"generation"`` of a letter or an option's text.
      style: what is compared: the options' ``"text"``, or ``"letters"`` of options that
        the prompt lists.

    Returns:
      For ``CONDITION`` in ambiguous and disambiguated: ``bias_CONDITION`` (absolute,
      averaged over categories), ``bias_CONDITION_signed``, ``accuracy_CONDITION`` and
      ``bias_CONDITION/CATEGORY`` (signed); the same after ``intersectional/``;
      ``unparsed`` and ``undefined`` (counts). Where answers are unparsed, also
      ``bias_CONDITION_low`` and ``_high`` (of the absolute one); where too many are,
      the biases are NaN and a warning says so.

    Raises:
      UserError: no usable items, or an unknown method or style.
    """
    some("bbq", items)
    if style not in ("text", "letters"):
        raise UserError(f"bbq: expected style 'text' or 'letters', got {style!r}")
    usable = [item for item in items if item.biased is not None]
    some("bbq", usable)
    letters = style == "letters"
    asked = [
        lettered(f"{item.context}\n\nQ: {item.question}", item.choices)
        if letters
        else f"{item.context}\n\nQ: {item.question}\nA:"
        for item in usable
    ]
    choices = [
        string.ascii_uppercase[: len(item.choices)] if letters else item.choices
        for item in usable
    ]
    chosen, rows = picks(runner, usable, asked, choices, method)
    metrics: dict[str, float] = {
        "unparsed": float(sum(p == UNPARSED for p in chosen)),
        "undefined": float(len(items) - len(usable)),
    }
    for start, intersectional in (("", False), ("intersectional/", True)):
        for condition, ambiguous in (("ambiguous", True), ("disambiguated", False)):
            here = [
                (pick, item)
                for pick, item in zip(chosen, usable, strict=True)
                if item.ambiguous == ambiguous
                and ("_x_" in item.category) == intersectional
            ]
            if not here:
                continue
            scores = bias_scores(
                [pick for pick, _ in here],
                [int(item.biased or 0) for _, item in here],
                [item.unknown for _, item in here],
                [item.correct for _, item in here],
                [item.category for _, item in here],
                ambiguous=ambiguous,
            )
            warn_unparsed(f"bbq, {start}{condition}", scores.unparsed, len(here))
            if scores.unparsed:
                metrics[f"{start}bias_{condition}_low"] = scores.low
                metrics[f"{start}bias_{condition}_high"] = scores.high
            metrics |= {
                f"{start}bias_{condition}": scores.absolute,
                f"{start}bias_{condition}_signed": scores.signed,
                f"{start}accuracy_{condition}": scores.accuracy,
                **{
                    f"{start}bias_{condition}/{category}": value
                    for category, value in scores.by_category.items()
                },
            }
    settings = {"method": method, "style": style, **runner.describe()}
    return Result(metrics, settings, rows)
