"""EWC, O-LoRA and SafeGrad against slow twins, and what each must not do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sbr_jax import models
from sbr_jax.data.batches import batch, take
from sbr_jax.methods.base import Problem, draw_rows, task_loss
from sbr_jax.methods.ewc import add_quadratics, diagonal_fisher, ewc, quadratic_penalty
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.methods.o_lora import concatenated, o_lora, overlap, sum_of_norms
from sbr_jax.methods.plain import plain
from sbr_jax.methods.safegrad import alignment_loss, resolve_conflict, safegrad
from sbr_jax.models import LoraPair
from sbr_jax.training.step import TrainState, compiled_step, make_step
from sbr_jax.typing import UserError

STUDY = tiny.study()
BASE = STUDY.model.params
MEDICAL, LEGAL = (domain.train for domain in STUDY.domains.values())
KEY = jax.random.key(0)
PROBLEM = Problem(
    apply_fn=STUDY.model.apply_fn,
    steps=6,
    batch_size=8,
    calibration=STUDY.calibration,
    fisher_microbatch=8,
    weight_decay=0.0,
)
FRESH = jax.device_get(
    models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0, targets="(q|v)_proj")
)
TASK = {**batch(MEDICAL, 8, 0, 0), "row": np.arange(8, dtype=np.int32)}
SAFE, FIXED = (batch(data, 8, 0, 0) for data in (STUDY.calibration, LEGAL))

PLAIN = plain()

logits_of = jax.jit(STUDY.model.apply_fn)
plain_gradient = jax.jit(
    jax.value_and_grad(lambda a, b, x: task_loss(PROBLEM, b, a, x, KEY))
)


def jitter(adapter, seed, size=0.1):
    """The adapter with noise on every factor, so that B is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + rng.normal(0, size, x.shape).astype(np.float32), adapter
    )


MOVED, OTHER = jitter(FRESH, 1), jitter(FRESH, 2)


def vector(tree):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


@functools.cache
def step_of(method):
    """The compiled step of a method, as the trainer makes it."""
    optimizer = method.optimizer(PROBLEM, FRESH, 0.02)
    return optimizer, compiled_step(make_step(PROBLEM, method.gradient, optimizer))


def run(method, state, adapter, data, steps, base=BASE):
    """Some steps of a method on one data set; also the metrics of each."""
    optimizer, step = step_of(method)
    adapter = jax.tree.map(jnp.array, adapter)
    train, history = TrainState(adapter, optimizer.init(adapter), jnp.int32(0)), []
    for index in range(steps):
        drawn = batch(data, 8, 0, index)
        train, metrics = step(base, train, state, drawn, jax.random.key(7))
        history.append(jax.device_get(metrics))
    return jax.device_get(train.adapter), history


@functools.cache
def hook(method, name="gradient", accumulation=1):
    problem = dataclasses.replace(PROBLEM, accumulation=accumulation)
    function = getattr(method, name)
    return jax.jit(lambda a, state, *rest: function(problem, BASE, a, state, *rest))


def by_halves(method, adapter, state):
    """Gradient and metrics as the mean over two microbatches."""
    halves = [{k: v[rows] for k, v in TASK.items()} for rows in (slice(4), slice(4, 8))]
    gradient = hook(method, accumulation=2)
    found = [gradient(adapter, state, half, KEY) for half in halves]
    return jax.tree.map(lambda x, y: (np.asarray(x) + np.asarray(y)) / 2, *found)


def ended(method, adapter, state, data=MEDICAL, key=KEY):
    problem = dataclasses.replace(PROBLEM, domain=data)
    return method.end_domain(problem, BASE, adapter, state, key)


# --- EWC ------------------------------------------------------------------------------

LOSS = answer_loss(PROBLEM.apply_fn, "mean")
example_gradient = jax.jit(jax.grad(LOSS))


def slow_fisher(adapter, data):
    total = 0.0
    for tokens, mask in zip(data.tokens, data.mask, strict=True):
        one = {"tokens": tokens, "mask": mask}
        total = total + vector(example_gradient(adapter, one, BASE)) ** 2
    return total / len(data)


@pytest.mark.parametrize("microbatch", [4, 5, 64])
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


def test_ewc_keeps_important_parameters_near():
    method = ewc(penalty=300.0)
    free = method.init(PROBLEM, BASE, MOVED, KEY)  # F = 0: no penalty.
    _, held = ended(method, MOVED, free)
    moves = []
    for state in (free, held):
        adapter, history = run(method, state, MOVED, LEGAL, 8)
        moves.append(vector(held["fisher"]) @ (vector(adapter) - vector(MOVED)) ** 2)
    assert history[-1]["penalty"] > 0
    assert moves[1] < 0.5 * moves[0]


