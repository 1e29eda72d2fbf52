"""The refusal direction: found where it was planted, and gone where it is ablated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sbr_jax import attacks, models
from sbr_jax.analysis import directions
from sbr_jax.typing import UserError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def prompts(seed, count, last=None):
    """Token lists of different lengths; `last` fixes the final token."""
    draw = rng(seed)
    rows = [
        draw.integers(0, tiny.VOCAB, n).tolist() for n in draw.integers(3, 8, count)
    ]
    return rows if last is None else [[*row, last] for row in rows]


def residual(model, base, adapter, tokens):
    return model.apply_fn(base, adapter, tokens, capture=True)[1]["residual"]


def live_adapter(config, targets="(q|o|down)_proj"):
    adapter = models.init_adapter(
        jax.random.key(1), config, rank=2, alpha=4.0, targets=targets
    )
    return jax.tree.map(lambda x: x + 0.3, adapter)


def test_ablation_is_the_dense_projector(model):
    direction = rng(3).normal(size=tiny.CONFIG.width)
    unit = direction / np.linalg.norm(direction)
    projector = np.eye(len(unit)) - np.outer(unit, unit)
    ablated = attacks.ablate_direction(model.params, direction)
    before, after = (
        {"embed": base["embed"], **base["layers"], "final_norm": base["final_norm"]}
        for base in (model.params, ablated)
    )
    for name, weight in before.items():
        if name in ("embed", *attacks.WRITERS):
            expected = np.asarray(weight, np.float64) @ projector
            # One float32 rounding of numbers of size 1 and a sum over 16 of them.
            np.testing.assert_allclose(after[name], expected, atol=1e-6)
            assert float(jnp.abs(after[name] - weight).max()) > 1e-3
        else:
            assert after[name] is weight


def test_ablation_keeps_the_dtype_and_can_be_repeated(model):
    direction = rng(3).normal(size=tiny.CONFIG.width)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert attacks.ablate_direction(half, direction)["embed"].dtype == jnp.bfloat16
    once = attacks.ablate_direction(model.params, direction)
    twice = attacks.ablate_direction(once, 5.0 * direction)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once, twice)


def test_nothing_writes_the_direction_after_merging_an_adapter(model):
    direction = rng(3).normal(size=tiny.CONFIG.width)
    unit = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)
    adapter, tokens = live_adapter(model.config), tiny.dataset(0, 4).tokens
    run = jax.jit(lambda base, adapter: residual(model, base, adapter, tokens) @ unit)

    merged = models.merge_adapter(model.params, adapter)
    assert float(jnp.abs(run(merged, None)).max()) > 1e-1
    # float32 sums over width and depth of numbers of size 1.
    assert (
        float(jnp.abs(run(attacks.ablate_direction(merged, unit), None)).max()) < 1e-5
    )
    # Without merging, the adapter goes on writing it: the trap the docstring names.
    left = run(attacks.ablate_direction(model.params, unit), adapter)
    assert float(jnp.abs(left).max()) > 1e-2


@pytest.mark.parametrize(
    ("direction", "message"),
    [(np.full(16, np.nan), "got nan"), (np.ones(15), r"expected the shape \(16,\)")],
)
def test_a_direction_that_would_do_nothing_is_refused(model, direction, message):
    with pytest.raises(UserError, match=message):
        attacks.ablate_direction(model.params, direction)


def test_difference_of_means_equals_its_slow_twin(model, monkeypatch):
    monkeypatch.setattr(directions, "BATCH", 2)
    harmful, harmless = prompts(0, 5), prompts(1, 7)
    adapter = live_adapter(model.config)
    found = directions.difference_of_means(
        model.apply_fn, model.params, adapter, harmful, harmless
    )
    run = jax.jit(lambda tokens: residual(model, model.params, adapter, tokens))

    def mean(rows):
        # Padded on the right to one length by hand; causal, so it changes nothing.
        states = [
            np.asarray(run(np.array([row + [0] * (8 - len(row))])))[:, 0, len(row) - 1]
            for row in rows
        ]
        return np.mean(np.asarray(states, np.float64), axis=0)

    assert found.shape == (model.config.layers + 1, model.config.width)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, mean(harmful) - mean(harmless), atol=1e-5)


def test_a_token_dataset_stands_for_its_prompts(model):
    data = tiny.dataset(0, 6)
    lists = [row[:4] for row in data.tokens.tolist()]
    one, two = (
        directions.last_token_states(model.apply_fn, model.params, None, given)
        for given in (data, lists)
    )
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_refusal_score_is_the_log_odds():
    logits = rng(0).normal(size=(4, 6)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    odds = p[:, [1, 4]].sum(-1) / (1 - p[:, [1, 4]].sum(-1))
    found = directions.refusal_score(jnp.asarray(logits), jnp.array([1, 4]))
    np.testing.assert_allclose(found, np.log(odds), rtol=1e-4, atol=1e-5)
    sure = directions.refusal_score(jnp.array([[1e9, 0.0]]), jnp.array([0]))
    assert np.isfinite(np.asarray(sure)).all()


@pytest.fixture(scope="module")
def planted():
    """Two layers; one axis of the stream says refuse, and the prompts differ in it.

    The token 1 marks harm: its embedding has the axis 0, which the unembedding maps
    to the refusal token 2. Blocks write nothing, so all layers carry it.
    """
    config = dataclasses.replace(tiny.CONFIG, tied=False)
    base = models.init_params(jax.random.key(0), config)
    layers = {
        name: jnp.zeros_like(w) if name in attacks.WRITERS else w
        for name, w in base["layers"].items()
    }
    embed = base["embed"].at[:, 0].set(0.0).at[1, 0].set(4.0)
    head = (0.1 * base["head"]).at[0].set(0.0).at[0, 2].set(8.0)
    return models.make_model(
        config, {**base, "layers": layers, "embed": embed, "head": head}
    )


def test_the_planted_direction_is_found_and_decides(planted):
    harmful, harmless = prompts(0, 24, last=1), prompts(0, 24, last=3)
    found = directions.refusal_direction(
        planted.apply_fn,
        planted.params,
        harmful,
        harmless,
        [2],
        attacks.ablate_direction,
        max_kl=10.0,
    )
    assert found.start > 3
    assert found.score < found.start - 3
    assert found.induced > 3
    assert found.accepted
    assert np.isclose(np.linalg.norm(found.vector), 1)
    # The mean difference also holds how the two last tokens differ otherwise.
    assert found.vector[0] > 0.8
    # A random direction does not decide anything.
    other = attacks.ablate_direction(planted.params, rng(9).normal(size=16))
    tokens = np.array([harmful[0]])
    logits = jax.jit(planted.apply_fn)(other, None, tokens)[:, -1]
    assert float(directions.refusal_score(logits, jnp.array([2]))[0]) > 1


def test_filters_are_told_and_equal_prompts_refused(planted):
    harmful, harmless = prompts(0, 8, last=1), prompts(0, 8, last=3)
    given = (planted.apply_fn, planted.params, harmful)
    more = ([2], attacks.ablate_direction)
    strict = directions.refusal_direction(*given, harmless, *more, min_induced=1e3)
    assert not strict.accepted
    with pytest.raises(UserError, match="tells harmful from harmless"):
        directions.refusal_direction(*given, harmful, *more)
    with pytest.raises(UserError, match="1 of them empty"):
        directions.refusal_direction(*given, [[1], []], *more)


def test_drift_is_a_cosine():
    before, after = rng(0).normal(size=(2, 5, 8))
    found = directions.drift(before, after)
    for a, b, value in zip(before, after, found, strict=True):
        assert np.isclose(value, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.isnan(directions.drift(np.zeros(3), np.ones(3)))
    np.testing.assert_allclose(directions.drift(before, -2 * before), -1)
