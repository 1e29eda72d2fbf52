"""Items of every kind, and an examinee whose answers are known beforehand."""

import json

import numpy as np


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

    def answers(self, prompts, *, max_new_tokens, stop=(), temperature=0.0, key=None):
        self.asked += [json.loads(json.dumps(p)) for p in prompts]
        self.stops = stop
        return [self.answer(p) for p in prompts]

    def describe(self):
        return {"chat": False}
