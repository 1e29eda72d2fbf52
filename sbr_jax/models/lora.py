"""Low-rank adapters: one pair per projection, stacked over layers.

``y = x W + scale · (x A) B`` with ``scale = alpha / rank``. Legend: L layers, r rank.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.files import is_there, parse_json
from sbr_jax.models.codes import as_dense
from sbr_jax.models.config import TARGETS, ModelConfig
from sbr_jax.models.fields import Field, wrong_fields
from sbr_jax.models.parameters import select_targets
from sbr_jax.models.tensors import read_tensors, write_tensors
from sbr_jax.typing import PyTree, UserError

SCALE = Field(float, -1e9, 1e9)
"""Range of an adapter's scale, and of α."""
RANK = Field(int, 1, 2**16)
"""Range of an adapter's rank."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The two factors of one projection's update.

    B comes first, so a pair flattens to ``δ = vec([B; A])``.

    >>> import jax, jax.numpy as jnp
    >>> pair = LoraPair(jnp.zeros((2, 1, 3)), jnp.ones((2, 4, 1)), 2.0)
    >>> [leaf.shape for leaf in jax.tree.leaves(pair)]
    [(2, 1, 3), (2, 4, 1)]
    """

    lora_b: jax.Array
    """``[L, r, out]``."""
    lora_a: jax.Array
    """``[L, in, r]``."""
    scale: float = dataclasses.field(metadata={"static": True})


def is_lora_pair(node: Any) -> bool:
    """True for a pair; use it as ``is_leaf``, or as ``unit``.

    >>> is_lora_pair(None)
    False
    """
    return isinstance(node, LoraPair)


def init_adapter(
    key: jax.Array,
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    targets: str = r"(q|k|v|o)_proj",
    dtype: Any = jnp.float32,
) -> dict[str, LoraPair]:
    """A fresh adapter: A uniform in ±1/√in, B zero.

    **Guarantee**: the model with a fresh adapter equals the model without one; a
    projection's factors do not depend on which others are adapted.

    Args:
      key: a PRNG key.
      config: the model's settings.
      rank: r, at least 1.
      alpha: the scale is ``alpha / rank``.
      targets: regular expression over whole projection names.
      dtype: of both factors.

    Raises:
      UserError: for a rank or alpha out of range, or a pattern that matches nothing.

    >>> import jax
    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> adapter = init_adapter(jax.random.key(0), config, rank=2, alpha=4.0)
    >>> adapter["q_proj"].lora_a.shape, adapter["q_proj"].scale
    ((2, 4, 2), 2.0)
    """
    given = {"rank": rank, "alpha": alpha}
    if wrong := wrong_fields(given, {"rank": RANK, "alpha": SCALE}):
        raise UserError(f"wrong adapter settings: {'; '.join(wrong)}")
    adapter = {}
    for name in select_targets(targets):
        fan_in, fan_out = config.projection(name)
        bound = fan_in**-0.5
        lora_a = jax.random.uniform(
            jax.random.fold_in(key, TARGETS.index(name)),
            (config.layers, fan_in, rank),
            dtype,
            minval=-bound,
            maxval=bound,
        )
        lora_b = jnp.zeros((config.layers, rank, fan_out), dtype)
        adapter[name] = LoraPair(lora_b, lora_a, float(alpha) / rank)
    return adapter


def merge_adapter(base: PyTree, adapter: dict[str, LoraPair] | None) -> PyTree:
    """The base weights with the adapter added in.

    ``W + scale · A B``, added in float32 and rounded once to the dtype of W. A weight
    in codes is decoded first and stays dense: encoding the sum again would round away
    most of so small an update.

    Args:
      base: the frozen weights.
      adapter: ``{name: LoraPair}`` or None.

    Returns:
      A tree like ``base``; unadapted arrays are shared, not copied.

    Raises:
      UserError: if the adapter names a projection the base lacks.
    """
    layers = dict(base["layers"])
    for name, pair in (adapter or {}).items():
        if name not in layers:
            raise UserError(
                f"the adapter has {name!r}, the base only {', '.join(sorted(layers))}"
            )
        lora_a, lora_b = (x.astype(jnp.float32) for x in (pair.lora_a, pair.lora_b))
        product = jnp.einsum("lir,lro->lio", lora_a, lora_b, precision="highest")
        delta = pair.scale * product
        weight = layers[name]
        wide = as_dense(weight, jnp.float32)
        layers[name] = (wide + delta).astype(weight.dtype)
    return {**base, "layers": layers}


def save_adapter(path: str | pathlib.Path, adapter: dict[str, LoraPair]) -> None:
    """Writes an adapter as one safetensors file, with scales in its metadata.

    Args:
      path: the file to write; its folder is created.
      adapter: ``{name: LoraPair}``.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{factor}": np.ascontiguousarray(getattr(pair, factor))
        for name, pair in adapter.items()
        for factor in ("lora_a", "lora_b")
    }
    scales = {name: pair.scale for name, pair in sorted(adapter.items())}
    metadata = {"format": "sbr_jax.adapter", "scales": json.dumps(scales)}
    write_tensors(path, tensors, metadata)


def load_adapter(path: str | pathlib.Path) -> dict[str, LoraPair]:
    """Reads what ``save_adapter`` wrote.

    **Guarantee**: bit-identical to what was saved, scale included.

    Raises:
      UserError: if the file is missing, is not an adapter, lacks a factor, or holds a
        number that is not finite.
    """
    path = pathlib.Path(path)
    if not is_there(path):
        raise UserError(f"expected an adapter file at {path}, found none")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != "sbr_jax.adapter":
        raise UserError(
            f"expected an adapter written by save_adapter in {path}, got metadata "
            f"format {metadata.get('format')!r:.60}"
        )
    scales = parse_json(metadata.get("scales", "null"), f"the metadata of {path}")
    if not isinstance(scales, dict):
        raise UserError(f"expected a scale for each projection in {path}, found none")
    if wrong := wrong_fields(scales, dict.fromkeys(scales, SCALE)):
        raise UserError(f"wrong scales in {path}: {'; '.join(wrong)}")
    wanted = {f"{name}.{part}" for name in scales for part in ("lora_a", "lora_b")}
    if wanted != set(tensors):
        raise UserError(
            f"adapter {path}: missing {sorted(wanted - set(tensors))}, extra "
            f"{sorted(set(tensors) - wanted)}"
        )
    adapter = {}
    for name, scale in scales.items():
        lora_b, lora_a = tensors[f"{name}.lora_b"], tensors[f"{name}.lora_a"]
        ends = lora_a.shape[:1] + lora_a.shape[2:]
        if lora_a.ndim != 3 or lora_b.ndim != 3 or lora_b.shape[:2] != ends:
            raise UserError(
                f"adapter {path}: expected {name} of shapes [layers, in, rank] and "
                f"[layers, rank, out], got {lora_a.shape} and {lora_b.shape}"
            )
        adapter[name] = LoraPair(jnp.asarray(lora_b), jnp.asarray(lora_a), scale)
    return adapter
