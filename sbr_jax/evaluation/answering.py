"""Tasks with written answers: truth, arithmetic, conversation.

References: arXiv:2109.07958 (TruthfulQA), arXiv:2110.14168 (GSM8K), arXiv:2306.05685
(MT-Bench).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.evaluation.final_number import final_number
from sbr_jax.evaluation.items import (
    DialogueLike,
    ExchangeLike,
    QuestionLike,
    Result,
    some,
)
from sbr_jax.evaluation.multiple_choice import truthfulqa_prompt
from sbr_jax.evaluation.runner import Runner
from sbr_jax.evaluation.similarity import bleu, rouge1
from sbr_jax.typing import UserError

SIMILARITIES: dict[str, Callable[[str, str], float]] = {"bleu": bleu, "rouge1": rouge1}


def truthfulqa_generation(
    runner: Runner,
    items: Sequence[QuestionLike],
    *,
    similarity: str = "bleu",
    preamble: bool = True,
    max_new_tokens: int = 50,
) -> Result:
    """TruthfulQA's written answers: nearer to a true reference than to any false one?

    Args:
      runner: who is examined.
      items: questions with references.
      similarity: ``"bleu"`` or ``"rouge1"``; a stand-in for the authors' trained judge.
      preamble: put six examples before each question.
      max_new_tokens: limit of an answer (50 is the authors').

    Returns:
      ``truthful``: the share of answers whose best likeness to a true reference
      exceeds the best to a false one (a tie does not); ``difference`` of the two, a
      mean in points; ``empty``, the share without a word.

    Raises:
      UserError: no items, or an unknown similarity.
    """
    some("truthfulqa", items)
    if similarity not in SIMILARITIES:
        raise UserError(
            f"truthfulqa: expected similarity among {', '.join(SIMILARITIES)}, got "
            f"{similarity!r}"
        )
    alike = SIMILARITIES[similarity]
    answers = runner.answers(
        [truthfulqa_prompt(item.prompt, preamble) for item in items],
        max_new_tokens=max_new_tokens,
        stop=("\n\n", "\nQ:"),
    )
    rows = []
    for item, answer in zip(items, answers, strict=True):
        true, false = (
            max((alike(answer, reference) for reference in references), default=0.0)
            for references in (item.correct, item.incorrect)
        )
        rows.append({"id": item.id, "true": round(true, 4), "false": round(false, 4)})
    differences = np.array([row["true"] - row["false"] for row in rows])
    metrics = {
        "truthful": 100.0 * float((differences > 0).mean()),
        "difference": float(differences.mean()),
        "empty": 100.0 * sum(not a.strip() for a in answers) / len(answers),
    }
    settings = {
        "similarity": similarity,
        "preamble": preamble,
        "max_new_tokens": max_new_tokens,
        **runner.describe(),
    }
    return Result(metrics, settings, rows)


def gsm8k(
    runner: Runner,
    items: Sequence[ExchangeLike],
    examples: Sequence[ExchangeLike] = (),
    *,
    max_new_tokens: int = 400,
) -> Result:
    """GSM8K: exact match of the final number.

    Args:
      runner: who is examined.
      items: questions with worked answers that end with ``#### NUMBER``.
      examples: solved questions to put first (5 or 8 are usual; pass training rows).
      max_new_tokens: limit of an answer.

    Returns:
      ``accuracy`` (the last number of the answer), ``accuracy_marked`` (only a number
      after ``####`` counts) and ``unparsed`` (answers without a number, in percent).

    Raises:
      UserError: no items, or one whose own answer has no number after ``####``.
    """
    some("gsm8k", items)
    truth = [final_number(item.answer, marked=True) for item in items]
    if None in truth:
        raise UserError(
            f"gsm8k: expected '#### NUMBER' in the answer of item {truth.index(None)}"
        )
    head = "".join(f"Question: {e.prompt}\nAnswer: {e.answer}\n\n" for e in examples)
    answers = runner.answers(
        [f"{head}Question: {item.prompt}\nAnswer:" for item in items],
        max_new_tokens=max_new_tokens,
        stop=("Question:",),
    )
    last = [final_number(answer) for answer in answers]
    marked = [final_number(answer, marked=True) for answer in answers]
    metrics = {
        "accuracy": _equal(last, truth),
        "accuracy_marked": _equal(marked, truth),
        "unparsed": 100.0 * sum(n is None for n in last) / len(last),
    }
    rows = [
        {"id": i, "right": a == t}
        for i, (a, t) in enumerate(zip(last, truth, strict=True))
    ]
    settings = {
        "shots": len(examples),
        "max_new_tokens": max_new_tokens,
        **runner.describe(),
    }
    return Result(metrics, settings, rows)


def write_mtbench(
    runner: Runner,
    items: Sequence[DialogueLike],
    path: str | Path,
    *,
    model_id: str,
    max_new_tokens: int = 1024,
) -> Path:
    """Answers MT-Bench's conversations and writes them for its judge.

    One JSON object per line in the layout of FastChat's ``model_answer`` files. The
    judge itself is a model behind an API and not ours to run.

    Args:
      runner: who is examined, a chat model.
      items: conversations; a turn is asked after the answers to those before.
      path: the file, replaced if it exists.
      model_id: the name it goes under.
      max_new_tokens: limit of an answer.

    Returns:
      The path.

    Raises:
      UserError: there are no items.
    """
    some("mtbench", items)
    spoken: list[list[dict[str, str]]] = [[] for _ in items]
    for turn in range(max(len(item.turns) for item in items)):
        here = [i for i, item in enumerate(items) if turn < len(item.turns)]
        for i in here:
            spoken[i].append({"role": "user", "content": items[i].turns[turn]})
        answers = runner.answers(
            [spoken[i] for i in here], max_new_tokens=max_new_tokens
        )
        for i, answer in zip(here, answers, strict=True):
            spoken[i].append({"role": "assistant", "content": answer})
    lines = []
    for item, messages in zip(items, spoken, strict=True):
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        name = hashlib.sha256(f"{model_id}/{item.id}".encode()).hexdigest()[:22]
        row = {
            "question_id": int(item.id) if item.id.isdigit() else item.id,
            "answer_id": name,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _equal(mine: Sequence[Any], truth: Sequence[Any]) -> float:
    return 100.0 * float(np.mean([a == b for a, b in zip(mine, truth, strict=True)]))
