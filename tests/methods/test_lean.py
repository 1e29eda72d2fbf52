"""Lean: rows that are held, against slow twins; what it costs and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import (
    BASE,
    FRESH,
    KEY,
    MOVED,
    PROBLEM,
    TRAIN,
    forward,
    plain_gradient,
    slow_parts,
)
from trees import vector

from sbr_jax import _rows
from sbr_jax.data.batches import TokenDataset, batch
from sbr_jax.data.layout import arrange, choose
from sbr_jax.methods.lean import lean, tied_mixture
from sbr_jax.models import answers
from sbr_jax.typing import UserError

WIDTHS = (1, 8, 32, 50)


def slow_top_divergence(p, q, k):
    """Both distributions with all but p's top k tokens in one bucket, float64."""
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (p, q))
    p, q = p / p.sum(), q / q.sum()
    kept = np.argsort(-p, kind="stable")[:k]
    others = np.setdiff1d(np.arange(len(p)), kept)
    p, q = (np.append(x[kept], x[others].sum()) for x in (p, q))
    told = p > 0
    return float(np.sum(p[told] * np.log(p[told] / q[told])))


def rows_of_logits(seed, ruled_out):
    """Peaked, flat and equal rows; some tokens impossible for the reference."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 1, (12, 1))
    p = scale * rng.normal(size=(12, 32))
    q = p + rng.choice([0.0, 0.1, 5.0], (12, 1)) * rng.normal(size=p.shape)
    if ruled_out:
        p[:, rng.permutation(32)[:3]] = -np.inf
    return jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)


@functools.cache
def compiled(k):
    def values(p, q):
        return _rows.top_divergence(_rows.top(p, k), q)

    return jax.jit(values), jax.jit(jax.grad(lambda p, q: values(p, q).sum(), 1))


@pytest.mark.parametrize("ruled_out", [False, True])
def test_a_bucketed_divergence_is_its_twin_below_the_whole_one(ruled_out):
    p, q = rows_of_logits(0, ruled_out)
    whole = np.asarray(_rows.divergence(p, q))
    before = np.zeros(len(p))
    for k in WIDTHS:
        values, slopes = compiled(k)
        found = np.asarray(values(p, q))
        twins = [slow_top_divergence(a, b, k) for a, b in zip(p, q, strict=True)]
        np.testing.assert_allclose(found, twins, rtol=1e-4, atol=2e-6)
        # Data processing: a coarser look tells two distributions apart no better.
        assert np.all(found <= whole + 2e-6)
        assert np.all(found >= before - 2e-6)
        before = found
        same = jnp.where(jnp.isneginf(p), -jnp.inf, p)
        assert np.abs(np.asarray(values(p, same))).max() < 1e-6
        assert np.isfinite(np.asarray(slopes(p, q))).all()
        if not ruled_out:
            assert np.abs(np.asarray(slopes(p, p))).max() < 1e-6
    np.testing.assert_allclose(before, whole, rtol=1e-4, atol=2e-6)


# --- the method -----------------------------------------------------------------------


def drawn(method, step=0, **changes):
    problem = tiny.changed(PROBLEM, **changes)
    found = batch(method.mix(problem, TRAIN, 0), 8, 0, step)
    return {**found, "row": np.arange(8, dtype=np.int32)}


@functools.cache
def started(**options):
    method = lean(**options)
    state = method.init(PROBLEM, BASE, FRESH, KEY)
    hook = jax.jit(lambda a, b: method.gradient(PROBLEM, BASE, a, state, b, KEY))
    return method, state, hook


def slow_held(adapter, rows, k):
    """Mean over an answer of the slow divergence, for each row of the batch."""
    ours, theirs = (forward(BASE, a, rows["tokens"]) for a in (adapter, None))
    found = []
    for row, mask in enumerate(rows["mask"]):
        places = np.flatnonzero(mask)
        pairs = [(theirs[row, t - 1], ours[row, t - 1]) for t in places if t > 0]
        found.append(np.mean([slow_top_divergence(*pair, k) for pair in pairs]))
    return np.array(found)


@pytest.mark.parametrize("k", [4, 32])
def test_the_objective_is_the_tasks_mean_and_the_held_rows_mean(k):
    method, _, hook = started(safe_rows=3, kl_weight=0.5, top_tokens=k)
    rows = drawn(method)
    held = rows["tied"] >= 0
    assert held.sum() == 3
    calibration = PROBLEM.calibration
    np.testing.assert_array_equal(
        rows["tokens"][held], calibration.tokens[rows["tied"][held]]
    )
    nll, kl = slow_parts(MOVED, rows)
    twin = slow_held(MOVED, rows, k)
    if k == 32:
        np.testing.assert_allclose(twin, kl, rtol=1e-5)
    grads, extra, parts = hook(MOVED, rows)
    assert extra == {}
    np.testing.assert_allclose(parts["loss"], nll[~held].mean(), rtol=1e-4)
    np.testing.assert_allclose(parts["anchor"], twin[held].mean(), rtol=1e-4)
    assert twin[held].mean() > 1e-2

    # Along the gradient itself, by central differences of the twins.
    def objective(a):
        learnt = slow_parts(a, rows)[0][~held].mean()
        return learnt + 0.5 * slow_held(a, rows, k)[held].mean()

    size = np.linalg.norm(vector(grads))
    ahead, behind = (
        objective(jax.tree.map(lambda x, g, s=s: x + s * 1e-2 / size * g, MOVED, grads))
        for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, size, rtol=1e-2)
    # At θ₀ nothing is held with any force: what is left is the others' gradient.
    grads, _, parts = hook(FRESH, rows)
    assert abs(float(parts["anchor"])) < 1e-6
    alone = {**rows, "weight": np.where(held, 0.0, 8 / 5).astype(np.float32)}
    plain = plain_gradient(BASE, FRESH, {}, alone, KEY)[0]
    np.testing.assert_allclose(vector(grads), vector(plain), atol=1e-5)


def test_the_control_holds_benign_rows_and_no_safe_one():
    rows = tiny.dataset(11, 24, shift=4)
    problem = tiny.changed(PROBLEM)
    problem = dataclasses.replace(problem, calibration_controls={"benign": rows})
    method = lean(safe_rows=3, held="benign")
    mixed = method.mix(problem, TRAIN, 0)
    drawn = batch(mixed, 8, 0, 0)
    held = drawn["tied"] >= 0
    np.testing.assert_array_equal(
        drawn["tokens"][held], rows.tokens[drawn["tied"][held]]
    )
    state = method.init(problem, BASE, FRESH, KEY)
    assert method.begin_domain(problem, BASE, state, mixed, KEY) == (mixed, {})
    _, _, parts = method.gradient(problem, BASE, MOVED, state, drawn, KEY)
    twin = slow_held(MOVED, drawn, 32)[held].mean()
    np.testing.assert_allclose(parts["anchor"], twin, rtol=1e-4)
    with pytest.raises(UserError, match=r"held='benign': expected .*\['benign'\]"):
        method.mix(dataclasses.replace(problem, calibration_controls={}), TRAIN, 0)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_each_answer_token_meets_its_own_reference_in_packed_rows(rows):
    """Several rows list their examples' places row by row, not example by example."""
    rng, size = np.random.default_rng(0), 8
    kept = np.arange(20) < rng.permutation(np.arange(5, 5 + 2 * size, 2))[:, None]
    tokens, mask = np.where(kept, 7, 0), kept & (np.arange(20) > 2)
    drawn = batch(TokenDataset(tokens, mask), size, 0, 0)
    layout = choose(TokenDataset(tokens, mask), size, packing="yes", rows=rows)
    (laid,) = arrange([drawn], layout)
    ranks = np.asarray(jax.jit(lambda b: answers.find(b).ranks())(laid))
    told = laid["shares"] > 0
    for example in range(size):
        own = ranks[told & (laid["owners"] == example)]
        assert own.tolist() == list(range(int(drawn["mask"][example].sum())))
    assert (ranks >= 0).all()


