"""A token at a time, in both layouts of the cache, against the whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, adapter, params

from sbr_jax import models
from sbr_jax.models import decoding
from sbr_jax.models.decoding import next_logits, open_cache
from sbr_jax.models.layers import sees
from sbr_jax.models.parts import layer_mask
from sbr_jax.models.prefix import extend

READ, NEW = 5, 3
LOOP, LAYERS = models.Hardware(unroll=1), models.Hardware()
slides = tuple(i % 2 == 0 for i in range(CONFIG.layers))
KINDS = {
    "grouped heads": {},
    "every trait": {
        **{"window": 3, "sliding": slides, "rope_layers": slides},
        **{"attention_cap": 0.5, "attention_multiplier": 0.7},
    },
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_by_one(config, hardware, base, pairs, ids):
    """Logits of the last tokens, each from the cache of those before it."""
    _, known = extend(config, LOOP, base, pairs, ids[:, :READ])
    cache = open_cache(hardware, base, known, NEW)
    assert isinstance(cache, list) is (hardware is LAYERS)
    places, found = jnp.arange(READ + NEW, dtype=jnp.int32)[None], []
    for slot in range(READ, READ + NEW):
        place = jnp.full((2,), slot, jnp.int32)
        pick = layer_mask(config, functools.partial(sees, place[:, None], places))
        rest = (ids[:, slot], place, pick, cache, slot)
        logits, cache = next_logits(config, hardware, base, pairs, *rest)
        found.append(logits)
    return jnp.stack(found, 1)


@pytest.mark.parametrize("hardware", [LOOP, LAYERS], ids=["loop", "layers"])
@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
def test_every_next_token_is_that_of_the_whole_sequence(change, hardware):
    config = dataclasses.replace(CONFIG, **change)
    assert config.heads > config.kv_heads > 1
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, READ + NEW))
    given = (params(), adapter(), ids.astype(np.int32))
    wanted = jax.jit(models.make_apply_fn(config, LOOP))(*given)
    found = one_by_one(config, hardware, *given)
    # Sums of some tens of products, in another order.
    np.testing.assert_allclose(found, wanted[:, READ:], rtol=0, atol=2e-5)


def test_large_weights_are_not_alive_twice(monkeypatch):
    known = (jnp.zeros((CONFIG.layers, 1, 4, CONFIG.kv_heads, CONFIG.head_dim)),) * 2
    size = sum(x.nbytes for x in jax.tree.leaves(params()["layers"]))
    for most, kind in ((size, list), (size - 1, tuple)):
        monkeypatch.setattr(decoding, "MOST_COPIED", most)
        assert type(decoding.open_cache(LAYERS, params(), known, 1)) is kind


def test_codes_are_decoded_layer_by_layer_too():
    base = models.quantize(params(), "nf4")
    prompts = [[1, 5, 9], [1, 7]]
    found = [
        models.generate(
            models.make_model(CONFIG, base, hardware=hardware),
            base,
            adapter(),
            prompts,
            max_new_tokens=4,
        )
        for hardware in (LOOP, LAYERS)
    ]
    assert found[0] == found[1]
    assert any(found[0])
