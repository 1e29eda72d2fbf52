"""Items of every kind, and an examinee and a judge whose answers are known."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sbr_jax.data.records import BehaviourItem, BiasItem, ChoiceItem, CodeItem
from sbr_jax.evaluation import Verdict, sandbox

ISOLATION = "kernel" if sandbox.kernel_isolation() else "audit"
needs_kernel = pytest.mark.skipif(
    ISOLATION != "kernel", reason="no kernel filter on this machine"
)
PROMPT = 'from typing import List\n\n\ndef twice(x: int) -> int:\n    """2x."""\n'
CHECK = (
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0"
)
TASK = CodeItem(PROMPT, "twice", "", CHECK, "t/0")


class Fake:
    """Answers by a function of the prompt; remembers what it was asked."""

    def __init__(self, answer=None, prefer=None):
        self.answer, self.prefer, self.asked, self.stops = answer, prefer, [], ()

    def log_likelihoods(self, prompts, options):
        self.asked += list(prompts)
        return [
            np.array([self.prefer(p, o) for o in row], np.float64)
            for p, row in zip(prompts, options, strict=True)
        ]

    def answers(self, prompts, *, max_new_tokens, stop=()):
        self.asked += [json.loads(json.dumps(p)) for p in prompts]
        self.stops = stop
        return [self.answer(p) for p in prompts]

    def describe(self):
        return {"chat": False}


@dataclasses.dataclass
class Told:
    """A judge whose verdict is a function of the prompt."""

    verdict: Callable[[str], Verdict]

    def __call__(self, prompts, answers):
        return [self.verdict(prompt) for prompt in prompts]

    def describe(self):
        return {"judge": "told"}


def choice(question, choices, correct, id="0", group="g"):
    return ChoiceItem(question, tuple(choices), tuple(correct), id, group)


def request(id, prompt=None, group="g", kind="standard", harmful=True):
    text = id if prompt is None else prompt
    return BehaviourItem(text, id, group=group, kind=kind, harmful=harmful)


def person(id, choices, category="c", ambiguous=True, correct=2, biased=0):
    """An item of BBQ whose last option is the undecided one."""
    return BiasItem(
        "w1", "w2", tuple(choices), correct, 2, biased, True, ambiguous, category, id
    )


def words(names, specials=("<unk>", "<s>", "</s>"), template=None):
    """A tokenizer of whole words, the control tokens first."""
    ids = {name: i for i, name in enumerate([*specials, *names])}
    raw = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(s, special=True) for s in specials])
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    out.chat_template = template
    return out