def test_weights_of_the_task_leave_the_held_rows_alone():
    method, _, hook = started(safe_rows=3)
    rows = drawn(method)
    weighted = {**rows, "weight": np.full(8, 0.25, np.float32)}
    before, after = hook(MOVED, rows)[2], hook(MOVED, weighted)[2]
    np.testing.assert_allclose(after["loss"], 0.25 * before["loss"], rtol=1e-5)
    np.testing.assert_allclose(after["anchor"], before["anchor"], rtol=1e-5)


def test_no_rows_for_the_task_or_none_tied_are_refused():
    with pytest.raises(UserError, match=r"safe_rows: expected fewer than the 8 rows"):
        lean(safe_rows=8).mix(PROBLEM, TRAIN, 0)
    method, state, _ = started(safe_rows=3)
    bare = batch(TRAIN, 8, 0, 0)
    with pytest.raises(UserError, match='lean: expected "tied" in the batch'):
        method.gradient(PROBLEM, BASE, MOVED, state, bare, KEY)


def other_model():
    return {**BASE, "embed": BASE["embed"].at[3, 2].add(1e-6)}


def other_data():
    tokens = PROBLEM.calibration.tokens.copy()
    tokens[[0, 1]] = tokens[[1, 0]]
    moved = dataclasses.replace(PROBLEM.calibration, tokens=tokens)
    return dataclasses.replace(PROBLEM, calibration=moved)


@pytest.mark.parametrize(
    ("problem", "base", "named"),
    [
        (lambda: PROBLEM, other_model, "of another model"),
        (other_data, lambda: BASE, "of another calibration set"),
    ],
)
def test_a_reference_of_something_else_is_refused(problem, base, named):
    method, state, _ = started(safe_rows=3)
    examples = method.mix(PROBLEM, TRAIN, 0)
    assert method.begin_domain(PROBLEM, BASE, state, examples, KEY) == (examples, {})
    with pytest.raises(
        UserError, match=f"lean: expected a reference .*{named}"
    ) as told:
        method.begin_domain(problem(), base(), state, examples, KEY)
    assert "\n" not in str(told.value)


def test_every_batch_has_its_tied_rows_and_every_epoch_each_once():
    mixed = tied_mixture(TRAIN, PROBLEM.calibration, 3)
    steps = [batch(mixed, 8, 1, step)["tied"] for step in range(8)]
    assert all(((s >= 0) == (np.arange(8) >= 5)).all() for s in steps)
    assert sorted(np.concatenate([s[5:] for s in steps])) == list(range(24))
    assert not (steps[0] == batch(mixed, 8, 2, 0)["tied"]).all()
    with pytest.raises(UserError, match="more than the 3 tied examples"):
        batch(mixed, 3, 0, 0)


@pytest.mark.parametrize(
    ("tied", "quota"),
    [([-1, -1], 1), ([0, 1], 1), ([0.5, -1], 1), ([0], 1), ([0, -1], 0)],
)
def test_a_set_of_rows_all_alike_or_without_a_quota_is_refused(tied, quota):
    two = tiny.dataset(0, 2)
    with pytest.raises(UserError, match="a row of a reference for some of the 2"):
        dataclasses.replace(two, tied=np.array(tied), quota=quota)
