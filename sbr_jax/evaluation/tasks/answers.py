r"""Tasks with written answers: truth, arithmetic, conversation.

BLEU = bp · exp(mean over n ≤ 4 of log p_n), where p_n is the share of an answer's
n-grams that occur in the reference (each counted at most as often as there), and
bp = exp(1 − reference/answer) if the answer is the shorter. An order without a match
counts ½, ¼, … of one match (the "exponential" smoothing of sacreBLEU,
arXiv:1804.08771), so that short answers can be compared.

In numbers, a minus may be a hyphen, U+2212 or a dash. Groups of three digits may be
separated by a comma, an apostrophe, an underscore, a thin or no-break space, or LaTeX's
spellings of these (``9{,}500``, ``9\,500``). A plain space separates two numbers, and
so does a comma without three digits after it.

References: arXiv:2109.07958 (TruthfulQA), arXiv:2110.14168 (GSM8K), arXiv:2306.05685
(MT-Bench).
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbr_jax.data.records import DialogueItem, Pair, QuestionItem
from sbr_jax.evaluation.result import Result, require_items
from sbr_jax.evaluation.runner import Runner
from sbr_jax.evaluation.tasks.choices import truthfulqa_prompt
from sbr_jax.typing import UserError

# --- truth ----------------------------------------------------------------------------

_TOKEN = re.compile(r"\w+|[^\w\s]")


def _grams(tokens: list[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU in 0..100, ignoring case.

    >>> round(bleu("The cat sat.", "the cat sat."), 1), bleu("", "a")
    (100.0, 0.0)
    """
    mine, theirs = (_TOKEN.findall(t.lower()) for t in (answer, reference))
    if not mine or not theirs:
        return 0.0
    logs, half = [], 1.0
    for n in range(1, min(4, len(mine)) + 1):
        grams = _grams(mine, n)
        hits = (grams & _grams(theirs, n)).total()
        if not hits:
            if n == 1:
                return 0.0
            half /= 2
        logs.append(math.log((hits or half) / grams.total()))
    short = min(0.0, 1.0 - len(theirs) / len(mine))
    return 100.0 * math.exp(short + sum(logs) / len(logs))


def truthfulqa_generation(
    runner: Runner, items: Sequence[QuestionItem], *, max_new_tokens: int = 50
) -> Result:
    """TruthfulQA's written answers: closer to a true reference than to any false one?

    Similarity is BLEU, a stand-in for the authors' trained judge; six examples precede
    each question. Answers have the authors' length limit.

    Returns:
      ``truthful``: the share of answers whose best similarity to a true reference
      exceeds the best to a false one (a tie does not); ``difference`` of the two, a
      mean in points; ``empty``, the share without a word.
    """
    require_items("truthfulqa", items)
    answers = runner.answers(
        [truthfulqa_prompt(item.prompt, preamble=True) for item in items],
        max_new_tokens=max_new_tokens,
        stop=("\n\n", "\nQ:"),
    )
    rows = []
    for item, answer in zip(items, answers, strict=True):
        true, false = (
            max((bleu(answer, reference) for reference in references), default=0.0)
            for references in (item.correct, item.incorrect)
        )
        rows.append({"id": item.id, "true": round(true, 4), "false": round(false, 4)})
    differences = np.array([row["true"] - row["false"] for row in rows])
    metrics = {
        "truthful": 100.0 * float((differences > 0).mean()),
        "difference": float(differences.mean()),
        "empty": 100.0 * sum(not a.strip() for a in answers) / len(answers),
    }
    return Result(
        metrics, {"max_new_tokens": max_new_tokens, **runner.describe()}, rows
    )


# --- arithmetic -----------------------------------------------------------------------

