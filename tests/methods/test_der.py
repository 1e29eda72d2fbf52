"""DER and DER++ against a slow definition with whole logits."""

import jax
import numpy as np
import pytest
from continual_case import (
    BASE,
    FRESH,
    KEY,
    MOVED,
    PROBLEM,
    TASK,
    hook,
    logits_of,
    plain_gradient,
)
from trees import vector

from sbr_jax.methods.base import draw_rows
from sbr_jax.methods.der import der


def slow_replay(adapter, safe, reduction):
    """Distance of logits and cross-entropy, place by place, float64."""
    ours, stored = (
        np.asarray(logits_of(BASE, a, safe["tokens"]), np.float64)
        for a in (adapter, None)
    )
    gaps = getattr(((ours - stored) ** 2), reduction)(axis=-1)
    scores = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    found = []
    for row, mask in enumerate(safe["mask"]):
        places = np.flatnonzero(mask)
        nll = [-scores[row, t - 1, safe["tokens"][row, t]] for t in places]
        found.append((np.mean([gaps[row, t - 1] for t in places]), np.mean(nll)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(("reduction", "label_weight"), [("mean", 0.0), ("sum", 0.5)])
def test_the_gradient_is_that_of_the_slow_objective(reduction, label_weight):
    options = {"reduction": reduction, "label_weight": label_weight}
    method = der(logit_weight=0.3, buffer_batch_size=4, **options)
    state = method.init(PROBLEM, BASE, FRESH, KEY)
    grads, extra, parts = hook(method)(MOVED, state, TASK, KEY)
    drawn = draw_rows(PROBLEM, state["buffer"], TASK, jax.random.fold_in(KEY, 1), 4)
    safe = {name: np.asarray(drawn[name]) for name in ("tokens", "mask")}
    gap, nll = slow_replay(MOVED, safe, reduction)
    np.testing.assert_allclose(parts["logits"], gap, rtol=1e-4)
    np.testing.assert_allclose(parts["replay"], nll, rtol=1e-4)
    assert gap > 1e-3
    assert extra == {}
    task, plain = plain_gradient(MOVED, BASE, TASK)
    np.testing.assert_allclose(parts["loss"], task, rtol=1e-5)
    # Along what was added to the task's gradient, by central differences of the twin.
    added = jax.tree.map(lambda g, p: g - p, grads, plain)
    size = np.linalg.norm(vector(added))

    def objective(sign):
        there = jax.tree.map(lambda x, g: x + sign * 1e-2 / size * g, MOVED, added)
        gap, nll = slow_replay(there, safe, reduction)
        return 0.3 * gap + label_weight * nll

    slope = (objective(1) - objective(-1)) / 2e-2
    np.testing.assert_allclose(slope, size, rtol=2e-2)
