"""Strict mapping between a Hugging Face checkpoint and the tree of base weights.

Every tensor of the file has one place in the tree and every place has one tensor:
whatever is missing, left over or of another shape is an error that names it. Only
safetensors are read; a pickle is never opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from sbr_jax.models.codes import QuantisedWeight, encode, stack_layers
from sbr_jax.models.config import BIASED, TARGETS, ModelConfig
from sbr_jax.models.hf_config import read_json
from sbr_jax.models.parameters import base_shapes, bias_of, is_shape
from sbr_jax.models.quantize import check_finite
from sbr_jax.models.sharding import named_shardings, partition_specs
from sbr_jax.typing import UserError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
# With norms on both sides the same name means the one after attention.
_POST_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DERIVED = "rotary_emb.inv_freq"
"""Old files store the RoPE frequencies, which follow from the configuration."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one array of the tree: one, or one per layer."""

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    """The file holds ``[out, in]``, the tree ``[in, out]``."""


def sources(config: ModelConfig) -> dict[str, Any]:
    """A tree like ``base`` that says which tensors of the file make each array.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> sources(config)["layers"]["up_proj"].names[1]
    'model.layers.1.mlp.up_proj.weight'
    """
    inner = {n: f"{'self_attn' if n in _ATTENTION else 'mlp'}.{n}" for n in TARGETS}
    inner |= _NORMS | (_POST_NORMS if config.post_norms else {})
    inner = {name: f"{place}.weight" for name, place in inner.items()}
    inner |= {bias_of(name): f"self_attn.{name}.bias" for name in BIASED}

    def layer(name: str) -> Source:
        names = (f"model.layers.{i}.{inner[name]}" for i in range(config.layers))
        return Source(tuple(names), True, name in TARGETS)

    tree: dict[str, Any] = {
        "embed": Source((_EMBED,), False, False),
        "layers": {name: layer(name) for name in base_shapes(config)["layers"]},
        "final_norm": Source(("model.norm.weight",), False, False),
    }
    return tree if config.tied else {**tree, "head": Source((_HEAD,), False, True)}


