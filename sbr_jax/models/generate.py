"""Generation with a key-value cache.

Shapes are rounded up to a few sizes, so a program is compiled once per bucket and
serves every base, adapter and prompt. Legend: B batch, P prompt length, N new tokens,
S = P + N cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh
from sbr_jax.distributed import arrays
from sbr_jax.models.buckets import bucket, neighbours
from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.decoding import next_logits, open_cache, split_cache
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.models.layers import sees
from sbr_jax.models.loading import Model
from sbr_jax.models.parts import layer_mask, output_logits
from sbr_jax.models.prefix import Cache, extend
from sbr_jax.models.transformer import check_adapter
from sbr_jax.progress import task
from sbr_jax.typing import PyTree, UserError

READ_AT_ONCE = 4096
"""Prompt tokens, padding included, that the model reads at once."""

SAVING = 512
"""Tokens of padding that reading prompts apart from longer ones must save."""


def _pick(
    logits: jax.Array, keys: jax.Array | None, step: jax.Array, temperature: jax.Array
) -> jax.Array:
    """The next token of each row: the most likely one, or a sample."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / temperature)
    return drawn.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "hardware"))
def read_prompts(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: PyTree,
    tokens: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits ``[B, V]`` after prompts ``[B, P]``, and their keys and values."""
    states, cache = extend(config, hardware, base, adapter, tokens)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(states, last, axis=1)[:, 0]
    logits = output_logits(config, base, hidden, next_only=True)
    return logits, split_cache(cache)


@functools.partial(jax.jit, static_argnames=("rows", "width"))
def _together(
    rows: int,
    width: int,
    parts: Sequence[tuple[jax.Array, Cache]],
    owners: Sequence[jax.Array],
) -> tuple[jax.Array, Cache]:
    """Joins parts into one batch of ``rows``; owner ``rows`` marks filling."""

    def joined(pieces: Sequence[jax.Array], like: tuple[int, ...]) -> jax.Array:
        whole = jnp.zeros(like, pieces[0].dtype)
        for piece, own in zip(pieces, owners, strict=True):
            whole = whole.at[:, own, : piece.shape[2]].set(piece, mode="drop")
        return whole

    # Like keys and values, logits get one axis before the rows and one after.
    logits = [found[None, :, None] for found, _ in parts]
    caches = [[cache[i] for _, cache in parts] for i in range(2)]
    layers, _, _, *heads = caches[0][0].shape
    keys, values = (joined(x, (layers, rows, width, *heads)) for x in caches)
    cache = split_cache((keys, values))
    return joined(logits, (1, rows, 1, logits[0].shape[-1]))[0, :, 0], cache


@functools.partial(jax.jit, static_argnames=("config", "hardware", "slots"))
def write_answers(
    config: ModelConfig,
    hardware: Hardware,
    slots: int,
    base: PyTree,
    adapter: PyTree,
    logits: jax.Array,
    cache: Cache,
    lengths: jax.Array,
    limit: jax.Array,
    keys: jax.Array | None,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continues prompts that have been read, until every row has stopped."""
    adapter = check_adapter(config, adapter)
    rows, width = lengths.shape[0], cache[0].shape[2]
    eos = jnp.asarray(config.eos, jnp.int32)
    slot = jnp.arange(width + slots, dtype=jnp.int32)[None]
    known, new = jnp.broadcast_to(slot, (rows, width + slots)), slot - width
    # A slot that does not count is placed in the future of every query.
    known = jnp.where(known < lengths[:, None], known, jnp.iinfo(jnp.int32).max // 2)
    places = jnp.where(slot < width, known, lengths[:, None] + new)

    def take(state: dict[str, Any], logits: jax.Array) -> dict[str, Any]:
        step, before = state["step"], state["finished"]
        token = _pick(logits, keys, step, temperature)
        finished = before | jnp.any(token[:, None] == eos[None], axis=-1)
        start = (jnp.int32(0), step)
        return {
            "step": step + 1,
            "cache": state["cache"],
            "token": token,
            "finished": finished,
            "told": state["told"] & (before | comparable(logits)),
            "count": state["count"] + (~finished).astype(jnp.int32),
            "new": jax.lax.dynamic_update_slice(state["new"], token[:, None], start),
        }

    def going(state: dict[str, Any]) -> jax.Array:
        return (state["step"] < limit) & ~jnp.all(state["finished"])

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        done = state["step"] - 1
        query = (lengths + done)[:, None]
        near = functools.partial(sees, query, places)
        logits, cache = next_logits(
            config,
            hardware,
            base,
            adapter,
            state["token"],
            query[:, 0],
            layer_mask(config, near),
            state["cache"],
            width + done,
        )
        return take({**state, "cache": cache}, logits)

    state = {
        "step": jnp.int32(0),
        "cache": open_cache(hardware, base, cache, slots),
        "finished": lengths == 0,
        "told": jnp.ones((rows,), bool),
        "count": jnp.zeros((rows,), jnp.int32),
        "new": jnp.zeros((rows, slots), jnp.int32),
    }
    state = jax.lax.while_loop(going, advance, take(state, logits))
    return state["new"], state["count"], state["told"]


def _generate(
    config: ModelConfig,
    hardware: Hardware,
    slots: int,
    base: PyTree,
    adapter: PyTree,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *rest: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continues one batch until every row has stopped.

    ``tokens [B, P]`` is right-padded; a row of length 0 is filling and starts finished.
    Prompts are read a few at a time, grouped by length, because reading costs as much
    as it has tokens. All are continued together, because a step of writing costs hardly
    more for many rows than for one.

    Returns:
      The new tokens ``[B, slots]``, how many of them count ``[B]``, and whether all
      logits of a row could be compared ``[B]``.
    """
    # Without a backward pass the rolled loop is as fast and compiles in half the time.
    rolled = dataclasses.replace(hardware, unroll=hardware.unroll or 1)
    rows, width = tokens.shape
    parts, owners = [], []
    for size, group in neighbours(lengths[lengths > 0], most=width, saving=SAVING):
        few = max(READ_AT_ONCE // size, 1)
        count = math.ceil(len(group) / math.ceil(len(group) / few))
        for start in range(0, len(group), count):
            own = group[start : start + count]
            filling = (0, min(bucket(count, 1), max(few, count), rows) - len(own))
            given = np.pad(tokens[own, :size], (filling, (0, 0)))
            ends = np.pad(lengths[own], filling)
            parts.append(read_prompts(config, rolled, base, adapter, given, ends))
            owners.append(np.pad(own, filling, constant_values=rows))
    known = parts[0]
    if len(parts) > 1 or len(owners[0]) != rows:
        known = _together(rows, width, parts, owners)
    return write_answers(config, hardware, slots, base, adapter, *known, lengths, *rest)


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
    batch_tokens: int = 16_384,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """Continues prompts until a stop token or the limit.

    Stop tokens are the configuration's, the tokenizer's EOS token, and ``stops``.

    **Guarantee**: a row depends neither on the other rows of its batch nor on padding.
    A greedy answer equals the one obtained alone; a sampled answer depends only on the
    key, its place in ``prompts`` and its prompt (up to float rounding between shapes).
    Nothing is compiled again for another base or adapter.

    Args:
      model: the loaded model.
      base: weights to use, usually ``model.params``.
      adapter: ``{name: LoraPair}`` or None.
      prompts: token ids, at least one for each prompt.
      max_new_tokens: the limit N.
      temperature: 0 is greedy; otherwise logits are divided by it.
      key: a PRNG key, needed to sample.
      batch_size: the most rows in one run.
      batch_tokens: the most tokens whose keys and values are held at once, including
        padding and room for new tokens; a longer prompt runs alone.
      stops: further tokens to stop at, such as those that end a turn in the chat
        template (``data.stop_tokens``).

    Returns:
      The new tokens of each prompt, in order, cut before the stop token.

    Raises:
      UserError: for an empty prompt, one too long for the model, sampling without a
        key, or logits that are not finite.
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
    # Prompts of similar length share a batch; answers return in the given order.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    told = np.ones(len(prompts), bool)
    slots = bucket(max_new_tokens)
    lengths = [len(prompts[i]) for i in order]
    runs = _batches(lengths, slots, batch_size, batch_tokens)
    with task("answers", len(order)) as done, _mesh.using(_mesh.holding(base)):
        for start, stop in runs:
            chosen = order[start:stop]
            rows = min(bucket(len(chosen), 1), batch_size)
            tokens, sizes = _right_pad([prompts[i] for i in chosen], rows)
            keys = None
            if temperature > 0 and key is not None:
                places = np.zeros(rows, np.uint32)
                places[: len(chosen)] = chosen
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
            written = _generate(
                config,
                model.hardware,
                slots,
                base,
                adapter,
                tokens,
                sizes,
                np.int32(max_new_tokens),
                keys,
                np.float32(temperature),
            )
            new, count, sure = arrays.fetch(written)
            told[chosen] = sure[: len(chosen)]
            for row, i in enumerate(chosen):
                answers[i] = new[row, : count[row]].tolist()
            done(stop)
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


def _batches(
    lengths: Sequence[int], slots: int, rows: int, tokens: int
) -> Iterator[tuple[int, int]]:
    """Ranges ``start, stop`` of sorted lengths that respect both limits.

    >>> list(_batches([3, 5, 30, 90, 90], 8, 4, 120))
    [(0, 3), (3, 4), (4, 5)]
    """
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < min(len(lengths), start + rows):
            count = min(bucket(stop + 1 - start, 1), rows)
            if count * (bucket(lengths[stop]) + slots) > tokens:
                break
            stop += 1
        yield start, stop
        start = stop


def _right_pad(
    prompts: Sequence[Sequence[int]], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((rows, bucket(longest)), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
