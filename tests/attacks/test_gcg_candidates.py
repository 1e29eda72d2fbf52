"""The pieces of a GCG step against their slow twins: layout, gradient, candidates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gcg_case import (
    ALLOWED,
    EXTEND,
    FORBIDDEN,
    LENGTH,
    MODEL,
    PROMPTS,
    TARGETS,
    adapter,
    attack,
    dense_loss,
    found,
    gradient,
    same,
)
from programs_case import widest
from tiers import few

from sbr_jax import losses, models
from sbr_jax.attacks.candidates import (
    draw_candidates,
    prefill,
    propose,
    score_candidates,
)
from sbr_jax.attacks.suffix import lay_out
from sbr_jax.models import vocabulary

# --- the layout -------------------------------------------------------------------


def test_a_layout_holds_what_it_was_made_of():
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    suffixes = np.arange(100, 124).reshape(3, 2, LENGTH)
    asked = layout.asked(suffixes)
    for i, ((before, after), target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        whole = [*before, 0, 0, 0, 0, *after, *target]
        assert layout.tokens[i, : len(whole)].tolist() == whole
        assert not layout.tokens[i, len(whole) :].any()
        assert layout.start[i] == len(before)
        assert layout.tokens[i][layout.mask[i] > 0].tolist() == target
        for c in range(2):
            assert asked[2 * i + c] == [*before, *suffixes[i, c], *after]


def test_endings_are_the_layout_from_the_suffix_on():
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    ends = layout.endings()
    assert ends.tokens.shape == (3, LENGTH + 5)  # the second prompt's is the longest
    for i, ((before, after), target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        end = [0, 0, 0, 0, *after, *target]
        assert ends.tokens[i].tolist() == end + [0] * (LENGTH + 5 - len(end))
        assert ends.tokens[i][ends.mask[i] > 0].tolist() == target
        assert ends.mask[i].sum() == len(target)
        assert ends.start[i] == len(before)


# --- the gradient -----------------------------------------------------------------


def test_the_gradient_is_that_of_the_one_hot_suffix():
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    row = {name: value[1] for name, value in layout._asdict().items()}
    suffix = np.array([20, 6, 20, 31], np.int32)
    tokens = row["tokens"].copy()
    tokens[2 : 2 + LENGTH] = suffix
    embed, pairs = MODEL.params["embed"], adapter()

    @jax.jit
    def loss(one_hot):
        """By the definition: every token is a row of the one-hot matrix."""
        rows = jax.nn.one_hot(tokens, tiny.VOCAB).at[2 : 2 + LENGTH].set(one_hot)
        logits = MODEL.apply_fn(
            MODEL.params, pairs, tokens[None], embeddings=(rows @ embed)[None]
        )
        return losses.token_cross_entropy(logits, tokens[None], row["mask"][None])[0]

    value, slope = gradient(MODEL.params, pairs, row, suffix)
    start = jax.nn.one_hot(suffix, tiny.VOCAB)
    assert abs(float(value) - float(loss(start))) < 1e-5
    np.testing.assert_allclose(slope, jax.jit(jax.grad(loss))(start), atol=1e-5)


# --- the candidates ---------------------------------------------------------------

SLOPE = jnp.asarray(
    np.random.default_rng(0).normal(size=(LENGTH, tiny.VOCAB)), "float32"
)
SUFFIX = np.array([20, 6, 20, 31], np.int32)


@functools.partial(jax.jit, static_argnames=("candidates", "top_k"))
def draw(key, slope=SLOPE, allowed=ALLOWED, **options):
    options = {"candidates": 400, "top_k": 3, **options}
    return draw_candidates(key, slope, SUFFIX, allowed, **options)


def changed_places(candidates):
    different = np.asarray(candidates) != SUFFIX[None]
    # Exactly one place, so that "always moves" means what it says.
    assert (different.sum(axis=1) == 1).all()
    return different.argmax(axis=1)


def test_candidates_are_the_steepest_allowed_tokens_of_one_place():
    candidates = np.asarray(draw(jax.random.key(0)))
    places = changed_places(candidates)
    for place in range(LENGTH):
        order = np.argsort(np.asarray(SLOPE[place]), kind="stable")
        order = [v for v in order if ALLOWED[v] and v != SUFFIX[place]]
        drawn = candidates[places == place, place]
        assert set(drawn.tolist()) == set(order[:3])
        # Uniform over the three: 100 draws, five standard deviations of 4.7.
        assert np.unique(drawn, return_counts=True)[1].min() > 33 - 24


def test_forbidden_tokens_are_never_chosen_though_they_be_the_steepest():
    tempting = SLOPE.at[:, jnp.array(FORBIDDEN)].add(-10.0)
    everything = np.ones_like(ALLOWED)
    drawn = np.asarray(draw(jax.random.key(0), tempting))
    assert not np.isin(drawn, FORBIDDEN).any()
    free = np.asarray(draw(jax.random.key(0), tempting, everything))
    assert np.isin(free, FORBIDDEN).any()
    result = found()
    for suffixes in (result.suffixes, result.best_suffixes):
        assert not np.isin(suffixes, FORBIDDEN).any()
    assert np.isin(found_everywhere().suffixes, FORBIDDEN).any()


@functools.cache
def found_everywhere():
    return attack(allowed=np.ones(tiny.VOCAB, bool), top_k=8)


@pytest.mark.parametrize("candidates", [LENGTH, 10])
def test_even_sampling_covers_every_place_as_the_original_does(candidates):
    places = changed_places(draw(jax.random.key(1), candidates=candidates))
    original = np.arange(0, LENGTH, LENGTH / candidates).astype(int)
    assert places.tolist() == original[:candidates].tolist()
    assert set(places.tolist()) == set(range(LENGTH))


def test_even_sampling_of_fewer_candidates_than_places_reaches_every_place():
    """Two candidates for four places: unshifted, places 1 and 3 would stay for ever."""
    drawn = [changed_places(draw(jax.random.key(i), candidates=2)) for i in range(20)]
    assert set(np.concatenate(drawn).tolist()) == set(range(LENGTH))
    for places in drawn:  # as far apart as the original's
        assert (places[1] - places[0]) % LENGTH == 2


# --- the cached beginning ---------------------------------------------------------


def test_a_cached_beginning_equals_the_whole_forward():
    config = dataclasses.replace(tiny.CONFIG, heads=4, kv_heads=2, tied=True)
    pairs = adapter(config=config)
    params = models.init_params(jax.random.key(1), config)
    apply_fn, extend_fn = models.make_apply_fn(config), models.make_extend_fn(config)
    assert extend_fn is models.make_extend_fn(config)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, 9)).astype(np.int32)
    lengths = np.array([3, 5, 1], np.int32)
    logits, past = jax.jit(extend_fn)(params, pairs, tokens[:, :5])
    whole = np.asarray(jax.jit(apply_fn)(params, pairs, tokens))
    np.testing.assert_allclose(logits, whole[:, :5], atol=1e-5)

    rest = np.stack([row[n : n + 4] for row, n in zip(tokens, lengths, strict=True)])
    run = jax.jit(extend_fn)
    logits, _ = run(params, pairs, rest, past, lengths)
    wanted = [row[n : n + 4] for row, n in zip(whole, lengths, strict=True)]
    np.testing.assert_allclose(logits, np.stack(wanted), atol=1e-5)

    def spoilt(count):
        """The slots after the first ``length - count`` hold something else."""
        slot = jnp.arange(5)[None, :] >= jnp.asarray(lengths)[:, None] - count
        slot = slot[None, :, :, None, None]
        return jax.tree.map(lambda x: jnp.where(slot, 7.0, x), past)

    padded, _ = run(params, pairs, rest, spoilt(0), lengths)
    np.testing.assert_array_equal(padded, logits)
    harmed, _ = run(params, pairs, rest, spoilt(1), lengths)
    assert (np.abs(harmed - logits).max(axis=(1, 2)) > 0.01).all()


def test_the_attack_is_the_same_with_a_cached_beginning():
    same(attack(extend_fn=EXTEND), found())


# --- the head ---------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "cached"), [(5, False), (64, True)])
def test_losses_of_candidates_equal_those_of_whole_logits(chunk, cached):
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    rng = np.random.default_rng(0)
    suffixes = rng.integers(4, tiny.VOCAB, (3, 7, LENGTH)).astype(np.int32)
    pairs, rows, run = adapter(), layout._asdict(), MODEL.apply_fn
    if cached:
        past = prefill(EXTEND, MODEL.params, pairs, layout.tokens[:, :5])
        rows, run = {**layout.endings()._asdict(), "past": past}, EXTEND
    losses = score_candidates(run, chunk, 4, MODEL.params, pairs, rows, suffixes)
    wanted = [
        [dense_loss(prompt, suffix, target, pairs) for suffix in own]
        for prompt, target, own in zip(PROMPTS, TARGETS, suffixes.tolist(), strict=True)
    ]
    # Float32 rounding of logits, on losses near 3.
    np.testing.assert_allclose(losses, wanted, atol=1e-5)


@pytest.mark.parametrize("at_once", few([2, 8], 1))
def test_prompts_of_a_block_keep_their_own_gradient(at_once):
    layout = lay_out(PROMPTS, TARGETS, LENGTH)
    rows, suffixes = layout._asdict(), np.tile(SUFFIX, (3, 1))
    keys = jax.random.split(jax.random.key(2), 3)
    options = 32, 8, at_once, 4
    step, pairs = jnp.int32(1), adapter()
    losses, found = propose(
        MODEL.apply_fn,
        *options,
        MODEL.params,
        pairs,
        rows,
        keys,
        ALLOWED,
        suffixes,
        step,
    )
    for i in range(3):
        row = {name: value[i] for name, value in rows.items()}
        loss, slope = gradient(MODEL.params, pairs, row, SUFFIX)
        np.testing.assert_allclose(losses[i], loss, atol=1e-5)
        # Drawn from the same slope, so the same candidates.
        key = jax.random.fold_in(keys[i], step)
        drawn = draw(key, slope, candidates=32, top_k=8)
        np.testing.assert_array_equal(found[i], drawn)


def test_no_program_of_the_attack_is_as_wide_as_the_targets_logits(monkeypatch):
    config = dataclasses.replace(tiny.CONFIG, vocab_size=5003)
    params = models.init_params(jax.random.key(1), config)
    run, extend = models.make_apply_fn(config), models.make_extend_fn(config)
    layout = lay_out([([1, 5, 9], [2])] * 6, [[7] * 30] * 6, LENGTH)
    rows, suffixes = layout._asdict(), np.ones((6, 16, LENGTH), np.int32)
    keys = jax.random.split(jax.random.key(2), 6)
    allowed = np.ones(5003, bool)
    monkeypatch.setattr(vocabulary, "chunk_size", lambda *_: 16)
    past = prefill(extend, params, None, layout.tokens[:, :3])
    ends = {**layout.endings()._asdict(), "past": past}

    def candidates(base):
        return score_candidates(run, 32, 31, base, None, rows, suffixes)

    def continued(base):
        return score_candidates(extend, 32, 31, base, None, ends, suffixes)

    def gradient(base):
        some = suffixes[:, 0], jnp.int32(0)
        return propose(run, 4, 2, 6, 31, base, None, rows, keys, allowed, *some)

    def whole(base):
        return run(base, None, np.ones((6, layout.tokens.shape[1]), np.int32))

    for program in (candidates, continued, gradient):
        size = widest(program, params)
        # The slopes of the suffixes, and the embedding's own size, are as wide.
        assert size <= max(6 * LENGTH, config.width) * 5003
    assert widest(whole, params) >= 6 * 30 * 5003
