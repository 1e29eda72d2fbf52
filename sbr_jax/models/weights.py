"""Maps a Hugging Face checkpoint strictly to the tree of base weights and back.

Tensors of the file and places in the tree match one to one: anything missing, extra or
of another shape is an error that names it. Only safetensors are read; a pickle is never
opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sbr_jax import distributed
from sbr_jax.files import is_there, read_object
from sbr_jax.models.codes import QuantisedWeight, encode, stack_layers
from sbr_jax.models.config import BIASED, TARGETS, ModelConfig
from sbr_jax.models.families import FAMILIES
from sbr_jax.models.parameters import base_shapes, bias_of, is_shape
from sbr_jax.models.quantize import check_finite
from sbr_jax.models.sharding import named_shardings, partition_specs
from sbr_jax.models.tensors import (
    as_finite,
    float_dtype,
    not_floats,
    open_tensors,
    shown,
    some,
)
from sbr_jax.typing import UserError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
# With norms on both sides, this name means the one after attention.
_POST_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DERIVED = "rotary_emb.inv_freq"
"""Old files store RoPE frequencies, which follow from the configuration."""
_SHARD = re.compile(r"[^/\\\x00-\x1f]{1,200}\.safetensors")
"""A file in the folder itself: no shard lies elsewhere."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one array of the tree: a single one, or one per layer."""

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    """The file holds ``[out, in]``, the tree ``[in, out]``."""
    rows: tuple[int, int] | None = None
    """The range of the file's rows; None: all."""


def sources(config: ModelConfig) -> dict[str, Any]:
    """A tree like ``base`` that names the file's tensors for each array.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> sources(config)["layers"]["up_proj"].names[1]
    'model.layers.1.mlp.up_proj.weight'
    """
    inner = {n: f"{'self_attn' if n in _ATTENTION else 'mlp'}.{n}" for n in TARGETS}
    inner |= _NORMS | (_POST_NORMS if config.post_norms else {})
    inner = {name: f"{place}.weight" for name, place in inner.items()}
    inner |= {bias_of(name): f"self_attn.{name}.bias" for name in BIASED}
    rows = {}
    for place, members in fused_modules(config).items():
        ends = list(itertools.accumulate(config.projection(n)[1] for n in members))
        inner |= dict.fromkeys(members, f"{place}.weight")
        rows |= dict(zip(members, itertools.pairwise([0, *ends]), strict=True))

    def layer(name: str) -> Source:
        names = (f"model.layers.{i}.{inner[name]}" for i in range(config.layers))
        return Source(tuple(names), True, name in TARGETS, rows.get(name))

    tree: dict[str, Any] = {
        "embed": Source((_EMBED,), False, False),
        "layers": {name: layer(name) for name in base_shapes(config)["layers"]},
        "final_norm": Source(("model.norm.weight",), False, False),
    }
    return tree if config.tied else {**tree, "head": Source((_HEAD,), False, True)}


def fused_modules(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """The file's modules that hold several projections, by their place in a layer.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> fused_modules(config), list(fused_modules(dataclasses.replace(config,
    ...     model_type="phi3")))
    ({}, ['self_attn.qkv_proj', 'mlp.gate_up_proj'])
    """
    family = FAMILIES.get(config.model_type)
    return {} if family is None else family.fused


class Checkpoint:
    """The tensors of a folder, in one file or in the shards of an index.

    A single file wins, as in transformers: an index beside it is from an older model.
    """

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        index, single = folder / INDEX, folder / SINGLE
        self.config = folder / "config.json"
        self.listing: dict[str, str] | None = None
        self.hint = ""
        if is_there(single):
            self.main, files = single, [SINGLE]
            if index.is_file():
                self.hint = f"; {INDEX} beside it is not read: delete what is outdated"
        elif is_there(index):
            self.main, self.listing = index, _listing(index)
            files = sorted(set(self.listing.values()))
        else:
            raise UserError(
                f"expected {SINGLE} or {INDEX} in {folder}, found neither; convert "
                "other formats to safetensors first"
            )
        self._files: dict[str, Any] = {}
        self.places: dict[str, pathlib.Path] = {}
        for path in (folder / name for name in files):
            if not is_there(path):
                raise UserError(f"{index} names {path.name}, which is missing")
            file = open_tensors(path, stack)
            for name in file.keys():  # noqa: SIM118
                if name in self.places:
                    raise UserError(
                        f"{shown(name)} is in {self.places[name]} and in {path.name} "
                        "too; fetch the shards again"
                    )
                self._files[name], self.places[name] = file, path

    def slice(self, name: str) -> Any:
        """A lazy handle of a tensor, for its shape and its parts."""
        return self._files[name].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.slice(name).get_shape())


