"""Generation with a key-value cache.

Shapes are rounded up to a few sizes, so programs are compiled once per bucket and
serve every base, adapter and prompt. Legend: B batch, P prompt length, N new tokens,
S = P + N cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.models.buckets import bucket
from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.models.layers import sees
from sbr_jax.models.loading import Model
from sbr_jax.models.lora import LoraPair
from sbr_jax.models.parts import (
    attend_as,
    embed_tokens,
    final_norm,
    layer_mask,
    output_logits,
    rope_of,
    sliding_layers,
)
from sbr_jax.models.prefix import Cache
from sbr_jax.models.transformer import build_block, check_adapter, scan_layers
from sbr_jax.typing import PyTree, UserError


def _cached_forward(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: Mapping[str, LoraPair],
    tokens: jax.Array,
    positions: jax.Array,
    pick: Callable[[jax.Array | None], jax.Array],
    cache: Cache,
    offset: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Runs tokens ``[B, T]`` against the cache; logits of the last one ``[B, V]``.

    Keys and values of the tokens go to the slots from ``offset`` on; ``pick`` is that
    of ``layer_mask``.
    """
    # Without a backward pass the rolled loop is as fast and compiles in half the time.
    hardware = dataclasses.replace(hardware, unroll=hardware.unroll or 1)
    rope = rope_of(config, positions)
    zero = jnp.int32(0)
    offset = jnp.asarray(offset, jnp.int32)

    def body(carry, layer):
        x, keys, values = carry
        weights, pairs, i, slides = layer

        def attention(query, key, value):
            start = (i, zero, offset, zero, zero)
            new_keys = jax.lax.dynamic_update_slice(keys, key[None], start)
            new_values = jax.lax.dynamic_update_slice(values, value[None], start)
            # An explicit mask for every query, so cuDNN's rules never apply here.
            mask = pick(slides)
            out = attend_as(config, query, new_keys[i], new_values[i], mask, "xla")
            return out, (new_keys, new_values)

        block = build_block(config, weights)
        x, (keys, values) = block(x, rope, pairs, attention)
        return (x, keys, values), None

    depth = jnp.arange(config.layers, dtype=jnp.int32)
    xs = (base["layers"], adapter, depth, sliding_layers(config))
    carry = (embed_tokens(config, base, tokens), *cache)
    (x, keys, values), _ = scan_layers(config, hardware, body, carry, xs)
    hidden = final_norm(config, base, x[:, -1:])
    return output_logits(config, base, hidden)[:, 0], (keys, values)


def _pick(
    logits: jax.Array, keys: jax.Array | None, step: jax.Array, temperature: jax.Array
) -> jax.Array:
    """The next token of each row: the most likely one, or a draw."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / temperature)
    return drawn.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "hardware", "slots"))
def _generate(
    config: ModelConfig,
    hardware: Hardware,
    slots: int,
    base: PyTree,
    adapter: PyTree,
    tokens: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    keys: jax.Array | None,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continues one batch until every row has stopped.

    ``tokens [B, P]`` is left-padded; a row of length 0 is filling and starts finished.
    Returns the new tokens ``[B, slots]``, how many of them count ``[B]``, and whether
    the logits of all could be compared ``[B]``.
    """
    adapter = check_adapter(config, adapter)
    rows, prompt = tokens.shape
    shape = (config.layers, rows, prompt + slots, config.kv_heads, config.head_dim)
    empty = jnp.zeros(shape, base["embed"].dtype)
    cache = empty, empty
    eos = jnp.asarray(config.eos, jnp.int32)
    first = prompt - lengths  # first real slot of each row

    def allowed(queries: jax.Array) -> Callable[[jax.Array | None], jax.Array]:
        """The masks ``[B, 1, T, S]`` for queries at the slots ``[T]``."""
        slot = jnp.arange(prompt + slots)[None]
        real = (slot >= first[:, None])[:, None, None]
        # A padding query sees itself, so that its softmax is not over nothing.
        own = (slot == queries[:, None])[None, None]
        near = functools.partial(sees, queries[None], slot)
        return layer_mask(config, lambda window: (near(window) & real) | own)

    def is_eos(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == eos[None], axis=-1)

    run = functools.partial(_cached_forward, config, hardware, base, adapter)
    queries = jnp.arange(prompt)
    positions = jnp.maximum(queries[None] - first[:, None], 0)
    logits, cache = run(tokens, positions, allowed(queries), cache, 0)
    state = {
        "step": jnp.int32(0),
        "cache": cache,
        "logits": logits,
        "finished": lengths == 0,
        "told": jnp.ones((rows,), bool),
        "count": jnp.zeros((rows,), jnp.int32),
        "new": jnp.zeros((rows, slots), jnp.int32),
    }

    def going(state: dict[str, Any]) -> jax.Array:
        return (state["step"] < limit) & ~jnp.all(state["finished"])

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        step = state["step"]
        token = _pick(state["logits"], keys, step, temperature)
        finished = state["finished"] | is_eos(token)
        new = jax.lax.dynamic_update_slice(
            state["new"], token[:, None], (jnp.int32(0), step)
        )
        query = (prompt + step)[None]
        logits, cache = run(
            token[:, None],
            query[None] - first[:, None],
            allowed(query),
            state["cache"],
            prompt + step,
        )
        return {
            "step": step + 1,
            "cache": cache,
            "logits": logits,
            "finished": finished,
            "told": state["told"] & (state["finished"] | comparable(state["logits"])),
            "count": state["count"] + (~finished).astype(jnp.int32),
            "new": new,
        }

    state = jax.lax.while_loop(going, advance, state)
    return state["new"], state["count"], state["told"]


