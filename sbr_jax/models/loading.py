"""The model record: loads a checkpoint folder or hub id, saves a folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
from jax.sharding import Mesh

from sbr_jax.models import hf_config
from sbr_jax.models.codes import check_kind
from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.gguf_model import open_gguf
from sbr_jax.models.gguf_tokenizer import read_tokenizer
from sbr_jax.models.quantize import require_dense
from sbr_jax.models.saving import save_weights
from sbr_jax.models.tokenizer import load_tokenizer
from sbr_jax.models.transformer import make_apply_fn
from sbr_jax.models.weights import load_weights, read_weights
from sbr_jax.typing import ApplyFn, PyTree, UserError

_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model as plain data and one pure function."""

    apply_fn: ApplyFn
    """``apply_fn(base, adapter, tokens, ...) -> logits``; see ``forward``."""
    params: PyTree
    """The base weights, always passed as an argument."""
    tokenizer: Any
    """A transformers tokenizer, or None for a folder without one."""
    config: ModelConfig
    """The mathematics, hashable."""
    hardware: Hardware = Hardware()
    """Settings of the execution."""


def make_model(
    config: ModelConfig,
    params: PyTree,
    tokenizer: Any = None,
    *,
    hardware: Hardware | None = None,
) -> Model:
    """Makes the record of a model built in memory.

    Args:
      config: the mathematics.
      params: base weights that fit ``config``.
      tokenizer: a transformers tokenizer, or None.
      hardware: how to carry it out.
    """
    hardware = hardware or Hardware()
    return Model(make_apply_fn(config, hardware), params, tokenizer, config, hardware)


def load(
    folder_or_id: str | pathlib.Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    hardware: Hardware | None = None,
    quantize: str | None = None,
) -> Model:
    """Loads a Hugging Face checkpoint, or a GGUF file.

    Args:
      folder_or_id: a folder, a ``.gguf`` file (decoded to float32; it needs the extra
        ``gguf``), or the id of a model on the hub.
      dtype: of the weights; None keeps the file's.
      mesh: with axes among ``"fsdp"`` and ``"tp"``, to spread the weights over.
      hardware: settings of the execution, such as rematerialisation.
      quantize: ``"nf4"``, ``"nf4-double"`` or ``"int8"`` to keep the projections in
        codes (see ``models.quantize``), encoding one dense matrix at a time; None keeps
        them dense.

    Raises:
      UserError: naming a file that is missing or damaged, a setting of the wrong type,
        out of range or unsupported, or a tensor that does not fit or is not finite.
    """
    if quantize is not None:
        check_kind(quantize)
    path = pathlib.Path(folder_or_id)
    if path.suffix == ".gguf":
        file, config, tensors = open_gguf(path)
        tokenizer = read_tokenizer(file, config)
        params = read_weights(
            tensors, config, dtype=dtype, mesh=mesh, quantize=quantize
        )
        return make_model(config, params, tokenizer, hardware=hardware)
    folder = _resolve(folder_or_id)
    config = hf_config.read(folder)
    # Small files first, so that mistakes show before minutes of reading weights.
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    params = load_weights(folder, config, dtype=dtype, mesh=mesh, quantize=quantize)
    return make_model(config, params, tokenizer, hardware=hardware)


def save(
    folder: str | pathlib.Path, model: Model, *, max_shard_bytes: int | None = None
) -> None:
    """Writes a folder that ``load`` and transformers read.

    Writes ``config.json``, ``generation_config.json``, the weights as
    ``model.safetensors`` or shards with an index, the tokenizer's files, and
    ``chat_template.jinja`` if the tokenizer has a chat template.

    **Guarantee**: ``load(folder)`` gives weights that are bit-identical.

    Args:
      folder: created if missing; weights already in it are replaced.
      model: the model to save, with dense weights.
      max_shard_bytes: limit of one file of weights; None: all in one.

    Raises:
      UserError: if weights are in codes, if no configuration of the family expresses
        the model's settings, or for a limit below 1.
    """
    require_dense(model.params, "save")
    folder = pathlib.Path(folder)
    dtype = str(jax.tree.leaves(model.params)[0].dtype)
    files = {
        "config.json": hf_config.to_dict(model.config, dtype),
        "generation_config.json": hf_config.generation_dict(model.config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    save_weights(folder, model.config, model.params, max_shard_bytes=max_shard_bytes)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))


def _resolve(folder_or_id: str | pathlib.Path) -> pathlib.Path:
    """The local folder, or the hub snapshot in the Hugging Face cache."""
    folder = pathlib.Path(folder_or_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or isinstance(
        folder_or_id, pathlib.Path
    ):
        raise UserError(
            f"expected a checkpoint folder or a hub id like 'owner/name', got {name!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is no folder here and could not be fetched from the hub: {error}"
        ) from error
