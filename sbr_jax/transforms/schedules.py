"""Learning-rate schedule: linear warm-up, then a cosine.

Symbols: w warm-up steps.
"""

import optax


def learning_rate_schedule(
    peak: float,
    steps: int,
    *,
    warmup_fraction: float = 0.03,
    final_fraction: float = 0.005,
) -> optax.Schedule:
    """Linear warm-up, then a cosine from ``peak`` to ``final_fraction · peak``.

    The warm-up takes w = round(``warmup_fraction`` · ``steps``) steps and starts at
    ``peak / (w + 1)``, so no step is wasted at 0. The last step is ``steps − 1``.

    >>> lr = learning_rate_schedule(1.0, 100, warmup_fraction=0.1)
    >>> float(lr(10)), round(float(lr(100)), 4)
    (1.0, 0.005)
    """
    warmup = round(warmup_fraction * steps)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=final_fraction * peak,
    )
