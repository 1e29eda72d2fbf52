"""Self-answers: the aligned model answers the prompts of risky training rows.

This part is ours; the probe is that of Goel, Maji, Mazumder, arXiv:2602.17546. At the
start of a domain, the probe rates every training row once, on the aligned model. In a
row with

    s ≥ τ

the aligned model's greedy answer to the prompt replaces the answer in the data. None of
this runs in a step. A dropped row would teach nothing about its prompt; a row answered
anew teaches the aligned model's answer.

The probe sees prompts only, so it misses an attack whose prompts look harmless.

Symbols: s risk of a row in [0, 1], τ threshold.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.data import TokenDataset
from sbr_jax.methods._compose import with_state
from sbr_jax.methods._raters import probe_rater
from sbr_jax.methods.base import Method, Problem
from sbr_jax.methods.probe import activations, probe_risk
from sbr_jax.typing import PyTree, UserError

TELLS = 0.9
"""Least AUROC on its validation prompts for a probe to be used."""


def with_self_answers(method: Method, threshold: float) -> Method:
    """Let the aligned model answer the rows that a probe finds risky to learn.

    **Guarantee**: prompts, and rows below the threshold, stay as they are. A step costs
    nothing extra. With τ = 0 the model answers every row.

    Args:
      method: any defence; examples that it ties to a reference stay as they are.
      threshold: τ in [0, 1].

    Returns:
      The method. Its training reports ``self_answers``, the share of the data's rows
      that were answered anew. Its ``init`` raises :class:`UserError` unless both prompt
      sets are there and the probe can tell them apart (AUROC of at least 0.9 on prompts
      that it was not fitted on).
    """
    rater = probe_rater(name=f"{method.name} with self_answers")

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        found = rater.init(problem, base, adapter, key)
        auroc = float(found["probe"].auroc)
        if auroc < TELLS:
            raise UserError(
                f"self_answers: expected a probe that tells harmful prompts from "
                f"benign ones (AUROC of {TELLS} or more on held-out prompts), got "
                f"{auroc:.2f}: use {method.name} without it, or adaptive-judge"
            )
        return found

    def begin_domain(problem, base, state, examples, key):
        examples, metrics = method.begin_domain(problem, base, state, examples, key)
        risk = risky_rows(problem, base, state["self_answers"]["probe"], examples)
        own = np.ones(len(risk), bool) if examples.tied is None else examples.tied < 0
        rows = np.flatnonzero(own & (risk >= threshold))
        share = {"self_answers": len(rows) / own.sum()}
        return answered(problem, base, examples, rows), {**metrics, **share}

    rated = with_state(method, "self_answers", init, rater.outline)
    return dataclasses.replace(rated, begin_domain=begin_domain)


def risky_rows(
    problem: Problem, base: PyTree, probe: PyTree, examples: TokenDataset
) -> np.ndarray:
    """The probe's risk of every example's prompt, float32 ``[N]``."""
    features = activations(problem.apply_fn, base, None, examples)
    return np.asarray(probe_risk(probe, jnp.asarray(features)))


def answered(
    problem: Problem, base: PyTree, examples: TokenDataset, rows: np.ndarray
) -> TokenDataset:
    """The examples, with the aligned model's greedy answers in the given rows.

    An answer is at most as long as the longest in the data. If the model finished it,
    it ends with the token that ends most of the data's answers.

    Raises:
      UserError: if the problem has no model that generates answers.
    """
    if not len(rows):
        return examples
    if problem.answer is None:
        raise UserError(
            "self_answers: expected a model that generates, got none: give the problem "
            "an `answer`"
        )
    starts = np.argmax(examples.mask > 0, axis=1)
    most = int((examples.mask > 0).sum(axis=1).max())
    stops = _stops(examples)
    prompts = [examples.tokens[row, : starts[row]].tolist() for row in rows]
    found = problem.answer(base, prompts, most, stops)
    room = max(examples.length, *(int(starts[row]) + most for row in rows))
    widened = ((0, 0), (0, room - examples.length))
    tokens, mask = np.pad(examples.tokens, widened), np.pad(examples.mask, widened)
    for row, answer in zip(rows, found, strict=True):
        own = slice(int(starts[row]), int(starts[row]) + most)
        whole = (answer + stops)[:most]
        tokens[row, starts[row] :], mask[row, starts[row] :] = 0, 0
        tokens[row, own][: len(whole)], mask[row, own][: len(whole)] = whole, 1
    return dataclasses.replace(examples, tokens=tokens, mask=mask)


def _stops(examples: TokenDataset) -> list[int]:
    """The token that ends most answers, in a list; empty if there is none."""
    last = examples.length - 1 - np.argmax(examples.mask[:, ::-1] > 0, axis=1)
    ends = np.take_along_axis(examples.tokens, last[:, None], axis=1)[:, 0]
    token, count = Counter(ends.tolist()).most_common(1)[0]
    return [token] if 2 * count > len(ends) else []
