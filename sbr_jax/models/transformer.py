"""The decoder: Flax NNX modules inside, pure functions outside.

``Block`` is one layer. Its parameters are stacked over layers and scanned, so compile
time does not grow with depth. NNX appears only while tracing: the scan builds a block
from one layer's arrays, and nothing of it is left in the compiled program.

Legend: B batch, T tokens, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sbr_jax import _mesh
from sbr_jax.models.config import BIASED, TARGETS, Hardware, ModelConfig
from sbr_jax.models.layers import (
    ACTIVATIONS,
    drop,
    project,
    rms_norm,
    rotate,
    sees,
)
from sbr_jax.models.lora import LoraPair
from sbr_jax.models.parameters import base_shapes, bias_of, is_shape
from sbr_jax.models.parts import (
    attend_as,
    embed_tokens,
    final_norm,
    layer_flags,
    layer_mask,
    layer_rope,
    output_logits,
)
from sbr_jax.models.sharding import entering, gathering, leaving, stream
from sbr_jax.models.tiles import Tiles, attend_tiles, causal_tiles, tile_mask, tiles_of
from sbr_jax.typing import PyTree, UserError

LONG = 128
"""Tokens from which attention on a CPU skips tiles that nobody sees."""

Attention = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Dropout = tuple[jax.Array, float] | None


class Block(nnx.Module):
    """One decoder layer: attention and a gated MLP, each with a residual."""

    def __init__(self, config: ModelConfig):
        self.config = config
        for name, shape in base_shapes(config)["layers"].items():
            setattr(self, name, nnx.Param(jnp.zeros(shape[1:])))

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        adapter: Mapping[str, LoraPair],
        attention: Attention,
        dropout: Dropout = None,
        shift: jax.Array | None = None,
        tap: Callable[[str, jax.Array], None] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Applies the layer.

        Args:
          x: ``[B, T, D]``.
          rope: table of the positions.
          adapter: this layer's pairs, without the layer axis.
          attention: ``(query, key, value) -> (out, extra)``.
          dropout: key and rate for the adapter's inputs, or None.
          shift: ``[B, T, D]`` to add to attention's contribution, or None.
          tap: called while tracing with the name and input of every projection.

        Returns:
          ``[B, T, D]`` and the extra of ``attention``.
        """
        config, norm = self.config, self._norm
        batch, length, _ = x.shape
        linear = functools.partial(
            self._linear, adapter=adapter, dropout=dropout, tap=tap
        )

        def heads(name: str, count: int, y: jax.Array) -> jax.Array:
            y = linear(f"{name}_proj", y)
            y = norm(f"{name}_norm", y) if config.qk_norm_whole else y
            y = y.reshape(batch, length, count, -1)
            return y if config.qk_norm_whole else norm(f"{name}_norm", y)

        y = norm("input_norm", x)
        query, key = heads("q", config.heads, y), heads("k", config.kv_heads, y)
        value = heads("v", config.kv_heads, y)
        out, extra = attention(rotate(query, rope), rotate(key, rope), value)
        attended = linear("o_proj", out.reshape(batch, length, -1))
        attended = self._residual(norm("attention_out_norm", attended))
        x = stream(x + (attended if shift is None else attended + shift))

        y = norm("mlp_norm", x)
        gate = ACTIVATIONS[config.activation](linear("gate_proj", y))
        y = linear("down_proj", gate * linear("up_proj", y))
        return stream(x + self._residual(norm("mlp_out_norm", y))), extra

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        """Applies the norm of this name, if the family has it."""
        weight = getattr(self, name, None)
        if weight is None:
            return x
        return rms_norm(x, weight[...], self.config.norm_eps, self.config.unit_offset)

    def _residual(self, y: jax.Array) -> jax.Array:
        """Scales a layer's contribution to the stream."""
        scale = self.config.residual_multiplier
        return y if scale == 1.0 else y * scale

    def _linear(
        self,
        name: str,
        x: jax.Array,
        *,
        adapter: Mapping[str, LoraPair],
        dropout: Dropout,
        tap: Callable[[str, jax.Array], None] | None,
    ) -> jax.Array:
        """``x W + b + scale · (drop(x) A) B`` for one projection."""
        if tap is not None:
            tap(name, x)
        biased = self.config.qkv_bias and name in BIASED
        bias = getattr(self, bias_of(name))[...] if biased else None
        x = entering(name, x)
        y = project(x, getattr(self, name)[...], bias, gathering(name, x.shape[1]))
        if name not in adapter:
            return leaving(name, y)
        pair = adapter[name]
        if dropout is not None:
            key, rate = dropout
            x = drop(x, jax.random.fold_in(key, TARGETS.index(name)), rate)
        update = (x @ pair.lora_a.astype(x.dtype)) @ pair.lora_b.astype(x.dtype)
        return leaving(name, y + pair.scale * update)


@functools.lru_cache(maxsize=64)
def _block_graph(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config)))[0]


