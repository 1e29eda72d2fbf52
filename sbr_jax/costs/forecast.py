"""Forecasts memory and time of fine-tuning from sizes: pure functions, no arrays.

Matrix products are counted exactly, as a compiler counts them (2 FLOPs for a
multiplication and addition, attention over all T x T pairs); elementwise work is left
out. Memory is that of the arrays that must be alive at once: a lower bound, since a
compiler may keep more.

Symbols: B sequences, T tokens of a sequence, L layers, D width, V vocabulary, P
parameters of an adapter, N examples, K columns of a subspace.
"""

import dataclasses
import math

from sbr_jax.methods.base import Cost, Method
from sbr_jax.models.config import TARGETS, ModelConfig
from sbr_jax.models.lora import select_targets
from sbr_jax.models.parameters import base_shapes
from sbr_jax.models.quantize import weight_bytes
from sbr_jax.subspace import sketch
from sbr_jax.training.recompute import activation_bytes

GIB = 2**30
FLOAT32 = 4
BYTES = {"bfloat16": 2, "float32": 4}
LOGIT_COPIES = 3
"""Copies in float32: logits, their logarithm and their gradient."""
CHUNK = 2**28
"""Bytes of logits that the head computes at once on an accelerator."""


@dataclasses.dataclass(frozen=True)
class Load:
    """The model and training, as far as they affect the cost.

    Attributes:
        config: the model's settings.
        dtype: of the frozen weights and the activations.
        quantize: of the frozen projections: a kind of `models.quantize`, or None.
        rank: of the adapter.
        targets: regular expression of the adapted projections.
        batch: examples of a step.
        accumulation: microbatches of a step.
        length: T, tokens of the longest training example.
        tokens: mean tokens of an example, including what a layout adds; None for T.
        answers: places of an example whose logits are needed; None for all.
        remat: whether layers are recomputed in the backward pass.
        keys: places that attention computes for a token of a packed row, in tiles of
            which nothing is kept; None for T.
    """

    config: ModelConfig
    dtype: str = "bfloat16"
    quantize: str | None = None
    rank: int = 16
    targets: str = r"(q|k|v|o)_proj"
    batch: int = 16
    accumulation: int = 1
    length: int = 512
    remat: bool = True
    tokens: float | None = None
    answers: float | None = None
    keys: float | None = None

    @property
    def width(self) -> float:
        """Tokens computed for an example."""
        return self.length if self.tokens is None else self.tokens

    @property
    def places(self) -> float:
        """Places of an example whose logits are computed."""
        return self.width if self.answers is None else self.answers

    @property
    def microbatch(self) -> int:
        """Examples that are in memory at once."""
        return self.batch // self.accumulation


# --- parameters -----------------------------------------------------------------------


def parameter_count(config: ModelConfig) -> int:
    """Number of all frozen weights.

    >>> parameter_count(ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2,
    ...     heads=2))
    372
    """
    shapes = base_shapes(config)
    layers = shapes.pop("layers").values()
    return sum(map(math.prod, (*shapes.values(), *layers)))


def adapter_parameters(config: ModelConfig, rank: int, targets: str) -> int:
    """P, parameters of an adapter: r (in + out) for every adapted projection."""
    sizes = (sum(config.projection(name)) for name in select_targets(targets))
    return config.layers * rank * sum(sizes)


# --- FLOPs ----------------------------------------------------------------------------


def _layer_flops(load: Load, tokens: float, keys: float) -> tuple[float, float, float]:
    """FLOPs of one sequence in one layer: projections, attention, adapter."""
    config = load.config
    weights = sum(math.prod(config.projection(name)) for name in TARGETS)
    adapter = sum(sum(config.projection(name)) for name in select_targets(load.targets))
    attention = 4 * tokens * keys * config.heads * config.head_dim
    return 2 * tokens * weights, attention, 2 * tokens * load.rank * adapter


def forward_flops(
    load: Load, tokens: float, *, keys: float | None = None, heads: float | None = None
) -> float:
    """FLOPs of one sequence's forward pass.

    Each token attends to ``keys`` positions, and ``heads`` positions have logits; None
    for all.
    """
    layer = sum(_layer_flops(load, tokens, tokens if keys is None else keys))
    table = 2 * load.config.width * load.config.vocab_size
    return load.config.layers * layer + (tokens if heads is None else heads) * table


def train_flops(
    load: Load, tokens: float, *, keys: float | None = None, heads: float | None = None
) -> float:
    """FLOPs of one sequence's forward and backward pass, with the base frozen.

    The backward pass of a frozen weight is one product (the input's gradient); that of
    an adapter or of attention is two. A recomputed layer skips its last product, whose
    result only a later norm would need. The head is never recomputed. Arguments are
    those of :func:`forward_flops`.
    """
    weights, attention, adapter = _layer_flops(
        load, tokens, tokens if keys is None else keys
    )
    heads = tokens if heads is None else heads
    table = 2 * heads * load.config.width * load.config.vocab_size
    layer = 2 * weights + 3 * attention + 3 * adapter
    again = 0.0
    if load.remat:
        again = weights + attention + adapter
        if not load.config.post_norms:
            again -= 2 * tokens * math.prod(load.config.projection("down_proj"))
    return load.config.layers * (layer + again) + 2 * table