def generate(
    model: Model,
    base: PyTree,
    adapter: PyTree | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    batch_size: int = 256,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """Continues prompts until a stop token or the limit.

    Stop tokens are the configuration's, the tokenizer's EOS token, and ``stops``.

    **Guarantee**: a row does not depend on the others in its batch nor on padding: a
    greedy answer equals the one obtained alone, and a sampled answer depends only on
    the key, its place in ``prompts`` and its prompt (up to float rounding between
    shapes). Nothing is compiled again for another base or adapter.

    Args:
      model: the record.
      base: weights to use, usually ``model.params``.
      adapter: ``{name: LoraPair}`` or None.
      prompts: token ids, at least one each.
      max_new_tokens: the limit N.
      temperature: 0 is greedy; otherwise logits are divided by it.
      key: a PRNG key, needed to sample.
      batch_size: the most rows in one run.
      stops: further tokens to stop at, such as those that a chat template ends a turn
        with (``data.stop_tokens``).

    Returns:
      The new tokens of each prompt, in order, cut before the stop token.

    Raises:
      UserError: for an empty prompt, one too long for the model, sampling without a
        key, or logits that are no numbers.
    """
    config = _stopping(model, stops)
    _check_prompts(config, prompts, max_new_tokens)
    if temperature < 0 or (temperature > 0 and key is None):
        raise UserError(
            f"expected temperature 0, or above 0 with a key; got {temperature} and "
            f"key={key!r}"
        )
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    # Neighbours in length share a batch; the answers return to the given order.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    told = np.ones(len(prompts), bool)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = min(bucket(len(chosen), 1), batch_size)
        tokens, lengths = _left_pad([prompts[i] for i in chosen], rows)
        keys = None
        if temperature > 0 and key is not None:
            places = np.zeros(rows, np.uint32)
            places[: len(chosen)] = chosen
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        new, count, sure = _generate(
            config,
            model.hardware,
            bucket(max_new_tokens),
            base,
            adapter,
            tokens,
            lengths,
            np.int32(max_new_tokens),
            keys,
            np.float32(temperature),
        )
        new, count = np.asarray(new), np.asarray(count)
        told[chosen] = np.asarray(sure)[: len(chosen)]
        for row, i in enumerate(chosen):
            answers[i] = new[row, : count[row]].tolist()
    require_comparable("generate", told)
    return answers


def _stopping(model: Model, stops: Sequence[int]) -> ModelConfig:
    """The configuration with every token that ends an answer."""
    own = getattr(model.tokenizer, "eos_token_id", None)
    more = [*([] if own is None else [own]), *stops]
    eos = tuple(dict.fromkeys([*model.config.eos, *more]))
    if eos == model.config.eos:
        return model.config
    return dataclasses.replace(model.config, eos=eos)


def _check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 0:
        raise UserError(f"expected max_new_tokens of at least 0, got {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompts[{i}] is empty; give at least the BOS token")
        if len(prompt) + max_new_tokens > config.context:
            raise UserError(
                f"prompts[{i}] has {len(prompt)} tokens; with {max_new_tokens} new "
                f"ones that exceeds the model's context of {config.context}"
            )


def _left_pad(
    prompts: Sequence[Sequence[int]], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((rows, bucket(longest)), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, tokens.shape[1] - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