class Checkpoint:
    """The tensors of a folder, over one file or the shards of an index."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        self.folder = folder
        index, single = folder / INDEX, folder / SINGLE
        if index.is_file():
            listing = read_json(index).get("weight_map")
            if not isinstance(listing, dict):
                raise UserError(f"expected weight_map in {index}, found none")
            files = {folder / name for name in listing.values()}
        elif single.is_file():
            listing, files = None, {single}
        else:
            raise UserError(
                f"expected {single.name} or {index.name} in {folder}, found neither; "
                "convert other formats to safetensors first"
            )
        self._files: dict[str, Any] = {}
        places: dict[str, str] = {}
        for path in sorted(files):
            if not path.is_file():
                raise UserError(f"{index.name} names {path.name}, which is missing")
            try:
                file = stack.enter_context(safe_open(path, "numpy"))
            except SafetensorError as error:
                raise UserError(
                    f"{path} is no safetensors file, or it is cut short ({error}); "
                    "fetch it again"
                ) from error
            for name in file.keys():  # noqa: SIM118
                self._files[name] = file
                places[name] = path.name
        if listing is not None and listing != places:
            odd = sorted(dict(listing.items() ^ places.items()))
            raise UserError(f"{index} and its shards disagree about {_some(odd)}")

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def slice(self, name: str) -> Any:
        """A lazy handle of a tensor, for shapes and parts."""
        return self._files[name].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.slice(name).get_shape())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check(config: ModelConfig, file: Checkpoint) -> None:
    """Compares names and shapes; raises one error that says everything wrong."""
    wanted: dict[str, tuple[int, ...]] = {}
    shapes = jax.tree.leaves(base_shapes(config), is_leaf=is_shape)
    for source, shape in zip(jax.tree.leaves(sources(config)), shapes, strict=True):
        inner = shape[1:] if source.stacked else shape
        for name in source.names:
            wanted[name] = inner[::-1] if source.transposed else inner
    found = {name for name in file.names() if not name.endswith(_DERIVED)}
    if config.tied and _HEAD in found - set(wanted):
        _check_tied_head(file)
        found.remove(_HEAD)
    problems = []
    if missing := sorted(set(wanted) - found):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(found - set(wanted)):
        problems.append(f"extra {_some(extra)}")
    for name in sorted(found & set(wanted)):
        if file.shape(name) != wanted[name]:
            problems.append(
                f"{name} has shape {file.shape(name)}, expected {wanted[name]}"
            )
    if problems:
        raise UserError(
            f"the tensors of {file.folder} do not match its config.json: "
            f"{_some(problems)}"
        )


def check_weights(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """Compares a checkpoint's headers with its configuration, as loading does.

    No weight is read, but for the head of a tied model that stores it again.

    Args:
      folder: with ``model.safetensors``, or shards and their index.
      config: the settings that go with it.

    Raises:
      UserError: for a file that is cut short, and naming every tensor that is missing,
        extra or misshapen.
    """
    with contextlib.ExitStack() as stack:
        _check(config, Checkpoint(pathlib.Path(folder), stack))


def _check_tied_head(file: Checkpoint) -> None:
    """A tied model may store its head again, but then it must be the embedding."""
    if not np.array_equal(file.slice(_HEAD)[:], file.slice(_EMBED)[:]):
        raise UserError(
            f"extra {_HEAD} in {file.folder} differs from {_EMBED} although "
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

    **Guarantee**: without ``dtype``, what ``save_weights`` wrote comes back bit for
    bit. With a mesh each device's slice is read by itself; no host holds a whole
    weight. With ``quantize`` one matrix of one layer is dense at a time, and codes
    equal those of ``models.quantize`` bit for bit (the mean of ``"nf4-double"`` on a
    mesh up to rounding).

    Args:
      folder: with ``model.safetensors``, or shards and their index.
      config: the settings that go with it.
      dtype: to convert to; None keeps the file's.
      mesh: with axes among ``"fsdp"`` and ``"tp"``, or None for one device.
      quantize: a kind of codes for the projections, or None.

    Returns:
      The tree ``base``.

    Raises:
      UserError: naming every tensor that is missing, extra or misshapen.
    """
    with contextlib.ExitStack() as stack:
        file = Checkpoint(pathlib.Path(folder), stack)
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
    return jax.make_array_from_callback(shape, sharding, read)


def _place_codes(
    file: Checkpoint,
    source: Source,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    dtype: Any,
    kind: str,
) -> QuantisedWeight:
    """A projection in codes, layer by layer."""
    inner = None
    if sharding is not None:
        inner = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    def layer(name: str) -> QuantisedWeight:
        one = Source((name,), stacked=False, transposed=source.transposed)
        weight = encode(_place(_read(file, one, dtype), shape[1:], inner), kind)
        check_finite(name, weight)
        # Frees the dense matrix before the next one is read.
        return jax.block_until_ready(weight)

    layers = [layer(name) for name in source.names]
    _check_alike(source, (weight.dtype for weight in layers))
    stacked = stack_layers(layers)
    if sharding is None:
        return stacked
    placed = named_shardings(sharding.spec, stacked, sharding.mesh)
    return jax.device_put(stacked, placed)


def _check_alike(source: Source, dtypes: Iterable[Any]) -> None:
    if len({str(dtype) for dtype in dtypes}) > 1:
        raise UserError(
            f"{source.names[0]} and its like in other layers differ in dtype; "
            "pass dtype="
        )


def _read(file: Checkpoint, source: Source, dtype: Any) -> Callable[[Any], np.ndarray]:
    """``index -> part`` of one array of the tree."""

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        handle = file.slice(name)
        if source.transposed:
            index = index[::-1]
        values = handle[index] if index else handle[:]
        values = values.T if source.transposed else values
        return values if dtype is None else values.astype(dtype)

    def read(index: Any) -> np.ndarray:
        index = () if index is Ellipsis else tuple(index)
        if not source.stacked:
            return part(source.names[0], index)
        names = source.names[index[0]] if index else source.names
        parts = [part(name, index[1:]) for name in names]
        _check_alike(source, (values.dtype for values in parts))
        return np.stack(parts)

    return read