# --- O-LoRA ---------------------------------------------------------------------------


def slow_overlap(old, new):
    total = 0.0
    for name, pair in new.items():
        for layer, mine in enumerate(np.asarray(pair.lora_a, np.float64)):
            before = np.asarray(old[name].lora_a[layer], np.float64)
            total += np.abs(before.T @ mine).sum()
    return total


def slow_norms(adapter):
    factors = [x for leaf in jax.tree.leaves(adapter) for x in np.asarray(leaf)]
    return sum(np.linalg.norm(x.ravel()) for x in factors)


def test_concatenated_adapter_is_the_sum_of_its_parts():
    both = models.merge_adapter(models.merge_adapter(BASE, MOVED), OTHER)
    found = logits_of(BASE, concatenated(MOVED, OTHER), SAFE["tokens"])
    wanted = logits_of(both, None, SAFE["tokens"])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = logits_of(BASE, MOVED, SAFE["tokens"])
    assert np.abs(np.asarray(alone) - np.asarray(wanted)).max() > 1e-2


def test_penalties_equal_their_loops_and_vanish_where_they_should():
    np.testing.assert_allclose(
        overlap(MOVED, OTHER), slow_overlap(MOVED, OTHER), rtol=1e-5
    )
    np.testing.assert_allclose(sum_of_norms(MOVED), slow_norms(MOVED), rtol=1e-5)
    eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    some_b = jnp.ones((2, 2, 3))
    left = {"q_proj": LoraPair(some_b, eye[..., :2], 1.0)}
    right = {"q_proj": LoraPair(some_b, eye[..., 2:], 1.0)}
    assert float(overlap(left, right)) == 0
    assert float(overlap(left, left)) == 4
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(sum_of_norms)(FRESH))
    )