# --- memory ---------------------------------------------------------------------------


def adapter_bytes(load: Load) -> int:
    """Bytes of one adapter in float32."""
    return FLOAT32 * adapter_parameters(load.config, load.rank, load.targets)


def cache_bytes(load: Load, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens."""
    config = load.config
    entries = 2 * config.layers * config.kv_heads * config.head_dim
    return tokens * entries * BYTES[load.dtype]


def _logit_bytes(load: Load, places: float) -> float:
    """Bytes of the chunk of logits that the head computes at once."""
    whole = places * load.config.vocab_size * FLOAT32
    return LOGIT_COPIES * min(whole, CHUNK)


def _inside_layer(load: Load) -> float:
    """Bytes of activations for one layer's backward pass of one microbatch."""
    tokens = load.microbatch * load.width
    kept = load.length if load.keys is None else 0
    return activation_bytes(load.config, tokens, kept, BYTES[load.dtype])


def training_memory(load: Load) -> dict[str, float]:
    """Bytes by part of one step, without the frozen weights."""
    config, tokens = load.config, load.microbatch * load.width
    stream = config.layers * tokens * config.width * BYTES[load.dtype]
    layers = 1 if load.remat else config.layers
    return {
        "adapter and its gradient": 2 * adapter_bytes(load),
        "AdamW's moments": 2 * adapter_bytes(load),
        "residual stream": stream,
        "activations inside layers": layers * _inside_layer(load),
        "logits": _logit_bytes(load, load.microbatch * load.places),
    }


def subspace_bytes(load: Load, columns: int) -> int:
    """Bytes of a basis of K columns per unit and layer, in state and optimizer."""
    return 2 * columns * adapter_bytes(load)


def fisher_memory(
    load: Load, examples: int, columns: int, sizes: sketch.Plan
) -> dict[str, float]:
    """Bytes of a Fisher estimate's own arrays: rows, a microbatch, and the basis."""
    one = dataclasses.replace(load, batch=sizes.microbatch, accumulation=1)
    rows = min(examples, sizes.rows) + sizes.microbatch
    return {
        "per-example gradients": rows * adapter_bytes(load),
        "new basis": columns * adapter_bytes(load),
        "activations": _inside_layer(one)
        + _logit_bytes(load, sizes.microbatch * load.places),
    }


# --- time -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """The figures that a device reaches in practice.

    Attributes:
        name: to be printed.
        memory: bytes, or None if unknown.
        flops: FLOPs a second, of matrix products.
        bandwidth: bytes a second.
        count: devices that share the work equally, as if communication took no time.
    """

    name: str
    memory: float | None
    flops: float
    bandwidth: float
    count: int = 1


A100 = Device("A100 (80 GB) at 40 % of its peak", 80e9, 125e12, 1.2e12)
"""Assumed if nothing is known."""


def generation_seconds(
    load: Load, device: Device, prompts: int, tokens: int, new: int, rows: int
) -> float:
    """Seconds of answers: a pass over the prompts, then a token of all rows at a time.

    A token takes as long as its products or as reading weights and cache, whichever is
    longer. A prompt has ``tokens``, an answer ``new``; ``rows`` are written at once.
    """
    flops, bandwidth = device.flops * device.count, device.bandwidth * device.count
    reading = prompts * forward_flops(load, tokens, heads=1) / flops
    size = weight_bytes(load.config, load.dtype, load.quantize)
    size += cache_bytes(load, rows * (tokens + new))
    products = rows * forward_flops(load, 1, keys=tokens + new)
    step = max(products / flops, size / bandwidth)
    return reading + math.ceil(prompts / rows) * new * step


# --- defences -------------------------------------------------------------------------


def step_flops(load: Load, cost: Cost) -> float:
    """FLOPs of one optimizer step of a defence."""
    keys = load.length if load.keys is None else load.keys
    size = {"keys": keys, "heads": load.places}
    one = forward_flops(load, load.width, **size)
    whole = train_flops(load, load.width, **size)
    return load.batch * ((1 + cost.backward) * whole + cost.forward * one)


def stage_flops(load: Load, cost: Cost, steps: int) -> float:
    """FLOPs of a defence's stage before training, if a domain has ``steps`` steps."""
    passes = cost.stage * (cost.stage_steps or steps)
    return passes * step_flops(load, Cost())


def calibration_fishers(method: Method, domains: int, steps: int) -> int:
    """How often a defence differentiates every calibration example singly.

    The count is for that many domains and steps. Measuring how much of unseen examples
    a subspace holds costs one more each time.

    >>> from sbr_jax.methods import build
    >>> calibration_fishers(build("safeanchor"), 3, 100)
    9
    >>> calibration_fishers(build("safeanchor-exact:no-update"), 3, 100)
    2
    """
    cost, every = method.cost, method.refresh_every
    refreshes = 0 if every is None else domains * ((steps - 1) // every)
    inside = refreshes * cost.refresh_fishers
    return cost.fishers + domains * cost.domain_fishers + inside