_SPELLINGS = (
    (re.compile("[\u200b\u2060\ufeff]"), ""),
    # Full-width digits and signs, as CJK keyboards type them.
    (re.compile("[\uff01-\uff5e]"), lambda found: chr(ord(found[0]) - 0xFEE0)),
    (re.compile("[\u2010-\u2015\u2212\ufe63]"), "-"),
    (re.compile(r"\\([$%])"), r"\1"),
    (
        re.compile(
            r"(?<=\d)(?:\{\\?[,.]\}|,?\\(?:[,;:! ]|thinspace ?)|~)(?=\d{3}(?!\d))"
        ),
        ",",
    ),
    (re.compile("(?<=\\d)['_\u2019\u00a0\u2002-\u200a\u202f](?=\\d{3}(?!\\d))"), ","),
)
"""Patterns of alternative spellings, and their replacements."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)])-[$€£¥]?|[$€£¥]-?)?"
    r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+|(?<![\w.])(?=\.\d))(?:\.\d+)?"
    r"(?:[eE][+-]?\d+(?!\w))?"
)


def final_number(answer: str, *, marked: bool = False) -> float | None:
    """The last number in an answer; None if there is none.

    Args:
      answer: text.
      marked: read only the number after ``####``, as in GSM8K's answers.

    >>> final_number("so 3 apples, $1,200.50."), final_number("6", marked=True)
    (1200.5, None)
    """
    if marked:
        _, mark, answer = answer.rpartition("####")
        answer = answer if mark else ""
    for pattern, plain in _SPELLINGS:
        answer = pattern.sub(plain, answer)
    found = _NUMBER.findall(answer)
    if not found:
        return None
    return float(re.sub("[$€£¥,]", "", found[0 if marked else -1]))


def gsm8k(
    runner: Runner,
    items: Sequence[Pair],
    examples: Sequence[Pair] = (),
    *,
    max_new_tokens: int = 400,
) -> Result:
    """GSM8K: exact match of the final number.

    Items have worked answers that end with ``#### NUMBER``. Solved ``examples`` come
    first (5 or 8 are usual; use training rows).

    Returns:
      ``accuracy`` (of the last number in the answer), ``accuracy_marked`` (only a
      number after ``####`` counts) and ``unparsed`` (answers without a number, in
      percent).

    Raises:
      UserError: for no items, or one whose own answer has no number after ``####``.
    """
    require_items("gsm8k", items)
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
    pairs = enumerate(zip(last, truth, strict=True))
    rows = [{"id": i, "right": a == t} for i, (a, t) in pairs]
    settings = {
        "shots": len(examples),
        "max_new_tokens": max_new_tokens,
        **runner.describe(),
    }
    return Result(metrics, settings, rows)


def _equal(mine: Sequence[Any], truth: Sequence[Any]) -> float:
    return 100.0 * float(np.mean([a == b for a, b in zip(mine, truth, strict=True)]))


# --- conversation ---------------------------------------------------------------------


def mtbench(
    runner: Runner,
    items: Sequence[DialogueItem],
    folder: str | Path,
    *,
    max_new_tokens: int = 1024,
) -> Result:
    """MT-Bench: holds its conversations and writes them for a judge elsewhere.

    Writes one JSON object per line in the layout of FastChat's ``model_answer`` files.
    The file ``mtbench-NUMBER.jsonl`` is named by its content: the task does not know
    which weights these are, and a continued run must not write the same answers under
    another name. It needs a chat model; each turn follows the answers to the earlier
    ones.

    Returns:
      ``answered`` (answers that are not blank, in percent) and ``file``, the number.
    """
    require_items("mtbench", items)
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
    said = [[m["content"] for m in talk if m["role"] == "assistant"] for talk in spoken]
    turns = [turn for mine in said for turn in mine]
    number = int(_digest("\0".join(turns)), 16) % 10**6
    name = f"mtbench-{number:06d}"
    lines = [
        json.dumps(
            {
                "question_id": int(item.id) if item.id.isdigit() else item.id,
                "answer_id": _digest(f"model/{item.id}")[:22],
                "model_id": name,
                "choices": [{"index": 0, "turns": mine}],
            },
            ensure_ascii=False,
        )
        for item, mine in zip(items, said, strict=True)
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    answered = 100.0 * sum(bool(turn.strip()) for turn in turns) / len(turns)
    metrics = {"answered": answered, "file": float(number)}
    settings = {"max_new_tokens": max_new_tokens, **runner.describe()}
    return Result(metrics, settings, [{"id": item.id} for item in items])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