def test_o_lora_gradient_is_the_tasks_plus_both_penalties():
    method = o_lora(orthogonality=0.7, l2=0.3, max_domains=2)
    gradient = hook(method)
    empty = method.init(PROBLEM, BASE, FRESH, KEY)
    grads, _, metrics = gradient(FRESH, empty, TASK, KEY)
    assert float(metrics["overlap"]) == 0
    assert np.isfinite(vector(grads)).all()

    _, state = ended(method, MOVED, empty)
    grads, _, metrics = gradient(OTHER, state, TASK, KEY)
    merged = models.merge_adapter(BASE, MOVED)
    loss, wanted = plain_gradient(OTHER, merged, TASK)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["overlap"], slow_overlap(MOVED, OTHER), rtol=1e-5
    )
    for name, pair in OTHER.items():
        a, b = np.asarray(pair.lora_a), np.asarray(pair.lora_b)
        old = np.asarray(MOVED[name].lora_a)
        signs = np.sign(np.einsum("lik,lij->lkj", old, a))
        shrink_a, shrink_b = (
            0.3 * x / np.sqrt((x**2).sum((1, 2), keepdims=True)) for x in (a, b)
        )
        pull = 0.7 * np.einsum("lik,lkj->lij", old, signs) + shrink_a
        np.testing.assert_allclose(
            grads[name].lora_a, wanted[name].lora_a + pull, atol=1e-4
        )
        np.testing.assert_allclose(
            grads[name].lora_b, wanted[name].lora_b + shrink_b, atol=1e-4
        )

    halves, _, means = by_halves(method, OTHER, state)
    np.testing.assert_allclose(vector(halves), vector(grads), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(means["overlap"], metrics["overlap"], rtol=1e-6)

    # A repair trains the same model: the whole one.
    repair = hook(method, "replay_gradient")
    _, _, repaired = repair(OTHER, state, TASK, SAFE, jnp.float32(1), KEY)
    whole = method.deploy(PROBLEM, BASE, OTHER, state)[1]
    np.testing.assert_allclose(
        repaired["safety_loss"], plain_gradient(whole, BASE, SAFE)[0], rtol=1e-4
    )
    np.testing.assert_allclose(repaired["loss"], loss, rtol=1e-4)


def test_ending_a_domain_moves_the_pair_and_leaves_the_function():
    method = o_lora(max_domains=2)
    state, key = method.init(PROBLEM, BASE, FRESH, KEY), KEY
    adapter, starts, shapes = MOVED, [], jax.tree.map(jnp.shape, state)
    for pair in (MOVED, OTHER):
        adapter = pair
        before = logits_of(
            *method.deploy(PROBLEM, BASE, adapter, state), SAFE["tokens"]
        )
        adapter, state = ended(method, adapter, state, key=key)
        after = logits_of(*method.deploy(PROBLEM, BASE, adapter, state), SAFE["tokens"])
        np.testing.assert_allclose(before, after, atol=1e-5)
        assert not any(np.asarray(p.lora_b).any() for p in adapter.values())
        assert jax.tree.map(jnp.shape, state) == shapes
        starts.append(vector(adapter))
    # One key for all domains still gives other A.
    assert np.abs(starts[0] - starts[1]).max() > 0.1
    bound = tiny.CONFIG.width**-0.5
    assert 0.8 * bound < np.abs(starts[0]).max() <= bound
    both = concatenated(MOVED, OTHER)
    np.testing.assert_array_equal(vector(state["frozen"]), vector(both))
    assert np.abs(after - logits_of(BASE, None, SAFE["tokens"])).max() > 0.1
    with pytest.raises(UserError, match=r"max_domains: expected at least 3.* got 2"):
        ended(method, MOVED, state)


def test_o_lora_lowers_the_overlap_with_one_program_and_frozen_pairs():
    method = o_lora(max_domains=2)
    state = method.init(PROBLEM, BASE, FRESH, KEY)
    learned, history = run(method, state, FRESH, MEDICAL, 8)
    assert all(metrics["overlap"] == 0 for metrics in history)
    start, state = ended(method, learned, state)
    before = vector(state["frozen"])
    end, history = run(method, state, start, LEGAL, 8)
    assert step_of(method)[1]._cache_size() == 1
    np.testing.assert_array_equal(vector(state["frozen"]), before)
    assert before.any()
    # Without λ₁ it is plain training of the new pair on the merged weights.
    merged = models.merge_adapter(BASE, learned)
    free, _ = run(PLAIN, {}, start, LEGAL, 8, base=merged)
    np.testing.assert_allclose(
        slow_overlap(learned, start), history[0]["overlap"], 1e-4
    )
    assert slow_overlap(learned, end) < 0.7 * slow_overlap(learned, free)
    # The penalty does not keep it from learning the domain.
    losses = [
        float(plain_gradient(concatenated(state["frozen"], x), BASE, FIXED)[0])
        for x in (start, end)
    ]
    assert losses[1] < losses[0]


# --- SafeGrad -------------------------------------------------------------------------


def slow_resolve(u, a):
    product = u @ a
    return u - product / (a @ a) * a if product < 0 else u


def test_conflict_is_removed_over_all_parameters_as_one_vector():
    rng, conflicts = np.random.default_rng(0), 0
    resolve = jax.jit(resolve_conflict)
    for scale in (1.0, 1e-4, 1e3) * 7:
        u = {"x": rng.normal(size=(2, 3)), "y": rng.normal(size=4)}
        a = {"x": scale * rng.normal(size=(2, 3)), "y": scale * rng.normal(size=4)}
        u, a = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (u, a))
        kept, found = resolve(u, a)
        before, after, other = vector(u), vector(kept), vector(a)
        size = np.linalg.norm(before) * np.linalg.norm(other)
        np.testing.assert_allclose(after, slow_resolve(before, other), atol=1e-5)
        np.testing.assert_allclose(found["cosine"], before @ other / size, atol=1e-5)
        assert after @ other >= -1e-6 * size  # §6, up to float32 rounding.
        assert float(found["conflict"]) == (before @ other < 0)
        if before @ other >= 0:
            np.testing.assert_array_equal(before, after)
        conflicts += int(before @ other < 0)
    assert 3 < conflicts < 18
    # Aligned in one leaf, opposed in all: the whole vector decides.
    u, a = {"x": jnp.ones(1), "y": -3 * jnp.ones(1)}, {"x": jnp.ones(1)}
    kept, _ = resolve(u, {**a, "y": jnp.ones(1)})
    np.testing.assert_allclose(vector(kept), [2, -2], atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8])
def test_no_direction_removes_nothing(size):
    u = {"x": jnp.array([1.0, -2.0])}
    kept, found = jax.jit(resolve_conflict)(u, {"x": jnp.array([-size, 0.0])})
    np.testing.assert_array_equal(vector(kept), vector(u))
    assert float(found["conflict"]) == float(found["cosine"]) == 0
    kept, found = resolve_conflict({"x": jnp.zeros(2)}, u)
    assert not vector(kept).any()
    assert float(found["cosine"]) == 0


