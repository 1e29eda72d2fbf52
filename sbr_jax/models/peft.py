"""Adapters in PEFT's layout: ``adapter_config.json``, ``adapter_model.safetensors``.

Both layouts hold the update ``scale · A B`` of the projections. PEFT has two tensors
for each layer and projection, ``lora_A`` [r, in] and ``lora_B`` [out, r]. It stores α
and r instead of the scale, which is α / r, or α / √r if ``use_rslora`` is set.

Tensors of the file and places in the adapter match one to one. A setting that implies
another update is refused by name. A pickle is never opened.

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

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.files import is_there, read_object
from sbr_jax.models import fused
from sbr_jax.models.config import TARGETS, ModelConfig
from sbr_jax.models.fields import Field, read_fields
from sbr_jax.models.loading import Model
from sbr_jax.models.lora import RANK, SCALE, LoraPair
from sbr_jax.models.tensors import float_dtype, read_tensors, some, write_tensors
from sbr_jax.models.weights import fused_modules, sources
from sbr_jax.typing import UserError

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": "lora_a", "lora_B": "lora_b"}

_ALLOWED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    # Other initialisations (PiSSA, OLoRA, LoftQ, ...) need the base that they changed.
    "init_lora_weights": (None, False, True, "gaussian", "orthogonal"),
}
"""Settings with the values that we support; an unknown setting must be empty."""
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
"""Settings that do not change what the tensors mean, or that are read by name."""
_READ = {
    "r": RANK,
    "lora_alpha": SCALE,
    "use_rslora": Field(bool, none=True, default=False),
    "target_modules": Field(str, lists="or", none=True, default=None),
    "exclude_modules": Field(str, lists="or", none=True, default=None),
}
"""The settings that are read by name."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
_PATTERN = Field(dict)
"""Read if they say just what ``fused`` makes of a module with several projections."""


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
      model: the model that the adapter belongs to, or its settings.
      adapter: ``{name: LoraPair}``, all of one rank and scale.
      base_name: hub id or folder of the base weights, written for later readers.

    Raises:
      UserError: if the adapter is empty, has several ranks or scales, or does not fit
        the model.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    rank, scale = _rank_and_scale(adapter)
    _check_fits(config, adapter, rank)
    tensors, pairs = {}, _joined(config, adapter)
    for module, pair in pairs.items():
        for part, field in _FACTORS.items():
            names, _ = _places(config, module, part, rank)
            for name, value in zip(names, getattr(pair, field), strict=True):
                tensors[name] = np.ascontiguousarray(np.asarray(value).T)
    ranks = {name: pair.lora_a.shape[-1] for name, pair in pairs.items()}
    wide = {name: size for name, size in ranks.items() if size != rank}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, tensors)
    settings = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "alpha_pattern": {name: _alpha(scale, size) for name, size in wide.items()},
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": wide,
        "target_modules": sorted(pairs),
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

    The tensors decide which projections are adapted, so ``target_modules`` may be a
    list or an expression; every module that a list names must have a tensor.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: settings of the model that the adapter belongs to.
      dtype: to convert to; None keeps the file's.

    Raises:
      UserError: for a missing file, a pickle, or a setting that implies another update
        than ``scale · A B``; names every tensor that is missing, extra or misshapen.
    """
    folder = pathlib.Path(folder)
    dtype = None if dtype is None else float_dtype(dtype)
    raw = _read_settings(folder, config)
    tensors = _read_tensors(folder / TENSORS, dtype)
    modules = _named_modules(raw, tensors, config)
    ranks = {module: raw["rank_pattern"].get(module, raw["r"]) for module in modules}
    _check(folder / TENSORS, tensors, ranks, config)

    def stacked(module: str, part: str) -> Any:
        names, _ = _places(config, module, part, ranks[module])
        return np.stack([tensors[name].T for name in names])

    found = {}
    for module, rank in ranks.items():
        alpha = float(raw["alpha_pattern"].get(module, raw["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if raw["use_rslora"] else rank)
        pair = LoraPair(stacked(module, "lora_B"), stacked(module, "lora_A"), scale)
        members = _modules(config)[module][1]
        if members == (module,):
            found[module] = pair
        else:
            where = f"{module} in {folder}"
            found |= fused.split(config, members, pair, raw["r"], where)
    return {n: jax.tree.map(jnp.asarray, found[n]) for n in TARGETS if n in found}


# --- names and numbers ----------------------------------------------------------------


def _modules(config: ModelConfig) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The modules of a model: each layer's tensor name, and the projections in it."""
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    inside = {m: members for members in fused_modules(config).values() for m in members}
    layers = sources(config)["layers"]
    for target in TARGETS:
        names = layers[target].names
        found[names[0].split(".")[-2]] = names, inside.get(target, (target,))
    return found


