"""Likeness of short texts: sentence BLEU and ROUGE-1.

BLEU = bp · exp(mean over n ≤ 4 of log p_n), p_n the share of an answer's n-grams that
the reference has (each as often as there), bp = exp(1 − reference/answer) where the
answer is the shorter. An order without a match counts ½, ¼, … of one match (the
"exponential" smoothing of sacreBLEU, arXiv:1804.08771), so that short answers compare.
"""

import math
import re
from collections import Counter

_TOKEN = re.compile(r"\w+|[^\w\s]")


def _grams(tokens: list[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU in 0..100; letters' case does not count.

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


def rouge1(answer: str, reference: str) -> float:
    """F1 of shared words in 0..100.

    >>> rouge1("a b", "b c")
    50.0
    """
    mine, theirs = (Counter(_TOKEN.findall(t.lower())) for t in (answer, reference))
    total = mine.total() + theirs.total()
    return 100.0 * 2 * (mine & theirs).total() / total if total else 0.0
