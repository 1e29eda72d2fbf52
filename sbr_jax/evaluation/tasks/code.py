"""HumanEval (arXiv:2107.03374): completes functions and runs them in a sandbox."""

from collections.abc import Sequence

import numpy as np

from sbr_jax.data.records import CodeItem
from sbr_jax.evaluation.result import Result, require_items
from sbr_jax.evaluation.runner import Runner
from sbr_jax.evaluation.sandbox import Trial, run_many
from sbr_jax.evaluation.tasks._extraction import find_program
from sbr_jax.typing import UserError


def humaneval_program(item: CodeItem, answer: str) -> Trial:
    """The program that an answer gives, and the test of its function.

    The answer may have any form that
    :func:`~sbr_jax.evaluation.tasks._extraction.find_program` reads. The test takes the
    prompt's helpers from the prompt itself, not from the program.
    """
    return Trial(
        program=find_program(item.prompt, item.entry_point, answer),
        entry_point=item.entry_point,
        setup=f"{item.prompt}\n    pass\n",
        check=f"{item.test}\ncheck({item.entry_point})\n",
    )


def humaneval(
    runner: Runner,
    items: Sequence[CodeItem],
    *,
    allow_code_execution: bool = False,
    max_new_tokens: int = 512,
    seconds: float = 10.0,
    isolation: str = "kernel",
) -> Result:
    """HumanEval: pass@1 of greedy completions, run in a sandbox.

    The code is the model's, so its execution must be allowed. A busy machine must not
    make an answer wrong, so a program has more seconds than the authors' 3.

    Returns:
      ``pass@1`` in percent, and the share of every ending but ``passed`` (``failed``,
      ``timeout``, ``memory``, …).
    """
    require_items("humaneval", items)
    if allow_code_execution is not True:
        raise UserError(
            "humaneval: this runs code written by a model; pass "
            "allow_code_execution=True if that is what you want"
        )
    prompts = [item.prompt for item in items]
    answers = runner.answers(prompts, max_new_tokens=max_new_tokens)
    outcomes = run_many(
        [humaneval_program(i, a) for i, a in zip(items, answers, strict=True)],
        allow_code_execution=True,
        seconds=seconds,
        isolation=isolation,
    )
    rows = [
        {"id": item.id, "passed": outcome.passed}
        for item, outcome in zip(items, outcomes, strict=True)
    ]
    metrics = {"pass@1": 100.0 * float(np.mean([o.passed for o in outcomes]))}
    endings = [o.ending.value for o in outcomes if not o.passed]
    metrics |= {e: 100.0 * endings.count(e) / len(outcomes) for e in sorted({*endings})}
    settings = {
        "max_new_tokens": max_new_tokens,
        "seconds": seconds,
        "isolation": isolation,
        **runner.describe(),
    }
    return Result(metrics, settings, rows)