def _listing(index: pathlib.Path) -> dict[str, str]:
    """The shard of each tensor, according to the index."""
    listing = read_object(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise UserError(
            f"expected weight_map, the names of tensors with their shards, in {index}, "
            "found none; fetch the file again"
        )
    for name, file in listing.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise UserError(
                f"expected a safetensors file beside it for {shown(name)} in {index}, "
                f"got {file!r:.60}"
            )
    return listing


def _check(config: ModelConfig, file: Checkpoint) -> None:
    """Compares headers with settings; reports all mistakes in one error."""
    wanted: dict[str, tuple[int, ...]] = {}
    shapes = jax.tree.leaves(base_shapes(config), is_leaf=is_shape)
    for source, shape in zip(jax.tree.leaves(sources(config)), shapes, strict=True):
        inner = shape[1:] if source.stacked else shape
        inner = inner[::-1] if source.transposed else inner
        for name in source.names:
            end = max(source.rows[1], wanted.get(name, (0,))[0]) if source.rows else 0
            wanted[name] = (end, *inner[1:]) if source.rows else inner

    def counts(name: str) -> bool:
        return not (name.endswith(_DERIVED) or (config.tied and name == _HEAD))

    if file.listing is not None:
        there = {name: path.name for name, path in file.places.items()}
        odd = {name for name, _ in file.listing.items() ^ there.items() if counts(name)}
        if odd:
            raise UserError(
                f"{file.main} and its shards disagree about {some(sorted(odd))}"
            )
    found = set(filter(counts, file.places))
    problems = []
    if missing := sorted(wanted.keys() - found):
        problems.append(f"missing {some(missing)}")
    if extra := sorted(found - wanted.keys()):
        problems.append(f"extra {some(extra)}")
    both = sorted(found & wanted.keys())
    problems += [
        f"{name} has shape {file.shape(name)}, expected {wanted[name]}"
        for name in both
        if file.shape(name) != wanted[name]
    ]
    problems += not_floats({name: file.slice(name).get_dtype() for name in both})
    if problems:
        raise UserError(
            f"the tensors of {file.main} do not match {file.config}: "
            f"{some(problems)}{file.hint}"
        )
    if config.tied and _HEAD in file.places:
        _check_tied_head(file)


def check_weights(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """Compares a checkpoint's headers with its configuration, as loading does.

    No weight is read, except the head of a tied model that stores it again.

    Args:
      folder: with ``model.safetensors``, or shards and their index.
      config: the settings that belong to it.

    Raises:
      UserError: for a truncated file, and naming every tensor that is missing, extra,
        misshapen or not floating-point.
    """
    with contextlib.ExitStack() as stack:
        _check(config, Checkpoint(pathlib.Path(folder), stack))


def _check_tied_head(file: Checkpoint) -> None:
    """A tied model may store its head again, but it must equal the embedding."""

    def alike() -> bool:
        head, embed = (file.slice(name)[:] for name in (_HEAD, _EMBED))
        return np.array_equal(head, embed)

    numbers = not not_floats({_HEAD: file.slice(_HEAD).get_dtype()})
    if not (numbers and distributed.decide(alike)):
        raise UserError(
            f"extra {_HEAD} in {file.places[_HEAD]} differs from {_EMBED} although "
            "config.json ties them; correct tie_word_embeddings"
        )


def load_weights(
    folder: str | pathlib.Path,
    config: ModelConfig,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Reads the base weights of a folder.

    **Guarantee**: without ``dtype``, weights that ``save_weights`` wrote come back bit
    for bit. With a mesh a host reads only the parts that its devices hold, each once.
    With ``quantize`` one matrix of one layer is dense at a time, and codes equal those
    of ``models.quantize`` bit for bit (on a mesh, the mean of ``"nf4-double"`` up to
    rounding).

    Args:
      folder: with ``model.safetensors``, or shards and their index.
      config: the settings that belong to it.
      dtype: to convert to; None keeps the file's.
      mesh: with axes among ``"fsdp"`` and ``"tp"``, or None for one device.
      quantize: a kind of codes for the projections, or None.

    Raises:
      UserError: naming every tensor that is missing, extra, misshapen, not
        floating-point or not finite.
    """
    with contextlib.ExitStack() as stack:
        file = Checkpoint(pathlib.Path(folder), stack)
        return read_weights(file, config, dtype=dtype, mesh=mesh, quantize=quantize)


def read_weights(
    file: Checkpoint,
    config: ModelConfig,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """The base weights of an open checkpoint; otherwise like ``load_weights``."""
    if dtype is not None:
        dtype = float_dtype(dtype)
    _check(config, file)
    shapes, table = base_shapes(config), sources(config)
    shardings = jax.tree.map(lambda source: None, table)
    if mesh is not None:
        shardings = named_shardings(partition_specs(config), shapes, mesh)

    def place(path: Any, source: Source, shape: Any, sharding: Any) -> Any:
        if quantize is not None and path[-1].key in TARGETS:
            return _place_codes(file, source, shape, sharding, dtype, quantize)
        return _place(_read(file, source, dtype), shape, sharding)

    return jax.tree_util.tree_map_with_path(place, table, shapes, shardings)


def _place(
    read: Callable[[Any], np.ndarray],
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
) -> jax.Array:
    if sharding is None:
        return jnp.asarray(read(...))
    parts: dict[Any, np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        """Reads a part once for all devices that hold it."""
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, once)


def _place_codes(
    file: Checkpoint,
    source: Source,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    dtype: Any,
    kind: str,
) -> QuantisedWeight:
    """Encodes a projection layer by layer."""
    inner = None
    if sharding is not None:
        inner = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    def layer(name: str) -> QuantisedWeight:
        one = dataclasses.replace(source, names=(name,), stacked=False)
        weight = encode(_place(_read(file, one, dtype), shape[1:], inner), kind)
        check_finite(name, weight)
        # Frees the dense matrix before reading the next one.
        return jax.block_until_ready(weight)

    layers = [layer(name) for name in source.names]
    _check_alike(file, source, (weight.dtype for weight in layers))
    stacked = stack_layers(layers)
    if sharding is None:
        return stacked
    placed = named_shardings(sharding.spec, stacked, sharding.mesh)
    return jax.device_put(stacked, placed)


def _check_alike(file: Checkpoint, source: Source, dtypes: Iterable[Any]) -> None:
    if len({str(dtype) for dtype in dtypes}) > 1:
        raise UserError(
            f"{source.names[0]} in {file.main} and its like in other layers differ in "
            "dtype; pass dtype="
        )


def _read(file: Checkpoint, source: Source, dtype: Any) -> Callable[[Any], np.ndarray]:
    """``index -> part`` of one array of the tree."""

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        handle = file.slice(name)
        if source.transposed:
            index = index[::-1]
        if source.rows is not None:
            first, end = source.rows
            start, stop, _ = (index[0] if index else slice(None)).indices(end - first)
            index = (slice(first + start, first + stop), *index[1:])
        values = handle[index] if index else handle[:]
        values = as_finite(values, dtype, name, file.places[name])
        return values.T if source.transposed else values

    def read(index: Any) -> np.ndarray:
        index = () if index is Ellipsis else tuple(index)
        if not source.stacked:
            return part(source.names[0], index)
        names = source.names[index[0]] if index else source.names
        parts = [part(name, index[1:]) for name in names]
        _check_alike(file, source, (values.dtype for values in parts))
        return np.stack(parts)

    return read
