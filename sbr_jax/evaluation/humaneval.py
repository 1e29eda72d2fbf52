"""HumanEval (arXiv:2107.03374): completions of functions, run in a sandbox."""

from collections.abc import Sequence

import jax
import numpy as np

from sbr_jax.evaluation.code import pass_at_k
from sbr_jax.evaluation.extraction import find_program
from sbr_jax.evaluation.items import CodeLike, Result, some
from sbr_jax.evaluation.runner import Runner
from sbr_jax.evaluation.sandbox import Trial, run_many
from sbr_jax.typing import UserError


def humaneval_program(item: CodeLike, answer: str) -> Trial:
    """The program that an answer makes, and the test of its function.

    Args:
      item: the task.
      answer: the model's text, in any of the forms of
        :func:`~sbr_jax.evaluation.extraction.find_program`.

    Returns:
      What fails unless the answer is right. The test has the prompt's helpers from
      the prompt itself, not from the program.
    """
    body = find_program(item.prompt, item.entry_point, answer)
    return Trial(
        program=body,
        entry_point=item.entry_point,
        setup=f"{item.prompt}\n    pass\n",
        check=f"{item.test}\ncheck({item.entry_point})\n",
    )


def humaneval(
    runner: Runner,
    items: Sequence[CodeLike],
    *,
    allow_code_execution: bool = False,
    samples: int = 1,
    k: Sequence[int] = (1,),
    temperature: float = 0.0,
    key: jax.Array | None = None,
    max_new_tokens: int = 512,
    seconds: float = 10.0,
    isolation: str = "kernel",
) -> Result:
    """HumanEval: pass@k of completions, run in a sandbox.

    Args:
      runner: who is examined.
      items: functions to complete.
      allow_code_execution: must be True, as the model's code is run.
      samples: completions per task.
      k: values of k, none above ``samples``.
      temperature: 0 is greedy (then one sample says it all).
      key: a PRNG key, to sample.
      max_new_tokens: limit of a completion.
      seconds: time limit of a program; a wrong answer must not come from a busy
        machine, so it is longer than the authors' 3 s.
      isolation: of the sandbox, see :mod:`sbr_jax.evaluation.sandbox`.

    Returns:
      ``pass@K`` for each K in percent; and the share of every ending but ``passed``
      (``failed``, ``timeout``, ``memory``, …).

    Raises:
      UserError: not allowed, no items, a k above ``samples``, or several samples
        without temperature and key.
    """
    some("humaneval", items)
    if allow_code_execution is not True:
        raise UserError(
            "humaneval: this runs code written by a model; pass "
            "allow_code_execution=True if that is what you want"
        )
    if not k or not 1 <= min(k) <= max(k) <= samples:
        raise UserError(f"humaneval: expected 1 <= k <= {samples} samples, got {k}")
    if samples > 1 and (temperature <= 0 or key is None):
        raise UserError(
            f"humaneval: {samples} greedy samples are one; pass temperature and key"
        )
    asked = [item for item in items for _ in range(samples)]
    answers = runner.answers(
        [item.prompt for item in asked],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
    )
    outcomes = run_many(
        [humaneval_program(i, a) for i, a in zip(asked, answers, strict=True)],
        allow_code_execution=True,
        seconds=seconds,
        isolation=isolation,
    )
    passed = np.array([o.passed for o in outcomes]).reshape(len(items), samples)
    rows = [
        {"id": item.id, "passed": int(n), "samples": samples}
        for item, n in zip(items, passed.sum(1), strict=True)
    ]
    metrics = {
        f"pass@{n}": 100.0
        * float(np.mean([pass_at_k(samples, row["passed"], n) for row in rows]))
        for n in k
    }
    endings = [o.ending.value for o in outcomes if not o.passed]
    metrics |= {e: 100.0 * endings.count(e) / len(outcomes) for e in sorted({*endings})}
    settings = {
        "samples": samples,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seconds": seconds,
        "isolation": isolation,
        **runner.describe(),
    }
    return Result(metrics, settings, rows)