def build_block(config: ModelConfig, weights: Mapping[str, jax.Array]) -> Block:
    """A block around one layer's weights (no layer axis)."""
    return nnx.merge(_block_graph(config), dict(weights))


def scan_layers(
    config: ModelConfig, hardware: Hardware, body: Callable, carry: PyTree, xs: PyTree
) -> tuple[PyTree, PyTree]:
    """``lax.scan`` over the layers with the unrolling of this hardware."""
    unroll = hardware.unroll
    if not unroll:
        # A CPU runs a short program faster without the loop; accelerators do not.
        few = config.layers <= 8 and jax.default_backend() == "cpu"
        unroll = config.layers if few else 1
    return jax.lax.scan(body, carry, xs, unroll=min(unroll, config.layers))


def hidden_states(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: Mapping[str, LoraPair] | None,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    pairs: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    embeddings: jax.Array | None = None,
    attention_shift: jax.Array | None = None,
    capture: bool = False,
) -> Any:
    """States after the final norm at every position: the head's input.

    **Guarantee**: the state at position t depends on ``tokens[:, :t + 1]`` only, so
    right-padding needs no mask; with ``segments``, on those of its own sequence only.

    Args:
      config: the mathematics.
      hardware: how to carry it out.
      base: the frozen weights.
      adapter: ``{name: LoraPair}``, or None.
      tokens: integers ``[B, T]``.
      positions: integers ``[B, T]``, each token's place in its sequence; None for its
        place in the row.
      segments: for rows that hold several sequences: that of each place, integers
        ``[B, M, C]`` in tiles of C; only tokens of the same one see each other.
      pairs: which tiles meet, see :mod:`sbr_jax.models.tiles`.
      dropout_key: a PRNG key; None switches dropout off.
      dropout_rate: probability of zeroing an input of the adapter; a Python float.
      embeddings: ``[B, T, D]`` to use instead of the tokens' embeddings (before a
        family's scale), or None.
      attention_shift: ``[L, B, T, D]`` to add to each layer's attention output (after
        its norm, if it has one).
      capture: also return activations: ``"residual"`` ``[L + 1, B, T, D]``, the
        stream before each layer and after the last, and ``"inputs"``, the input
        ``[L, B, T, ...]`` of every projection by name.

    Returns:
      ``[B, T, D]``; with ``capture`` a tuple of it and the captured dict.

    Raises:
      UserError: if the adapter names a projection that the model does not have.
    """
    adapter = check_adapter(config, adapter)
    columns = jnp.arange(tokens.shape[1])[None]
    pick_rope = layer_rope(config, columns if positions is None else positions)
    keys = None
    if dropout_key is not None and dropout_rate > 0.0:
        keys = jax.random.split(dropout_key, config.layers)
    attend_all = whole_rows(config, hardware, tokens.shape)
    if segments is not None and pairs is not None:
        attend_all = _tiled(config, tiles_of(pairs, segments))

    def body(x, layer):
        weights, pairs, key, shift, flags = layer
        attention = functools.partial(attend_all, flags)
        dropout = None if key is None else (key, dropout_rate)
        block = build_block(config, weights)
        inputs: dict[str, jax.Array] = {}
        tap = inputs.__setitem__ if capture else None
        rope = pick_rope(flags)
        after, _ = block(x, rope, pairs, attention, dropout, shift, tap)
        return after, (x, inputs) if capture else None

    if hardware.remat:
        body = jax.checkpoint(body, prevent_cse=False)
    x = embed_tokens(config, base, tokens, embeddings)
    layers = (base["layers"], adapter, keys, attention_shift, layer_flags(config))
    x, seen = scan_layers(config, hardware, body, x, layers)
    hidden = final_norm(config, base, x)
    if not capture:
        return hidden
    residual = jnp.concatenate([seen[0], x[None]])
    return hidden, {"residual": residual, "inputs": seen[1]}


def whole_rows(
    config: ModelConfig, hardware: Hardware, shape: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, None]]:
    """Attention of rows ``[B, T]`` that are one sequence each.

    Returns:
      ``(flags, query, key, value) -> (out, None)``, flags of ``layer_flags``.
    """
    rows, length = shape
    # Elsewhere kernels skip what is not seen.
    plain = hardware.attention is None and _mesh.current() is None
    if plain and length >= LONG and jax.default_backend() == "cpu":
        return _tiled(config, causal_tiles(rows, length, 64 if length >= 256 else 32))
    columns = jnp.arange(length)[None]
    # Kernels handle causal windows themselves; only a choice of two needs a mask.
    pick = functools.partial(sees, columns, columns)
    pick = layer_mask(config, pick) if config.alternates else lambda flags: None

    def attention(flags, query, key, value):
        mask, kernel = pick(flags), hardware.attention
        return attend_as(config, query, key, value, mask, kernel), None

    return attention


