"""A toy of two layers that compiles in a moment, and the real decoder, tiny."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from trees import jitter, vector

from sbr_jax import losses, models
from sbr_jax.methods.booster import booster_gradient

KEY = jax.random.key(0)
# As many examples as a batch holds: every batch is the whole set, and a twin need not
# know its order.
SAFE, HARMFUL, TASK = (
    tiny.dataset(seed, 8, shift) for seed, shift in ((1, 0), (4, 7), (10, 1))
)


def toy(base, adapter, tokens, *, attention_shift=None, dropout_key=None, **options):
    """Two residual layers that see one token each."""
    del dropout_key, options
    x, pair = base["embed"][tokens], adapter["q_proj"]
    for layer, weight in enumerate(base["layers"]["q_proj"]):
        x = x + x @ weight
        x = x + pair.scale * (x @ pair.lora_a[layer]) @ pair.lora_b[layer]
        x = jnp.tanh(x if attention_shift is None else x + attention_shift[layer])
    return x @ base["embed"].T


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (32, 16), "q_proj": (2, 16, 16), "up_proj": (2, 16, 4)}
    drawn = {
        k: jnp.asarray(rng.normal(0, 0.5, s), jnp.float32) for k, s in shapes.items()
    }
    return {"embed": drawn.pop("embed"), "layers": drawn}


BASE = weights()
ADAPTER = models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0, targets="q_proj")
PROBLEM = tiny.problem(
    apply_fn=toy, steps_per_domain=3, batch_size=8, calibration=SAFE, harmful=HARMFUL
)


def arrays(data):
    return {"tokens": jnp.asarray(data.tokens), "mask": jnp.asarray(data.mask)}


def moved(seed=0, adapter=ADAPTER):
    """An adapter somewhere else than at B = 0, where half of a gradient vanishes."""
    return jitter(adapter, seed, 0.2)


def like(tree, flat):
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(np.split(flat, ends), leaves, strict=True)
    return jax.tree.unflatten(
        structure, [jnp.asarray(p.reshape(x.shape), x.dtype) for p, x in parts]
    )


def loss_of(apply_fn, base, adapter, data, **options):
    logits = apply_fn(base, adapter, data["tokens"], **options)
    return jnp.mean(losses.token_cross_entropy(logits, data["tokens"], data["mask"]))


toy_loss = jax.jit(jax.value_and_grad(functools.partial(loss_of, toy), argnums=1))


def toy_gradient(adapter, data, base=BASE):
    return vector(toy_loss(base, adapter, arrays(data))[1])


WIDE = models.init_adapter(KEY, tiny.CONFIG, rank=2, alpha=4.0)


# --- Booster's rule -------------------------------------------------------------------


@jax.jit
def boosted(adapter, safe, harmful, regulariser, inner_rate):
    return booster_gradient(
        PROBLEM,
        BASE,
        adapter,
        safe,
        harmful,
        KEY,
        regulariser=regulariser,
        inner_rate=inner_rate,
    )
