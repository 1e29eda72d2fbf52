"""Few shapes for many lengths, and answers scored in them as one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs_case import widest
from test_vocabulary import made

from sbr_jax import losses, models
from sbr_jax.data import TokenDataset
from sbr_jax.evaluation import scorer
from sbr_jax.evaluation.domain_scores import TokenAccuracy
from sbr_jax.models import likelihood, vocabulary
from sbr_jax.models.buckets import bucket, neighbours
from sbr_jax.models.likelihood import answer_scores
from sbr_jax.studies._held_out import held_out_scores

KINDS = {"tied": {}, "untied": {"tied": False}, "capped": {"logit_cap": 3.0}}


def answered(count, length, seed=0, longest=9):
    """Tokens and masks of rows of all lengths, one without an answer."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 203, (count, length)).astype(np.int32)
    mask = np.zeros((count, length), np.float32)
    for row in mask:
        end = rng.integers(2, length + 1)
        row[max(end - rng.integers(1, longest), 0) : end] = 1
    mask[count // 2] = 0
    return tokens, mask


@pytest.mark.parametrize("saving", [0, 100, 1_000_000])
def test_groups_hold_every_sequence_once_and_few_are_padded_far(saving):
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    groups = neighbours(lengths, saving=saving, most=390)
    assert sorted(np.concatenate([ids for _, ids in groups])) == list(range(300))
    widths = [width for width, _ in groups]
    assert widths == sorted(set(widths))
    assert widths[-1] <= 390
    for width, ids in groups:
        assert np.minimum(lengths[ids], 390).max() <= width
        assert (np.diff(ids) > 0).all()
        if not saving:
            assert width < 1.5 * lengths[ids].min() or width == 8
    # The negative: where nothing is worth a shape of its own there is one.
    assert (len(groups) == 1) == (saving == 1_000_000)
    assert neighbours([]) == []


@pytest.mark.parametrize(
    ("kind", "count", "length", "batch_size"),
    [("tied", 1, 5, 4), ("untied", 13, 40, 4), ("capped", 13, 40, 64)],
)
def test_scores_equal_those_of_whole_logits(kind, count, length, batch_size):
    model, (tokens, mask) = made(**KINDS[kind]), answered(count, length)
    found = answer_scores(
        model.apply_fn,
        model.params,
        None,
        tokens,
        mask,
        batch_size=batch_size,
        saving=50,
    )
    logits = np.asarray(jax.jit(model.apply_fn)(model.params, None, tokens))
    scores = losses.token_log_likelihood(logits, tokens) * mask[:, 1:]
    right = np.argmax(logits[:, :-1], -1) == tokens[:, 1:]
    # Float32 logits of other shapes; an answer's sum is of a dozen numbers near 5.
    np.testing.assert_allclose(found.log_likelihoods, scores.sum(-1), atol=1e-4)
    np.testing.assert_array_equal(found.hits, (right * mask[:, 1:]).sum(-1))
    np.testing.assert_array_equal(found.counts, mask[:, 1:].sum(-1))
    assert found.told.all()


def test_what_studies_report_equals_whole_logits():
    model, (tokens, mask) = made(), answered(40, 50)
    data = TokenDataset(tokens, mask)
    logits = np.asarray(jax.jit(model.apply_fn)(model.params, None, tokens))
    nll = np.asarray(losses.token_cross_entropy(logits, tokens, mask))
    count = mask[:, 1:].sum()
    right = (np.argmax(logits[:, :-1], -1) == tokens[:, 1:]) * mask[:, 1:]
    loss, accuracy = held_out_scores(model, data, model.params, None)
    assert loss == pytest.approx(np.sum(nll * mask[:, 1:].sum(1)) / count, rel=1e-5)
    assert accuracy == pytest.approx(100 * right.sum() / count, rel=1e-6)
    token_accuracy = TokenAccuracy(model.apply_fn, data, batch_size=6)
    assert token_accuracy(model.params, None) == pytest.approx(accuracy, rel=1e-6)


def test_one_program_scores_all_batches_of_a_width():
    model, (tokens, mask) = made(vocab=211), answered(64, 24)
    before = likelihood._read._cache_size()
    models.token_log_probs(model, model.params, None, tokens, mask, batch_size=8)
    assert likelihood._read._cache_size() == before + 1
    other = jax.tree.map(lambda x: 2 * x, model.params)
    models.token_log_probs(model, other, None, tokens, mask, batch_size=8)
    assert likelihood._read._cache_size() == before + 1


def test_a_broken_place_is_refused_where_it_matters_and_named():
    tokens = np.arange(6, dtype=np.int32)[:, None] * np.ones((1, 8), np.int32)
    mask = np.zeros((6, 8), np.float32)
    mask[:, 3:5] = 1
    logits = np.random.default_rng(0).normal(size=(6, 8, 7)).astype(np.float32)

    def told(at, value):
        changed = logits.copy()
        changed[2, at] = value
        found = answer_scores(_looked_up, changed, None, tokens, mask, batch_size=4)
        return found.told.tolist()

    named = [True, True, False, True, True, True]
    for value in (np.nan, np.inf, 3.0):
        # The last token of the prompt and the first of the answer predict.
        assert [told(at, value) == named for at in range(8)] == [
            at in (2, 3) for at in range(8)
        ]
        assert all(told(1, value))


def _looked_up(base, adapter, tokens):
    """The same logits for the same row, however rows are batched."""
    return base[tokens[:, 0]]


def test_no_program_of_scoring_is_as_wide_as_all_logits(monkeypatch):
    model = made(vocab=5003)
    extend = models.make_extend_fn(model.config)
    tokens = np.ones((8, 64), np.int32)
    places = np.arange(40, dtype=np.int32) * 12
    cache = tuple(jnp.zeros((2, 8, 16, 2, 8)) for _ in range(2))
    ids = np.arange(8, dtype=np.int32)
    last = np.zeros((8, 4), np.int32)
    monkeypatch.setattr(vocabulary, "chunk_size", lambda *_: 16)

    def answers(base):
        return likelihood._read(model.apply_fn, base, None, tokens, places, places)

    def contexts(base):
        return scorer._read(extend, base, None, tokens, None)

    def options(base):
        lengths = ids + 1
        rest = (tokens, places, places, ids * 64, last)
        return scorer._end(extend, base, None, cache, ids, lengths, *rest)

    def dense(base):
        return extend(base, None, tokens)[0]

    for program in (answers, contexts, options):
        found = widest(program, model.params)
        assert found < 40 * 5003 / 2
    assert widest(dense, model.params) >= 8 * 64 * 5003


def test_buckets_stay_few():
    assert len({bucket(n, 16) for n in range(1, 513)}) == 11


@pytest.mark.parametrize("alternates", [False, True])
def test_states_of_an_extension_are_what_its_head_reads(alternates):
    changes = {"window": 5, "sliding": (True, False)} if alternates else {}
    config = dataclasses.replace(made().config, **changes)
    params = models.init_params(jax.random.key(1), config)
    extend, run = models.make_extend_fn(config), models.make_apply_fn(config)
    tokens = np.random.default_rng(0).integers(0, 203, (3, 17)).astype(np.int32)
    hidden = jax.jit(extend.hidden)
    states, past = hidden(params, None, tokens[:, :9])
    whole = jax.jit(run)(params, None, tokens)
    # Float32 sums in another order, logits near 1.
    np.testing.assert_allclose(extend.head(params, states), whole[:, :9], atol=1e-5)
    states, _ = hidden(params, None, tokens[:, 9:], past)
    np.testing.assert_allclose(extend.head(params, states), whole[:, 9:], atol=1e-5)
