"""Settings of a decoder: its mathematics and its execution.

Reading and writing Hugging Face's ``config.json`` is in ``hf_config``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from sbr_jax.models.fields import Field, wrong_fields
from sbr_jax.typing import UserError

TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The projections of a layer, in the order in which they are applied."""

BIASED = ("q_proj", "k_proj", "v_proj")
"""The projections that have a bias where ``qkv_bias`` is set."""

AttentionKernel = Literal["xla", "cudnn"]
"""The implementations of ``jax.nn.dot_product_attention``."""

ROPE_KINDS = ("linear", "llama3", "yarn", "longrope")
"""Ways of stretching RoPE's frequencies."""

_TOKENS = 2**31 - 1
_MANY = Field(int, 1, 2**24)
ROPE_FIELDS = {
    "factor": Field(float, 1, 1e6),
    "low": Field(float, 1e-6, 1e6),
    "high": Field(float, 1e-6, 1e6),
    "original": Field(int, 1, _TOKENS),
    "attention": Field(float, 1e-3, 1e3),
    "short": Field(float, 1e-6, 1e6, lists="only"),
    "long": Field(float, 1e-6, 1e6, lists="only"),
}
"""Ranges of the numeric fields of ``RopeScaling``."""
FIELDS = {
    "vocab_size": _MANY,
    "width": _MANY,
    "mlp_width": _MANY,
    "layers": Field(int, 1, 10_000),
    "heads": Field(int, 1, 2**16),
    "kv_heads": Field(int, 0, 2**16),
    "head_dim": Field(int, 0, 2**16),
    "rope_theta": Field(float, 1, 1e12),
    "norm_eps": Field(float, 0, 1),
    "tied": Field(bool),
    "context": Field(int, 1, _TOKENS),
    "init_scale": Field(float, 0, 1e3),
    "bos": Field(int, 0, _TOKENS, none=True),
    "eos": Field(int, 0, _TOKENS, lists="only"),
    # The first Llama files say -1 for none.
    "pad": Field(int, -1, _TOKENS, none=True),
    "window": Field(int, 1, _TOKENS, none=True),
    "query_scalar": Field(float, 1e-6, 1e6, none=True),
    "attention_cap": Field(float, 1e-6, 1e6, none=True),
    "logit_cap": Field(float, 1e-6, 1e6, none=True),
    "local_rope_theta": Field(float, 1, 1e12, none=True),
    "embedding_multiplier": Field(float, 1e-6, 1e6),
    "residual_multiplier": Field(float, 1e-6, 1e6),
    "attention_multiplier": Field(float, 1e-6, 1e6, none=True),
    "logit_divisor": Field(float, 1e-6, 1e6),
}
"""Types and ranges of the fields of ``ModelConfig``."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched over a longer context.

    ``"linear"`` divides every frequency f by ``factor``. ``"llama3"`` keeps those that
    turn more than ``high`` times within the original context, divides those that turn
    less than ``low`` times, and blends between: with s = (turns - low) / (high - low),
    ``f · (s + (1 - s) / factor)``. ``"yarn"`` does the same with an s that is linear in
    the index of a frequency. ``"longrope"`` divides each frequency by its own entry of
    ``short``. It is defined up to ``original`` tokens: beyond, such a model has other
    keys at every place.

    References:
      YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192
    """The context before stretching, in tokens."""
    attention: float = 1.0
    """Factor of cosines and sines (yarn, longrope)."""
    short: tuple[float, ...] = ()
    """Divisor of each frequency, H / 2 in all (longrope)."""
    long: tuple[float, ...] = ()
    """The divisors beyond ``original`` tokens: unused, kept for saving (longrope)."""

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise UserError(
                f"expected RoPE scaling {', '.join(map(repr, ROPE_KINDS))}, got "
                f"{self.kind!r}"
            )
        if wrong := wrong_fields(vars(self), ROPE_FIELDS):
            raise UserError(f"wrong RoPE scaling: {'; '.join(wrong)}")
        if self.low >= self.high:
            raise UserError(f"expected RoPE scaling with low < high, got {self}")
        for name in ("short", "long"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The mathematics of one decoder, hashable so that it can be a static argument.

    >>> config = ModelConfig(vocab_size=32, width=8, mlp_width=16, layers=2, heads=2)
    >>> config.kv_heads, config.head_dim, config.projection("down_proj")
    (2, 4, (16, 8))
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int = 0
    """Key and value heads; 0 means as many as ``heads``."""
    head_dim: int = 0
    """Entries of one head; 0 means ``width // heads``."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    """Whether the embedding also serves as the output head."""
    context: int = 2048
    """Longest sequence the model was made for, in tokens."""
    init_scale: float = 0.02
    bos: int | None = None
    eos: tuple[int, ...] = ()
    """Every token that ends an answer."""
    pad: int | None = None
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    """RoPE's base in sliding layers, which are not stretched; None: as elsewhere."""
    rope_layers: tuple[bool, ...] = ()
    """True for the layers that rotate queries and keys; empty means all."""
    window: int | None = None
    """Tokens that a sliding layer sees, itself included; None: no layer slides."""
    sliding: tuple[bool, ...] = ()
    """True for the layers that slide; empty means all where there is a window."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised before RoPE."""
    qk_norm_whole: bool = False
    """Whether that norm is over all heads together."""
    activation: str = "silu"
    """The activation of the MLP's gate: ``"silu"`` or ``"gelu_tanh"``."""
    unit_offset: bool = False
    """Whether norms multiply by 1 + w instead of w."""
    pre_norms: bool = True
    """Whether the inputs of attention and MLP are normalised."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP are normalised."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by √width."""
    query_scalar: float | None = None
    """Scores are divided by its root; None means ``head_dim``."""
    attention_cap: float | None = None
    """c of ``c · tanh(score / c)``, or None."""
    logit_cap: float | None = None
    """The same cap for the output logits."""
    embedding_multiplier: float = 1.0
    """Factor of the embeddings."""
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the stream."""
    attention_multiplier: float | None = None
    """Factor of the scores; None: ``query_scalar`` sets it."""
    logit_divisor: float = 1.0
    """The output logits are divided by this."""

    def __post_init__(self):
        if wrong := wrong_fields(vars(self), FIELDS):
            raise UserError(f"wrong model settings: {'; '.join(wrong)}")
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.width % self.heads:
                raise UserError(
                    f"expected a width divisible by heads={self.heads}, got "
                    f"{self.width}; set head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(
                f"expected heads divisible by kv_heads, got {self.heads} heads and "
                f"{self.kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise UserError(f"expected an even head_dim for RoPE, got {self.head_dim}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise UserError(
                f"expected activation 'silu' or 'gelu_tanh', got {self.activation!r}"
            )
        self._settle_windows()
        self._settle_rope()

    def _settle_windows(self) -> None:
        """Gives each pattern one spelling, so that equal mathematics compare equal."""
        sliding = tuple(map(bool, self.sliding))
        if self.window is not None and not sliding:
            sliding = (True,) * self.layers
        if sliding and len(sliding) != self.layers:
            raise UserError(
                f"expected sliding to have one entry for each of {self.layers} layers, "
                f"got {len(sliding)}"
            )
        if any(sliding) and self.window is None:
            raise UserError("expected a window for the sliding layers, got None")
        if not any(sliding):
            object.__setattr__(self, "window", None)
            sliding = ()
        object.__setattr__(self, "sliding", sliding)

    def _settle_rope(self) -> None:
        """The same for RoPE, and checks its divisors against the size of a head."""
        turns = tuple(map(bool, self.rope_layers))
        if turns and len(turns) != self.layers:
            raise UserError(
                f"expected rope_layers to have one entry for each of {self.layers} "
                f"layers, got {len(turns)}"
            )
        object.__setattr__(self, "rope_layers", () if all(turns) else turns)
        alike = self.local_rope_theta == self.rope_theta and self.rope_scaling is None
        if alike or not self.sliding:
            object.__setattr__(self, "local_rope_theta", None)
        scaling, half = self.rope_scaling, self.head_dim // 2
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise UserError(
                f"expected rope_theta above 1 for yarn, got {self.rope_theta}"
            )
        if scaling is not None and scaling.kind == "longrope":
            counts = len(scaling.short), len(scaling.long)
            if counts != (half, half):
                raise UserError(
                    f"expected {half} short and long factors of RoPE for heads of "
                    f"{self.head_dim}, got {counts[0]} and {counts[1]}"
                )

    @property
    def alternates(self) -> bool:
        """True if some layers slide and others see everything."""
        return any(self.sliding) and not all(self.sliding)

    @property
    def attention_scale(self) -> float | None:
        """Factor of the scores; None means ``head_dim ** -0.5``."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return None if self.query_scalar is None else self.query_scalar**-0.5

    def projection(self, target: str) -> tuple[int, int]:
        """Shape ``(in, out)`` of one projection, without the layer axis."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.width, queries),
            "k_proj": (self.width, keys),
            "v_proj": (self.width, keys),
            "o_proj": (queries, self.width),
            "gate_proj": (self.width, self.mlp_width),
            "up_proj": (self.width, self.mlp_width),
            "down_proj": (self.mlp_width, self.width),
        }[target]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Settings of the execution, none of which changes a result."""

    remat: bool = False
    """Recompute each layer in the backward pass instead of storing it."""
    unroll: int = 0
    """Layers unrolled in one step of the scan; 0 lets the backend decide."""
    attention: AttentionKernel | None = None
    """``"xla"``, ``"cudnn"``, or None, which leaves the choice to JAX."""
