"""Checkpoints of a study on a chat model, checked before weights are read.

Configuration, tokenizer and the headers of the weights show within a second whether a
model can be used.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sbr_jax import models
from sbr_jax.data.template import fix_template
from sbr_jax.data.text import encode_prompts
from sbr_jax.errors import option
from sbr_jax.models import hf_config
from sbr_jax.models.gguf_model import open_gguf
from sbr_jax.models.gguf_tokenizer import read_tokenizer
from sbr_jax.models.weights import check_weights
from sbr_jax.settings import Hardware
from sbr_jax.studies.options import ModelOptions
from sbr_jax.typing import UserError

GGUF = ".gguf"
SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.txt"]
"""Files fetched from the hub when weights are not needed."""


def locate(model: str | Path, *, weights: bool, setting: str = "model") -> Path:
    """The folder of a checkpoint, fetched from the hub if it is an id.

    Args:
        model: a folder or a hub id; for the setting "model", also a .gguf file.
        weights: whether to fetch the weights too.
        setting: the setting that named it, for messages.
    """
    folder, said = Path(model), option(setting)
    if folder.is_dir():
        return folder
    if folder.is_file():
        if setting == "model" and folder.suffix == GGUF:
            return folder
        raise UserError(
            f"{said}: expected a checkpoint folder, got the file {folder.name}; a "
            f".gguf file can be the {option('model')}, and nothing else"
        )
    if folder.suffix == GGUF:
        raise UserError(f"{said}: expected a .gguf file at {model}, found none")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        raise UserError(
            f"{said}: expected a checkpoint folder or a hub id like 'owner/name', "
            f"got '{model}', and nothing is there"
        )
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{said}: '{model}' is no folder here and could not be fetched from the "
            f"hub ({type(error).__name__}): name a folder, or check the network and "
            "whether its terms must be accepted"
        ) from error


def read_model(
    model: str | Path, *, date: str | None = None, thinking: bool | None = None
) -> models.Model:
    """The model without its weights: configuration and tokenizer.

    Headers of local weights are checked. Weights of a hub id are fetched later, once
    everything else has been checked.

    Raises:
        UserError: for an unknown family, an unsupported setting, and a tokenizer that
            is missing, has no chat template, or one that writes BOS twice or never.
    """
    folder = locate(model, weights=False)
    if folder.suffix == GGUF and folder.is_file():
        file, config, _ = open_gguf(folder)
        tokenizer = read_tokenizer(file, config)
    else:
        config = hf_config.read(folder)
        tokenizer = models.load_tokenizer(folder, vocab_size=config.vocab_size)
    if Path(model).is_dir():
        check_weights(folder, config)
    if tokenizer is None:
        raise UserError(f"expected a tokenizer in {folder}, found none")
    if not tokenizer.chat_template:
        raise UserError(
            f"expected a tokenizer with a chat template in {folder}, got one without: "
            "use the -Chat or -Instruct checkpoint of this model"
        )
    tokenizer = fix_template(tokenizer, date=date, thinking=thinking)
    encode_prompts(tokenizer, ["Hello."])
    return models.make_model(config, None, tokenizer)


def locate_all(
    model: str | Path, options: ModelOptions, *, weights: bool
) -> dict[str, Path]:
    """The folder of every checkpoint that decides a number, by its purpose."""
    found = {"model": locate(model, weights=weights)}
    for name in ("unaligned_folder", "judge_folder"):
        folder = getattr(options, name)
        if folder is not None:
            place = locate(folder, weights=weights, setting=f"study.{name}")
            config = hf_config.read(place)
            if weights or Path(folder).is_dir():
                check_weights(place, config)
            found[name] = place
    return found


SHAPE = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
"""Sizes that must be equal for one checkpoint to be subtracted from another."""


def check_unaligned(places: Mapping[str, Path], config: models.ModelConfig) -> None:
    """Refuses an unaligned checkpoint that is not the same model before alignment."""
    place = places.get("unaligned_folder")
    if place is None:
        return
    before = hf_config.read(place)
    for name in SHAPE:
        wanted, got = getattr(config, name), getattr(before, name)
        if wanted != got:
            raise UserError(
                f"{option('study.unaligned-folder')}: expected the model before its "
                f"alignment, with {name}={wanted}, got another with {name}={got} in "
                f"{place}"
            )


def load_model(folder: Path, options: ModelOptions, hardware: Hardware) -> models.Model:
    """The model with its weights, on one device or spread over a mesh."""
    from sbr_jax.training.sharding import check_heads, make_mesh

    placed = None if hardware.mesh is None else make_mesh(hardware.mesh)
    if placed is not None and folder.is_dir():
        check_heads(hf_config.read(folder), placed)  # Reading takes minutes: check now.
    return models.load(
        folder,
        dtype=jnp.dtype(options.dtype),
        quantize=options.quantize,
        mesh=placed,
        hardware=models.Hardware(remat=hardware.remat != "no"),
    )


def digest(folder: Path) -> str:
    """A hash of a checkpoint's configuration, headers and some of its weights.

    It includes stop tokens that only `generation_config.json` names.
    """
    found = hashlib.sha256()
    if folder.is_dir():
        text = (folder / "config.json").read_bytes()
        found.update(text)
        own = json.loads(text).get("eos_token_id")
        own = own if isinstance(own, list) else [own]
        if more := [token for token in hf_config.read(folder).eos if token not in own]:
            found.update(json.dumps(more).encode())
    size = 4096
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        length = path.stat().st_size
        found.update(f"{path.name} {length}".encode())
        with path.open("rb") as file:
            for place in np.linspace(0, max(length - size, 0), 64).astype(int):
                file.seek(int(place))
                found.update(file.read(size))
    return found.hexdigest()[:16]
