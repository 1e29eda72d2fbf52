"""Losses of states against those of whole logits; nothing as wide as these exists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs_case import widest

from sbr_jax import losses, models
from sbr_jax.data.layout import answer_places
from sbr_jax.models import answers, vocabulary

SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "capped": {"logit_cap": 3.0},
}


def made(vocab=203, **changes):
    config = models.ModelConfig(
        vocab_size=vocab,
        width=16,
        mlp_width=24,
        layers=2,
        heads=2,
        init_scale=0.3,
        **changes,
    )
    return models.make_model(config, models.init_params(jax.random.key(0), config))


def states(count=23, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden, reference = (jax.random.normal(k, (count, 16)) for k in keys[:2])
    return hidden, reference, jax.random.randint(keys[2], (count,), 0, 203)


@pytest.mark.parametrize(
    ("loss", "kind", "chunk"),
    [
        ("likelihood", "tied", 5),
        ("likelihood", "untied", 64),
        ("forward", "capped", 5),
        ("reverse", "tied", 23),
        ("cooled", "untied", 1),
    ],
)
def test_values_and_gradients_equal_those_of_whole_logits(loss, kind, chunk):
    model = made(**SHAPES[kind])
    head, base = model.apply_fn.head, model.params
    hidden, reference, targets = states()
    weights = jnp.linspace(-1.0, 2.0, 23)
    told = {
        "forward": {},
        "reverse": {"direction": "reverse"},
        "cooled": {"temperature": 0.5},
    }

    def ours(base, hidden):
        if loss == "likelihood":
            values = vocabulary.log_likelihood(head, base, hidden, targets, chunk=chunk)
        else:
            values = vocabulary.divergence(
                head, base, reference, hidden, chunk=chunk, **told[loss]
            )
        return jnp.sum(weights * values), values

    def dense(base, hidden):
        logits = head(base, hidden)
        if loss == "likelihood":
            values = jnp.take_along_axis(
                jax.nn.log_softmax(logits), targets[:, None], 1
            )[:, 0]
        else:
            p, q = (
                jax.nn.log_softmax(x / told[loss].get("temperature", 1.0))
                for x in (jax.lax.stop_gradient(head(base, reference)), logits)
            )
            p, q = (q, p) if loss == "reverse" else (p, q)
            values = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(weights * values), values

    for where in ((1,), (0, 1)):
        mine, true = (
            jax.jit(jax.value_and_grad(f, argnums=where, has_aux=True))(base, hidden)
            for f in (ours, dense)
        )
        # float32 sums over 203 logits in another order.
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_losses_of_a_batch_equal_the_dense_ones_in_every_layout():
    model = made()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 203, (5, 9)).astype(np.int32)
    mask = (rng.random((5, 9)) < 0.4).astype(np.float32)
    mask[3] = 0
    other = models.init_adapter(jax.random.key(1), model.config, rank=2, alpha=4.0)
    other = jax.tree.map(lambda x: x + 0.1, other)
    bare = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    base = model.params

    @jax.jit
    def whole(base):
        reference, logits = (model.apply_fn(base, a, tokens) for a in (None, other))
        nll = losses.token_cross_entropy(logits, tokens, mask)
        return nll, losses.kl_to_reference(reference, logits, mask)

    nll, kl = whole(base)

    @jax.jit
    def both(base, batch):
        run = model.apply_fn
        hidden, reference = (answers.states(run, base, a, batch) for a in (other, None))
        found = answers.find(batch)
        return (
            answers.cross_entropy(run, base, hidden, found),
            answers.kl_to_reference(run, base, reference, hidden, found),
        )

    for batch in (bare, {**bare, **answer_places(tokens, mask)}):
        ours = both(base, batch)
        np.testing.assert_allclose(ours[0], nll, rtol=1e-5)
        np.testing.assert_allclose(ours[1], kl, rtol=1e-4, atol=1e-6)
    assert float(nll[3]) == 0.0


def test_a_function_without_states_is_taken_by_its_logits():
    model = made()
    plain = functools.partial(lambda f, *a: f(*a), model.apply_fn)
    batch = {"tokens": jnp.ones((2, 4), jnp.int32), "mask": jnp.ones((2, 4))}

    def nll(f, base):
        hidden = answers.states(f, base, None, batch)
        return answers.cross_entropy(f, base, hidden, answers.find(batch))

    both = [
        jax.jit(functools.partial(nll, f))(model.params)
        for f in (plain, model.apply_fn)
    ]
    np.testing.assert_allclose(*both, rtol=1e-6)


def test_no_array_of_a_step_is_as_wide_as_all_logits():
    model = made(vocab=5003)
    tokens = np.ones((8, 64), np.int32)
    mask = np.zeros((8, 64), np.float32)
    mask[:, 20:60] = 1
    batch = {"tokens": tokens, "mask": mask, **answer_places(tokens, mask)}
    adapter = models.init_adapter(jax.random.key(1), model.config, rank=2, alpha=4.0)

    def loss(adapter):
        run, base = model.apply_fn, model.params
        hidden, reference = (
            answers.states(run, base, a, batch) for a in (adapter, None)
        )
        found = answers.find(batch)
        nll = answers.cross_entropy(run, base, hidden, found)
        return jnp.mean(
            nll + answers.kl_to_reference(run, base, reference, hidden, found)
        )

    def dense(adapter):
        logits = model.apply_fn(model.params, adapter, tokens)
        return jnp.mean(losses.token_cross_entropy(logits, tokens, mask))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "chunk_size", lambda *_: 16)
        ours, whole = (widest(jax.value_and_grad(f), adapter) for f in (loss, dense))
    assert ours < 8 * 40 * 5003 / 4
    assert whole >= 8 * 64 * 5003