def _places(
    config: ModelConfig, module: str, part: str, rank: int
) -> tuple[list[str], tuple[int, int]]:
    """The tensor names of one factor, layer by layer, and their common shape."""
    tensors, members = _modules(config)[module]
    names = [f"{_PREFIX}{name.removesuffix('weight')}{part}.weight" for name in tensors]
    fan_in = config.projection(members[0])[0]
    fan_out = sum(config.projection(name)[1] for name in members)
    return names, (rank, fan_in) if part == "lora_A" else (fan_out, rank)


def _check_fits(
    config: ModelConfig, adapter: Mapping[str, LoraPair], rank: int
) -> None:
    """Refuses an adapter that belongs to another model."""
    for target, pair in adapter.items():
        if target not in TARGETS:
            raise UserError(
                f"the adapter has {target!r}, a model only {', '.join(TARGETS)}"
            )
        fan_in, fan_out = config.projection(target)
        for field, inner in (("lora_a", (fan_in, rank)), ("lora_b", (rank, fan_out))):
            shape = tuple(getattr(pair, field).shape)
            if shape != (config.layers, *inner):
                raise UserError(
                    f"expected {target}.{field} of shape {(config.layers, *inner)} "
                    f"[layers, ...] for this model, got {shape}; save it with the "
                    "model it was trained on"
                )


def _joined(
    config: ModelConfig, adapter: Mapping[str, LoraPair]
) -> dict[str, LoraPair]:
    """The adapter by the model's modules, with fused ones joined."""
    found = {}
    for module, (_, members) in _modules(config).items():
        if members == (module,):
            found |= {module: adapter[module]} if module in adapter else {}
        elif any(name in adapter for name in members):
            found[module] = fused.join(config, members, adapter)
    return found


def _rank_and_scale(adapter: Mapping[str, LoraPair]) -> tuple[int, float]:
    """The rank and scale that all pairs of an adapter share."""
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
    """The α of a scale: ``α / rank`` returns the scale, bit for bit if possible.

    >>> _alpha(32 / 16, 16), _alpha(1 / 49, 49), _alpha(0.3, 2)
    (32, 1, 0.6)
    """
    alpha = scale * rank
    near = (round(alpha), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, 2**60))
    return next((x for x in near if x / rank == scale), alpha)


# --- reading ----------------------------------------------------------------------


def _read_settings(folder: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    """The settings of an adapter, after refusing those we cannot honour."""
    path = folder / SETTINGS
    if not is_there(path):
        raise UserError(
            f"expected an adapter folder with {SETTINGS} and {TENSORS}, found no "
            f"{SETTINGS} in {folder}"
        )
    raw = read_object(path)
    fields = {**_READ, **{name: _PATTERN for name in _PATTERNS}}
    known = {**raw, **{name: raw.get(name) or {} for name in _PATTERNS}}
    wrong = [
        f"{name}={value!r:.60}"
        for name, value in sorted(raw.items())
        if not _supported(name, value) and not _side_by_side(name, known, config)
    ]
    if "peft_type" not in raw:
        wrong.append("peft_type missing (expected 'LORA')")
    if wrong:
        raise UserError(
            f"unsupported settings in {path}: {'; '.join(wrong)}; without them it "
            "would be another update: merge the adapter into its base with peft, and "
            "load the merged model"
        )
    return read_fields(known, fields, str(path))


def _supported(name: str, value: Any) -> bool:
    """True if a setting leaves the update to the tensors, α and r."""
    if name in _ALLOWED:
        return value in _ALLOWED[name]
    empty = isinstance(value, str | list | dict) and not value
    return name in _FREE or value is None or value is False or empty


def _side_by_side(name: str, raw: Mapping[str, Any], config: ModelConfig) -> bool:
    """True for a pattern that says only what ``fused.join`` makes of the modules."""
    if name not in _PATTERNS or not all(isinstance(raw[n], dict) for n in _PATTERNS):
        return False
    ranks, alphas = (raw[pattern] for pattern in _PATTERNS)
    sizes = {module: len(members) for module, (_, members) in _modules(config).items()}
    return ranks.keys() == alphas.keys() and all(
        sizes.get(module, 1) > 1
        and RANK.holds(raw.get("r"))
        and ranks[module] == sizes[module] * raw["r"]
        and SCALE.holds(alphas[module])
        for module in ranks
    )


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


def _named_modules(
    raw: Mapping[str, Any], tensors: Mapping[str, Any], config: ModelConfig
) -> list[str]:
    """The modules that have a tensor, or that the settings list by name."""
    named = set()
    modules = raw["target_modules"]
    if isinstance(modules, list) and not raw["exclude_modules"]:
        named = {module.rpartition(".")[2] for module in modules}
    return [
        module
        for module in _modules(config)
        if module in named
        or any(
            name in tensors
            for part in _FACTORS
            for name in _places(config, module, part, 1)[0]
        )
    ]


def _check(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    ranks: Mapping[str, int],
    config: ModelConfig,
) -> None:
    """Compares names and shapes; reports all mistakes in one error."""
    wanted = {}
    for module, rank in ranks.items():
        for part in _FACTORS:
            names, shape = _places(config, module, part, rank)
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