def _tiled(config: ModelConfig, tiles: Tiles) -> Callable[..., tuple[jax.Array, None]]:
    """Attention of rows in tiles."""
    pick = layer_mask(config, functools.partial(tile_mask, tiles))
    how = {"scale": config.attention_scale, "cap": config.attention_cap}

    def attention(flags, query, key, value):
        return attend_tiles(query, key, value, tiles, pick(flags), **how), None

    return attention


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder as a pure function of its weights: states, head and logits.

    **Guarantee**: equal settings are equal and hash alike, so a jitted caller that
    takes one as a static argument does not retrace.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> Transformer(config) == Transformer(config)
    True
    """

    config: ModelConfig
    """The mathematics."""
    hardware: Hardware = Hardware()
    """How it is carried out."""

    def hidden(
        self, base: PyTree, adapter: PyTree | None, tokens: jax.Array, **options: Any
    ) -> Any:
        """:func:`hidden_states` of this model."""
        return hidden_states(
            self.config, self.hardware, base, adapter, tokens, **options
        )

    def head(self, base: PyTree, hidden: jax.Array) -> jax.Array:
        """float32 logits ``[..., V]`` of states ``[..., D]``."""
        return output_logits(self.config, base, hidden)

    def __call__(
        self,
        base: PyTree,
        adapter: PyTree | None,
        tokens: jax.Array,
        *,
        return_hidden: bool = False,
        capture: bool = False,
        **options: Any,
    ) -> Any:
        """Logits of every position of right-padded sequences.

        A caller that needs the logits of some positions only applies the head to those
        states of ``hidden`` (:mod:`sbr_jax.models.answers`): logits are the widest
        array there is.

        Args:
          base: the frozen weights.
          adapter: ``{name: LoraPair}``, or None.
          tokens: integers ``[B, T]``.
          return_hidden: also return the states.
          capture: also return activations, see :func:`hidden_states`.
          **options: of :func:`hidden_states`.

        Returns:
          float32 logits ``[B, T, V]``; with ``return_hidden`` or ``capture`` a tuple of
          the logits, the states ``[B, T, D]`` and the captured dict, in this order.

        Raises:
          UserError: if the adapter names a projection that the model does not have.
        """
        found = self.hidden(base, adapter, tokens, capture=capture, **options)
        hidden = found[0] if capture else found
        out = [self.head(base, hidden)]
        if return_hidden:
            out.append(hidden)
        if capture:
            out.append(found[1])
        return tuple(out) if len(out) > 1 else out[0]


def check_adapter(
    config: ModelConfig, adapter: Mapping[str, LoraPair] | None
) -> dict[str, LoraPair]:
    """The adapter as a dict, checked against the model's shapes."""
    for name, pair in (adapter or {}).items():
        if name not in TARGETS:
            raise UserError(
                f"the adapter has {name!r}; the projections are {', '.join(TARGETS)}"
            )
        fan_in, fan_out = config.projection(name)
        rank = pair.lora_a.shape[-1]
        wanted = (config.layers, rank, fan_out), (config.layers, fan_in, rank)
        found = tuple(pair.lora_b.shape), tuple(pair.lora_a.shape)
        if wanted != found:
            raise UserError(
                f"adapter[{name!r}]: expected lora_b {wanted[0]} and lora_a "
                f"{wanted[1]}, got {found[0]} and {found[1]}; was it made for another "
                "model?"
            )
    return dict(adapter or {})


@functools.lru_cache(maxsize=64)
def make_apply_fn(config: ModelConfig, hardware: Hardware = Hardware()) -> Transformer:
    """The pure ``apply_fn(base, adapter, tokens, ...)`` of a model.

    **Guarantee**: equal settings give the very same object.

    Raises:
      UserError: for an unknown attention kernel.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> make_apply_fn(config) is make_apply_fn(config)
    True
    """
    if hardware.attention not in (None, "xla", "cudnn"):
        raise UserError(
            f"expected attention 'xla', 'cudnn' or None, got {hardware.attention!r}"
        )
    return Transformer(config, hardware)


def init_params(
    key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Random base weights: normal with deviation ``init_scale``, norms 1, biases 0.

    Args:
      key: a PRNG key.
      config: the model's settings.
      dtype: of every weight.

    Returns:
      The tree ``base``, layer weights stacked ``[L, ...]``.

    >>> import jax
    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> init_params(jax.random.key(0), config)["embed"].shape
    (8, 4)
    """
    shapes, structure = jax.tree.flatten_with_path(
        base_shapes(config), is_leaf=is_shape
    )
    leaves = []
    for i, (path, shape) in enumerate(shapes):
        if path[-1].key.endswith("norm"):
            leaves.append(jnp.full(shape, 0.0 if config.unit_offset else 1.0, dtype))
        elif path[-1].key.endswith("bias"):
            leaves.append(jnp.zeros(shape, dtype))
        else:
            noise = jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
            leaves.append(noise * config.init_scale)
    return jax.tree.unflatten(structure, leaves)
