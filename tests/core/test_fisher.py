import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from subspace_case import normal

from sbr_jax import (
    UserError,
    effective_rank,
    fisher_subspace,
    per_example_gradients,
)

TRACES = {"count": 0}


def pair_loss(params, example, frozen):
    """Half squared error of x (W + A B): two layers, joint unit {a, b}."""
    TRACES["count"] += 1
    h = example["x"]
    for layer in range(2):
        pair = params["pair"]
        h = jnp.tanh(h @ frozen[layer] + (h @ pair["a"][layer]) @ pair["b"][layer])
    return 0.5 * jnp.sum((h - example["y"]) ** 2)


def is_pair(node):
    return isinstance(node, dict) and "a" in node


PARAMS = {
    "pair": {
        "a": jnp.asarray(normal(0, 2, 4, 2)),
        "b": jnp.asarray(normal(1, 2, 2, 4)),
    }
}
FROZEN = jnp.asarray(normal(2, 2, 4, 4))
DATA = {"x": normal(3, 11, 4), "y": normal(4, 11, 4)}
PAIR = {"unit": is_pair, "layer_axes": 1, "args": (FROZEN,)}


def cut(*sizes):
    ends = np.cumsum(sizes)
    return [
        {k: jnp.asarray(v[e - s : e]) for k, v in DATA.items()}
        for s, e in zip(sizes, ends, strict=True)
    ]


@functools.cache
def dense(layer):
    """The dense Fisher matrix of one layer's joint unit, by jacrev."""

    def loss(vector, i):
        a = PARAMS["pair"]["a"].at[layer].set(vector[:8].reshape(4, 2))
        b = PARAMS["pair"]["b"].at[layer].set(vector[8:].reshape(2, 4))
        example = {k: jnp.asarray(v[i]) for k, v in DATA.items()}
        return pair_loss({"pair": {"a": a, "b": b}}, example, FROZEN)

    start = jnp.concatenate([PARAMS["pair"][k][layer].reshape(-1) for k in ("a", "b")])
    return reference.dense_fisher(loss, start, range(11))


def test_streamed_fisher_is_the_dense_fisher_of_every_layer():
    s = fisher_subspace(
        pair_loss, PARAMS, cut(4, 4, 3), max_rank=16, energy=1.0, **PAIR
    )
    for layer in range(2):
        f = dense(layer)
        v, w = (reference.f64(x["pair"][layer]) for x in (s.basis, s.eigenvalues))
        # float32 gradients on both sides: a few ε of the largest entry.
        np.testing.assert_allclose((v * w) @ v.T, f, atol=3e-6 * np.abs(f).max())
        np.testing.assert_allclose(s.trace["pair"][layer], np.trace(f), rtol=2e-6)


@pytest.mark.parametrize(("sizes", "micro"), [((4, 4, 3), 2), ((1,) * 11, None)])
def test_batching_and_microbatching_change_nothing(sizes, micro):
    settings, seen = {"max_rank": 8, "energy": 1.0, **PAIR}, []
    want = fisher_subspace(pair_loss, PARAMS, cut(11), **settings)
    settings |= {"microbatch": micro, "progress": seen.append}
    got = fisher_subspace(pair_loss, PARAMS, iter(cut(*sizes)), **settings)
    for field in ("eigenvalues", "trace"):
        a, b = (getattr(s, field)["pair"] for s in (want, got))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.max()))
    assert seen == np.cumsum(sizes).tolist()


def linear(params, x):
    return jnp.vdot(params["w"], x)


@pytest.mark.parametrize(
    ("max_rank", "buffer", "batch", "microbatch"),
    [(4, 4, 3, None), (5, 5, 7, 4)],
)
def test_a_full_buffer_loses_no_example_however_batches_fill_it(
    max_rank, buffer, batch, microbatch
):
    """One example outweighs all others, wherever in the stream it stands."""
    for place in range(0, 24, 5):
        x = normal(9, 24, 12)
        x[place] *= 30
        s = fisher_subspace(
            linear,
            {"w": jnp.zeros(12)},
            [x[i : i + batch] for i in range(0, 24, batch)],
            max_rank=max_rank,
            energy=1.0,
            buffer_rank=buffer,
            microbatch=microbatch,
        )
        most = np.linalg.eigvalsh(reference.f64(x).T @ x / 24)[-1]
        assert 0.95 * most <= float(s.eigenvalues["w"][0]) <= most * (1 + 1e-5)
        np.testing.assert_allclose(s.trace["w"], (x**2).sum() / 24, rtol=1e-5)


def test_per_example_gradients_are_a_loop_of_grad():
    batch = cut(11)[0]
    grad = jax.jit(jax.grad(pair_loss))
    want = [
        grad(PARAMS, {k: v[i] for k, v in batch.items()}, FROZEN) for i in range(11)
    ]
    for micro in (None, 4):
        got = per_example_gradients(pair_loss, PARAMS, batch, FROZEN, microbatch=micro)
        for key in ("a", "b"):
            np.testing.assert_allclose(
                got["pair"][key], [w["pair"][key] for w in want], rtol=1e-4, atol=1e-5
            )