def slow_divergence(adapter, tokens, mask, temperature):
    def log_p(adapter):
        z = np.asarray(logits_of(BASE, adapter, tokens), np.float64) / temperature
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    reference, model = log_p(None), log_p(adapter)
    gaps = (np.exp(reference) * (reference - model)).sum(-1)
    return np.mean([g[:-1] @ m[1:] / m[1:].sum() for g, m in zip(gaps, mask)])  # noqa: B905


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_alignment_loss_is_the_divergence_from_the_model_without_adapter(temperature):
    value = jax.jit(
        jax.value_and_grad(
            lambda a: alignment_loss(PROBLEM, BASE, a, SAFE, temperature)
        )
    )
    loss, grads = value(MOVED)
    twin = slow_divergence(MOVED, **SAFE, temperature=temperature)
    np.testing.assert_allclose(loss, twin, rtol=1e-4)
    assert twin > 1e-2
    # Along the gradient itself, by central differences of the twin.
    way = 1e-2 / np.linalg.norm(vector(grads))
    ahead, behind = (
        slow_divergence(
            jax.tree.map(lambda x, g, s=s: x + s * way * g, MOVED, grads),
            **SAFE,
            temperature=temperature,
        )
        for s in (1, -1)
    )
    slope = (ahead - behind) / 2e-2
    np.testing.assert_allclose(slope, np.linalg.norm(vector(grads)), rtol=1e-2)
    # At θ₀ the divergence is at its minimum.
    loss, grads = value(FRESH)
    assert abs(float(loss)) < 1e-6
    assert np.linalg.norm(vector(grads)) < 1e-5


def test_safegrad_gradient_is_the_resolved_one_plus_the_weighted_alignment():
    method = safegrad(weight=0.5, temperature=2.0, anchor_batch_size=4)
    gradient = hook(method)
    state = method.init(PROBLEM, BASE, FRESH, KEY)
    alignment_gradient = jax.jit(
        jax.grad(lambda a, safe: alignment_loss(PROBLEM, BASE, a, safe, 2.0))
    )
    learned, _ = run(PLAIN, {}, FRESH, MEDICAL, 8)
    seen = set()
    for adapter in (learned, MOVED):
        for index in range(3):
            key = jax.random.key(index)
            grads, extra, metrics = gradient(adapter, state, TASK, key)
            safe = draw_rows(
                PROBLEM, state["safe"], TASK, jax.random.fold_in(key, 1), 4
            )
            assert safe["tokens"].shape[0] == 4
            a = vector(alignment_gradient(adapter, safe))
            u = vector(plain_gradient(adapter, BASE, TASK)[1])
            wanted = slow_resolve(u, a) + 0.5 * a
            np.testing.assert_allclose(vector(grads), wanted, rtol=1e-3, atol=1e-5)
            assert extra == {}
            assert float(metrics["conflict"]) == (u @ a < 0)
            seen.add(float(metrics["conflict"]))
    assert 1.0 in seen
    # Microbatches share the step's safety examples; each is tested for itself.
    metrics = gradient(MOVED, state, TASK, KEY)[2]
    means = by_halves(method, MOVED, state)[2]
    np.testing.assert_allclose(means["alignment"], metrics["alignment"], rtol=1e-4)
    assert means["conflict"] in (0, 0.5, 1)
    grads, _, metrics = gradient(FRESH, state, TASK, KEY)
    assert float(metrics["conflict"]) == 0
    np.testing.assert_allclose(
        vector(grads), vector(plain_gradient(FRESH, BASE, TASK)[1]), atol=1e-5
    )


def test_safegrad_stays_nearer_to_the_aligned_model_than_plain():
    ends = {}
    for method in (PLAIN, safegrad()):
        state = method.init(PROBLEM, BASE, FRESH, KEY)
        adapter, history = run(method, state, FRESH, MEDICAL, 8)
        ends[method.name] = slow_divergence(adapter, **SAFE, temperature=1.0)
    assert ends["safegrad"] < 0.8 * ends["plain"]
    assert history[0]["conflict"] == 0
    assert max(metrics["conflict"] for metrics in history) == 1


# --- all ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "options", "named"),
    [
        (ewc, {"penalty": -1.0}, "penalty"),
        (ewc, {"data": "benign"}, "data"),
        (ewc, {"keep": "first"}, "keep: expected one of last, all;"),
        (ewc, {"reduction": "max"}, "reduction"),
        (ewc, {"fisher_examples": 0}, "fisher_examples"),
        (o_lora, {"orthogonality": float("nan")}, "orthogonality"),
        (o_lora, {"l2": -0.1}, "l2"),
        (o_lora, {"max_domains": 0}, "max_domains"),
        (safegrad, {"weight": -1.0}, "weight"),
        (safegrad, {"temperature": 0.0}, "temperature"),
        (safegrad, {"anchor_batch_size": 0}, "anchor_batch_size"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(maker, options, named):
    with pytest.raises(UserError, match=named):
        maker(**options)


def test_examples_in_the_modules_are_few_and_run():
    import doctest
    import importlib

    for name in ("ewc", "o_lora", "safegrad"):
        module = importlib.import_module(f"sbr_jax.methods.{name}")
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0
