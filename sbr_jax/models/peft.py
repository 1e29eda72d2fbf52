"""Adapters in PEFT's layout: ``adapter_config.json``, ``adapter_model.safetensors``.

Both layouts hold the update ``scale · A B`` of the projections. PEFT has two tensors
for each layer and projection, ``lora_A`` [r, in] and ``lora_B`` [out, r], and writes α
and r in place of the scale: α / r, or α / √r where ``use_rslora`` is set.

Every tensor of the file has one place in the adapter and every place one tensor; a
setting that means another update is refused by name. A pickle is never opened.

Legend: L layers, r rank, α ``lora_alpha``.

References:
  LoRA, arXiv:2106.09685; the scale α / √r, arXiv:2312.03732.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sbr_jax.files import is_there, read_object
from sbr_jax.models.config import TARGETS, ModelConfig
from sbr_jax.models.fields import Field, read_fields
from sbr_jax.models.loading import Model
from sbr_jax.models.lora import RANK, SCALE, LoraPair
from sbr_jax.models.tensors import float_dtype, read_tensors, some
from sbr_jax.models.weights import sources
from sbr_jax.typing import UserError

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": "lora_a", "lora_B": "lora_b"}

_ALLOWED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    # Other starts (PiSSA, OLoRA, LoftQ, ...) belong to base weights that they changed.
    "init_lora_weights": (None, False, True, "gaussian", "orthogonal"),
}
"""Settings with the values that we implement; of unknown ones, only empty values."""
_FREE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "use_rslora",
    }
)
"""Settings that do not change what given tensors mean, or that are read by name."""
_READ = {
    "r": RANK,
    "lora_alpha": SCALE,
    "use_rslora": Field(bool, none=True, default=False),
    "target_modules": Field(str, lists="or", none=True, default=None),
    "exclude_modules": Field(str, lists="or", none=True, default=None),
}
"""Those that are read by name."""


def save_peft(
    folder: str | pathlib.Path,
    model: Model | ModelConfig,
    adapter: Mapping[str, LoraPair],
    *,
    base_name: str | None = None,
) -> None:
    """Writes an adapter that ``peft.PeftModel.from_pretrained`` loads.

    **Guarantee**: ``load_peft`` gives factors that are bit-identical.

    Args:
      folder: made if it does not exist.
      model: the model that the adapter is for, or its settings.
      adapter: ``{name: LoraPair}``, of one rank and scale.
      base_name: hub id or folder of the base weights, for those who load the adapter.

    Raises:
      UserError: if the adapter is empty, has several ranks or scales, or does not fit
        the model.
    """
    from safetensors.numpy import save_file

    config = model if isinstance(model, ModelConfig) else model.config
    rank, scale = _rank_and_scale(adapter)
    tensors = {}
    for target, pair in adapter.items():
        for part, field in _FACTORS.items():
            values = np.asarray(getattr(pair, field))
            names, shape = _places(config, target, part, rank)
            if values.shape != (len(names), *shape[::-1]):
                raise UserError(
                    f"expected {target}.{field} of shape {(len(names), *shape[::-1])} "
                    f"[layers, ...] for this model, got {values.shape}; save it with "
                    "the model it was trained on"
                )
            for name, value in zip(names, values, strict=True):
                tensors[name] = np.ascontiguousarray(value.T)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(adapter),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def load_peft(
    folder: str | pathlib.Path, config: ModelConfig, *, dtype: Any = None
) -> dict[str, LoraPair]:
    """Reads an adapter that ``peft`` or ``save_peft`` wrote.

    Which projections are adapted is taken from the tensors, so ``target_modules`` may
    be a list or an expression; what a list names must be there.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: of the model that the adapter is for.
      dtype: to convert to; None keeps the file's.

    Returns:
      ``{name: LoraPair}``.

    Raises:
      UserError: for a missing file, a pickle, a setting that means another update than
        ``scale · A B``, and naming every tensor that is missing, extra or misshapen.
    """
    folder = pathlib.Path(folder)
    dtype = None if dtype is None else float_dtype(dtype)
    raw = _read_settings(folder)
    rank, scale = _read_scale(raw)
    tensors = _read_tensors(folder / TENSORS, dtype)
    targets = _targets(raw, tensors, config)
    _check(folder / TENSORS, tensors, targets, config, rank)

    def stacked(target: str, part: str) -> Any:
        names, _ = _places(config, target, part, rank)
        return jnp.asarray(np.stack([tensors[name].T for name in names]))

    return {
        target: LoraPair(stacked(target, "lora_B"), stacked(target, "lora_A"), scale)
        for target in targets
    }


# --- names and numbers ----------------------------------------------------------------


def _places(
    config: ModelConfig, target: str, part: str, rank: int
) -> tuple[list[str], tuple[int, int]]:
    """The tensors of one factor, layer by layer, and the shape that each has in a file.

    Raises:
      UserError: if there is no such projection.
    """
    if target not in TARGETS:
        raise UserError(
            f"the adapter has {target!r}, a model only {', '.join(TARGETS)}"
        )
    modules = sources(config)["layers"][target].names
    names = [f"{_PREFIX}{name.removesuffix('weight')}{part}.weight" for name in modules]
    fan_in, fan_out = config.projection(target)
    return names, (rank, fan_in) if part == "lora_A" else (fan_out, rank)


def _rank_and_scale(adapter: Mapping[str, LoraPair]) -> tuple[int, float]:
    """Rank and scale that all pairs of an adapter share.

    Raises:
      UserError: if they do not, or there are none.
    """
    if not adapter:
        raise UserError("expected an adapter with at least one projection, got none")
    found = {
        name: (pair.lora_a.shape[-1], pair.scale) for name, pair in adapter.items()
    }
    if len(set(found.values())) > 1:
        shown = ", ".join(
            f"{name}: {rank} and {scale:g}" for name, (rank, scale) in found.items()
        )
        raise UserError(
            f"expected one rank and scale for all projections, got {shown}; merge the "
            "adapter into the base and save the model"
        )
    return next(iter(found.values()))


def _alpha(scale: float, rank: int) -> int | float:
    """The α of a scale: ``α / rank`` gives it back, bit for bit if possible.

    >>> _alpha(32 / 16, 16), _alpha(1 / 49, 49), _alpha(0.3, 2)
    (32, 1, 0.6)
    """
    alpha = scale * rank
    near = (round(alpha), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, 2**60))
    return next((x for x in near if x / rank == scale), alpha)


# --- reading ----------------------------------------------------------------------


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of an adapter, all of which we can honour."""
    path = folder / SETTINGS
    if not is_there(path):
        raise UserError(
            f"expected an adapter folder with {SETTINGS} and {TENSORS}, found no "
            f"{SETTINGS} in {folder}"
        )
    raw = read_object(path)
    wrong = [
        f"{name}={value!r:.60}"
        for name, value in sorted(raw.items())
        if not _supported(name, value)
    ]
    if "peft_type" not in raw:
        wrong.append("peft_type missing (expected 'LORA')")
    if wrong:
        raise UserError(
            f"unsupported settings in {path}: {'; '.join(wrong)}; without them it "
            "would be another update: merge the adapter into its base with peft, and "
            "load the merged model"
        )
    return read_fields(raw, _READ, str(path))