def test_compiles_once_for_all_batches_calls_and_frozen_weights():
    def loss(params, example, frozen):
        return pair_loss(params, example, frozen)

    settings = {"max_rank": 4, "unit": is_pair, "layer_axes": 1}
    fisher_subspace(loss, PARAMS, cut(4, 4, 3), args=(FROZEN,), **settings)
    before = TRACES["count"]
    s = fisher_subspace(loss, PARAMS, cut(4, 4, 2), args=(2 * FROZEN,), **settings)
    assert TRACES["count"] == before
    t = fisher_subspace(loss, PARAMS, cut(4, 4, 2), args=(FROZEN,), **settings)
    assert float(jnp.abs(s.trace["pair"] - t.trace["pair"]).max()) > 0


def test_fresh_lora_covers_only_b():
    fresh = {"pair": PARAMS["pair"] | {"b": jnp.zeros((2, 2, 4))}}
    s = fisher_subspace(pair_loss, fresh, cut(11), max_rank=8, energy=1.0, **PAIR)
    assert not s.basis["pair"][:, :8].any()  # the A block
    assert int(effective_rank(s)["pair"].min()) > 0
    none = {"pair": jax.tree.map(jnp.zeros_like, PARAMS["pair"])}
    s = fisher_subspace(pair_loss, none, cut(11), max_rank=8, **PAIR)
    assert not effective_rank(s)["pair"].any()
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(s))


def logistic(params, example):
    logits = example["x"] @ params["w"]
    return -jax.nn.log_softmax(logits)[example["y"]]


def sampled_logistic(params, example, key):
    logits = example["x"] @ params["w"]
    label = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return -jax.nn.log_softmax(logits)[label]


def test_sampled_fisher_is_the_true_fisher_in_expectation():
    x = np.repeat(normal(5, 2, 3), 1500, axis=0)
    params = {"w": jnp.asarray(normal(6, 3, 3))}
    batch = {"x": jnp.asarray(x), "y": jnp.zeros(3000, jnp.int32)}
    settings = {"max_rank": 9, "energy": 1.0, "buffer_rank": 5000}
    settings |= {"fisher": "sampled", "key": jax.random.key(0)}
    s = fisher_subspace(sampled_logistic, params, [batch], **settings)
    true = np.zeros((9, 9))
    for row in x[::1500]:
        p = np.asarray(jax.nn.softmax(row @ params["w"]), np.float64)
        true += np.kron(np.outer(row, row), np.diag(p) - np.outer(p, p)) / 2
    v, w = (reference.f64(t["w"]) for t in (s.basis, s.eigenvalues))
    # 3000 draws: a relative standard error of about 2 %.
    np.testing.assert_allclose((v * w) @ v.T, true, atol=0.1 * np.abs(true).max())
    wrong = fisher_subspace(
        logistic, params, [batch], max_rank=9, energy=1.0, buffer_rank=5000
    )
    assert abs(float(wrong.trace["w"]) / np.trace(true) - 1) > 0.2


def test_sampled_fisher_does_not_depend_on_batching():
    params = {"w": jnp.asarray(normal(6, 3, 3))}
    x, y = jnp.asarray(normal(7, 5, 3)), jnp.zeros(5, jnp.int32)
    settings = {"max_rank": 4, "fisher": "sampled", "key": jax.random.key(1)}
    whole = fisher_subspace(sampled_logistic, params, [{"x": x, "y": y}], **settings)
    parts = [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]
    split = fisher_subspace(sampled_logistic, params, parts, **settings)
    np.testing.assert_allclose(whole.trace["w"], split.trace["w"], rtol=1e-5)


def test_bfloat16_parameters_give_a_float32_subspace():
    def loss(params, x):
        return jnp.vdot(params["w"], x)

    x = jnp.asarray(normal(8, 3, 6), jnp.bfloat16)
    params = {"w": jnp.zeros(6, jnp.bfloat16)}
    s = fisher_subspace(loss, params, [x], max_rank=3)
    assert {a.dtype.name for a in jax.tree.leaves(s)} == {"float32"}


def test_mistakes_are_named():
    settings = {"max_rank": 4, **PAIR}
    run = lambda batches, **more: fisher_subspace(  # noqa: E731
        pair_loss, PARAMS, batches, **(settings | more)
    )
    with pytest.raises(UserError, match="random key"):
        run(cut(11), fisher="sampled")
    with pytest.raises(UserError, match="leading example axis"):
        run([{"x": jnp.zeros((2, 4)), "y": jnp.zeros((3, 4))}])
    bad = cut(11)[0]
    bad["x"] = bad["x"].at[3, 0].set(jnp.nan)
    with pytest.raises(UserError, match=r"finite gradients.*\['pair'\]"):
        run([bad])
