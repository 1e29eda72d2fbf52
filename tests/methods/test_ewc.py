"""EWC against slow twins, and what it must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continual_case import (
    BASE,
    FRESH,
    KEY,
    LEGAL,
    MEDICAL,
    MOVED,
    OTHER,
    PROBLEM,
    SAFE,
    STUDY,
    TASK,
    by_halves,
    ended,
    hook,
    plain_gradient,
)
from trees import vector

from sbr_jax.data.batches import take
from sbr_jax.methods.ewc import add_quadratics, diagonal_fisher, ewc, quadratic_penalty
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.typing import UserError

LOSS = answer_loss(PROBLEM.apply_fn, "mean")
example_gradient = jax.jit(jax.grad(LOSS))


def slow_fisher(adapter, data):
    total = 0.0
    for tokens, mask in zip(data.tokens, data.mask, strict=True):
        one = {"tokens": tokens, "mask": mask}
        total = total + vector(example_gradient(adapter, one, BASE)) ** 2
    return total / len(data)


@pytest.mark.parametrize("microbatch", [5, 64])
def test_fisher_is_the_mean_square_of_each_examples_gradient(microbatch):
    data = take(MEDICAL, range(12))
    found = diagonal_fisher(LOSS, MOVED, BASE, data, microbatch=microbatch)
    wanted = slow_fisher(MOVED, data)
    np.testing.assert_allclose(vector(found), wanted, rtol=1e-4, atol=1e-9)
    whole = {"tokens": data.tokens, "mask": data.mask}
    square_of_mean = vector(plain_gradient(MOVED, BASE, whole)[1]) ** 2
    assert square_of_mean.sum() < 0.8 * wanted.sum()


def test_fisher_takes_evenly_spaced_examples_and_refuses_bad_ones():
    found = diagonal_fisher(LOSS, MOVED, BASE, MEDICAL, max_examples=4, microbatch=4)
    spread = take(MEDICAL, [0, 21, 42, 63])
    np.testing.assert_allclose(
        vector(found), slow_fisher(MOVED, spread), rtol=1e-4, atol=1e-9
    )
    broken = jax.tree.map(lambda x: x * jnp.nan, MOVED)
    with pytest.raises(UserError, match="finite"):
        diagonal_fisher(LOSS, broken, BASE, spread, microbatch=4)
    with pytest.raises(UserError, match="at least one example"):
        diagonal_fisher(LOSS, MOVED, BASE, take(MEDICAL, []))


def test_sum_of_quadratics_is_the_sum_of_each():
    rng = np.random.default_rng(0)
    fishers = rng.exponential(size=(3, 40)) * (rng.random((3, 40)) > 0.4)
    fishers[:, 0] = 0  # A parameter that no domain cares for.
    centres, theta = rng.normal(size=(3, 40)), rng.normal(size=40)
    parts = [
        {
            "fisher": {"w": jnp.asarray(f, jnp.float32)},
            "centre": {"w": jnp.asarray(c, jnp.float32)},
            "offset": jnp.float32(0),
        }
        for f, c in zip(fishers, centres, strict=True)
    ]
    joined = add_quadratics(add_quadratics(parts[0], parts[1]), parts[2])
    value, pull = quadratic_penalty({"w": jnp.asarray(theta, jnp.float32)}, joined)
    gaps = theta - centres
    np.testing.assert_allclose(value, (fishers * gaps**2).sum(), rtol=1e-5)
    wanted = (2 * fishers * gaps).sum(0)
    np.testing.assert_allclose(pull["w"], wanted, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(joined) == jax.tree.structure(parts[0])


def test_ewc_adds_the_gradient_of_its_penalty_and_nothing_in_the_first_domain():
    method = ewc(penalty=30.0)
    gradient = hook(method)
    task = vector(plain_gradient(MOVED, BASE, TASK)[1])
    first, _, metrics = gradient(
        MOVED, method.init(PROBLEM, BASE, FRESH, KEY), TASK, KEY
    )
    assert float(metrics["penalty"]) == 0
    np.testing.assert_allclose(vector(first), task, rtol=1e-5, atol=1e-7)

    _, state = ended(method, MOVED, method.init(PROBLEM, BASE, FRESH, KEY))
    at_centre, _, metrics = gradient(MOVED, state, TASK, KEY)
    assert float(metrics["penalty"]) == 0
    np.testing.assert_array_equal(vector(at_centre), vector(first))

    grads, _, metrics = gradient(OTHER, state, TASK, KEY)
    gap, fisher = vector(OTHER) - vector(MOVED), slow_fisher(MOVED, MEDICAL)
    np.testing.assert_allclose(metrics["penalty"], 30 * fisher @ gap**2, rtol=1e-4)
    pull = vector(grads) - vector(plain_gradient(OTHER, BASE, TASK)[1])
    np.testing.assert_allclose(pull, 60 * fisher * gap, rtol=1e-3, atol=1e-5)
    assert np.abs(pull).max() > 1e-2

    halves, _, means = by_halves(method, OTHER, state)
    np.testing.assert_allclose(vector(halves), vector(grads), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(means["penalty"], metrics["penalty"], rtol=1e-6)

    # A repair is held as well.
    repair = hook(method, "replay_gradient")
    args = OTHER, state, TASK, SAFE, jnp.float32(1), KEY
    _, _, repaired = repair(*args)
    np.testing.assert_allclose(repaired["penalty"], metrics["penalty"], rtol=1e-6)


def test_ewc_measures_the_set_that_it_names_and_keeps_what_it_says():
    def fisher_of(data):
        return vector(diagonal_fisher(LOSS, MOVED, BASE, data, microbatch=8))

    of_domain, of_safety = fisher_of(MEDICAL), fisher_of(STUDY.calibration)
    assert np.abs(of_domain - of_safety).max() > 0.1 * of_domain.max()
    states = {}
    for data, keep in [("domain", None), ("domain", "all"), ("safety", None)]:
        method = ewc(data=data, keep=keep)
        state = method.init(PROBLEM, BASE, FRESH, KEY)
        adapter, once = ended(method, MOVED, state)
        assert adapter is MOVED
        assert jax.tree.structure(once) == jax.tree.structure(state)
        states[data, keep] = state, once, ended(method, OTHER, once, LEGAL)[1]

    start, once, twice = states["domain", None]
    assert not vector(start["fisher"]).any()
    np.testing.assert_allclose(vector(once["fisher"]), of_domain, rtol=1e-5)
    np.testing.assert_array_equal(vector(twice["centre"]), vector(OTHER))
    assert float(twice["offset"]) == 0

    _, _, both = states["domain", "all"]
    total = vector(once["fisher"]) + vector(twice["fisher"])
    np.testing.assert_allclose(vector(both["fisher"]), total, rtol=1e-5)
    assert float(both["offset"]) > 0

    start, once, _ = states["safety", None]
    np.testing.assert_array_equal(vector(start["centre"]), vector(FRESH))
    added = vector(once["fisher"]) - vector(start["fisher"])
    np.testing.assert_allclose(added, of_safety, rtol=1e-3, atol=1e-6)
    # B = 0 hides A from the first Fisher: documented, not wished for.
    assert not np.asarray(start["fisher"]["q_proj"].lora_a).any()
    assert np.asarray(start["fisher"]["q_proj"].lora_b).any()

    first = ewc(data="safety", keep="first")
    state = first.init(PROBLEM, BASE, FRESH, KEY)
    assert ended(first, MOVED, state)[1] is state
    with pytest.raises(UserError, match="the domain just learned"):
        ewc().end_domain(PROBLEM, BASE, MOVED, {}, KEY)
