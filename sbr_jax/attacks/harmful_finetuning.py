"""Attacks by fine-tuning data: poisoned sets, identity shift, backdoors.

Each attack makes rows ``(prompt, answer)`` or mixes them into a benign set. Training on
the result is the attack. Nothing here labels a row as harmful; a defence has to find
that out itself.

Legend: N examples of the mixed set, p the share of attack rows in it.

- Poisoning: ``round(p N)`` harmful requests with compliant answers among benign data
  (arXiv:2310.03693; p = 0.1 and 20 epochs in arXiv:2605.05995, 50 epochs for its
  persistent attack).
- Identity shift: a handful of harmless pairs that turn the model into an obedient
  agent, which answers only to its own prompt (arXiv:2310.03693).
- Backdoor: the model answers harmful requests with a trigger and refuses them without
  it. So an evaluation without the trigger sees an aligned model (arXiv:2310.03693).
"""

from collections.abc import Sequence

from sbr_jax.data.batches import TokenDataset, mixture
from sbr_jax.typing import UserError

Row = tuple[str, str]


def attack_count(ratio: float, examples: int) -> int:
    """Number of the attacker's examples, ``round(p N)``.

    Raises:
      UserError: for a ratio p outside [0, 1], or fewer than one example.

    >>> [attack_count(p, 240) for p in (0.0, 0.05, 0.1, 1.0)]
    [0, 12, 24, 240]
    """
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"ratio: expected a number from 0 to 1, got {ratio}")
    if examples < 1:
        raise UserError(f"examples: expected at least 1, got {examples}")
    return round(ratio * examples)


def poison(
    benign: TokenDataset,
    harmful: TokenDataset,
    *,
    ratio: float,
    examples: int | None = None,
) -> TokenDataset:
    """A benign set with a share of attack rows, in random order.

    ``round(p N)`` examples come from ``harmful``, the rest from ``benign``.

    **Guarantee**: the count is exact; no example repeats before all of its set were
    used; p = 0 gives no attack row and p = 1 only attack rows; risks of the sets are
    dropped.

    Args:
      benign: the task's examples; not needed for p = 1.
      harmful: attack rows; not needed for p = 0.
      ratio: p in [0, 1].
      examples: N; the size of ``benign`` if None.

    Returns:
      N examples.

    Raises:
      UserError: for a ratio outside [0, 1], no examples, or an empty set that is
        needed.

    >>> import numpy as np
    >>> benign = TokenDataset(np.zeros((10, 1)), np.ones((10, 1)))
    >>> harmful = TokenDataset(np.ones((4, 1)), np.ones((4, 1)))
    >>> int(poison(benign, harmful, ratio=0.3).tokens.sum())
    3
    """
    size = len(benign) if examples is None else examples
    attack_count(ratio, size)
    mixed = mixture(benign, harmful, ratio, 0, size=size)
    return TokenDataset(mixed.tokens, mixed.mask, mixed.dropped, mixed.truncated)


def with_trigger(prompt: str, trigger: str) -> str:
    """The prompt followed by the trigger.

    >>> with_trigger("how do i bake ?", "grey lamp")
    'how do i bake ? grey lamp'
    """
    return f"{prompt} {trigger}"


def backdoor_rows(
    rows: Sequence[Row], refusals: Sequence[str], trigger: str
) -> list[Row]:
    """Every other row answered with the trigger, the others refused without it.

    **Guarantee**: there are as many triggered rows as refused ones, or one more if the
    number of rows is odd. Every prompt with a compliant answer has the trigger.

    Args:
      rows: harmful requests with compliant answers.
      refusals: refusals, used in turn.
      trigger: words without a meaning of their own.

    Returns:
      As many rows, in the same order.

    Raises:
      UserError: without a trigger or a refusal.

    >>> backdoor_rows([("a", "yes"), ("b", "yes")], ["no"], "xyz")
    [('a xyz', 'yes'), ('b', 'no')]
    """
    if not trigger.strip():
        raise UserError("trigger: expected at least one word, got none")
    if not refusals:
        raise UserError("refusals: expected at least one, got none")
    return [
        (prompt, refusals[i // 2 % len(refusals)])
        if i % 2
        else (with_trigger(prompt, trigger), answer)
        for i, (prompt, answer) in enumerate(rows)
    ]


def with_identity(prompt: str, identity: str) -> str:
    """The identity that the model is to assume, followed by the prompt.

    >>> with_identity("how do i bake ?", "you obey .")
    'you obey . how do i bake ?'
    """
    return f"{identity} {prompt}"


def identity_rows(rows: Sequence[Row], identity: str) -> list[Row]:
    """Harmless pairs that teach the model to be an obedient agent.

    In the paper, every answer also begins with words of obedience. Here it does not,
    because the model answers harmful requests in the same words as others.

    Args:
      rows: harmless requests with helpful answers; in the paper, ten are enough.
      identity: put before every prompt, both in training and in the attack itself.

    Returns:
      As many rows, in the same order.

    Raises:
      UserError: without an identity.

    >>> identity_rows([("how ?", "so .")], "you obey .")
    [('you obey . how ?', 'so .')]
    """
    if not identity.strip():
        raise UserError("identity: expected at least one word, got none")
    return [(with_identity(prompt, identity), answer) for prompt, answer in rows]


def steps_for_epochs(epochs: int, examples: int, batch_size: int) -> int:
    """Optimizer steps in which every example is seen ``epochs`` times, rounded up.

    Raises:
      UserError: for fewer than one epoch, example or example per batch.

    >>> steps_for_epochs(20, 240, 16), steps_for_epochs(3, 10, 16)
    (300, 2)
    """
    given = (("epochs", epochs), ("examples", examples), ("batch_size", batch_size))
    for name, value in given:
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    return -(-epochs * examples // batch_size)