def _supported(name: str, value: Any) -> bool:
    """True if a setting leaves the update to its tensors, α and r."""
    if name in _ALLOWED:
        return value in _ALLOWED[name]
    empty = isinstance(value, str | list | dict) and not value
    return name in _FREE or value is None or value is False or empty


def _read_scale(raw: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale."""
    rank, alpha = raw["r"], float(raw["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if raw["use_rslora"] else rank)


def _read_tensors(path: pathlib.Path, dtype: Any) -> dict[str, np.ndarray]:
    """All tensors of a file, of one dtype."""
    if not is_there(path):
        pickled = (path.parent / _PICKLE).is_file()
        raise UserError(
            f"expected {TENSORS} in {path.parent}, found "
            + (
                f"{_PICKLE}, a pickle, which is never opened; load it with peft and "
                "save it again, which writes safetensors"
                if pickled
                else "none"
            )
        )
    tensors, _ = read_tensors(path, dtype)
    if len(found := sorted({str(value.dtype) for value in tensors.values()})) > 1:
        raise UserError(
            f"the tensors of {path} differ in dtype: {', '.join(found)}; pass dtype="
        )
    return tensors


def _targets(
    raw: Mapping[str, Any], tensors: Mapping[str, Any], config: ModelConfig
) -> list[str]:
    """The projections that have a tensor, or that a list of the settings names."""
    named = set()
    modules = raw["target_modules"]
    if isinstance(modules, list) and not raw["exclude_modules"]:
        named = {module.rpartition(".")[2] for module in modules}
    return [
        target
        for target in TARGETS
        if target in named
        or any(
            name in tensors
            for part in _FACTORS
            for name in _places(config, target, part, 1)[0]
        )
    ]


def _check(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    targets: list[str],
    config: ModelConfig,
    rank: int,
) -> None:
    """Compares names and shapes; raises one error that says everything wrong."""
    wanted = {}
    for target in targets:
        for part in _FACTORS:
            names, shape = _places(config, target, part, rank)
            wanted |= dict.fromkeys(names, shape)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"extra {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if not wanted and not problems:
        problems = ["there are none"]
    if problems:
        raise UserError(
            f"the tensors of {path} do not match a {config.model_type} model of "
            f"{config.layers} layers: {some(problems)}"
        )
