"""Reads a Hugging Face ``config.json`` into settings, and writes it back.

A setting that changes the mathematics and that we do not implement is refused by name:
ignoring it would silently load a wrong model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sbr_jax.files import is_there, read_object
from sbr_jax.models.config import ModelConfig, RopeScaling
from sbr_jax.models.families import COMMON, FAMILIES, GELU, Family, Raw
from sbr_jax.models.fields import read_fields
from sbr_jax.models.hf_fields import CONFIG, EOS, ROPE, ROPE_KINDS
from sbr_jax.typing import UserError

_FULL, _SLIDING = "full_attention", "sliding_attention"

_ORIGINAL = "original_max_position_embeddings"

_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "yarn": (
        ("factor",),
        (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), (_ORIGINAL, "attention_factor")),
}
"""Kinds of RoPE, with the settings that each requires and allows."""


def _refuse(settings: Raw, allowed: Mapping[str, tuple], where: str) -> None:
    """Refuses settings that are present with an unsupported value."""
    wrong = [
        f"{name}={settings[name]!r} (supported: {', '.join(repr(v) for v in values)})"
        for name, values in allowed.items()
        if name in settings and settings[name] not in values
    ]
    if wrong:
        raise UserError(
            f"unsupported settings in {where}: {'; '.join(wrong)}; running without "
            "them would compute another model"
        )


def _scaling(
    name: str, rope: Raw, raw: Raw, where: str
) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of one RoPE dictionary, in either spelling."""
    read_fields(rope, ROPE, f"{name} of {where}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Early Phi-3 files say "su".
    kind = "longrope" if kind == "su" else kind
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"unsupported {name} of type {kind!r} in {where}: expected one of "
            f"{', '.join(_ROPE_KEYS)}; use a checkpoint with one of these"
        )
    allowed = {"partial_rotary_factor": (None, 1, 1.0), "truncate": (None, True)}
    _refuse(rope, allowed, f"{name} of {where}")
    needed, further = _ROPE_KEYS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if left := sorted(set(rope) - known - {*needed, *further}):
        raise UserError(f"unsupported keys {left} in {name} of {where}")
    if missing := sorted(set(needed) - set(rope)):
        raise UserError(f"expected {missing} in {name} of {where} for type {kind!r}")
    theta = float(rope.get("rope_theta", raw["rope_theta"]))
    if kind == "default":
        return theta, None
    # The same order as in transformers: the top level wins, else the context.
    longest = raw["max_position_embeddings"]
    original = raw[_ORIGINAL] or rope.get(_ORIGINAL) or longest
    attention = rope.get("attention_factor")
    if kind == "longrope":
        factor = max(longest / original, 1.0)
        if attention is None:
            grown = math.log(factor) / math.log(original) if factor > 1 else 0.0
            attention = math.sqrt(1 + grown)
        lists = rope["short_factor"], rope["long_factor"]
        return theta, RopeScaling(
            kind, factor, 1.0, 4.0, original, float(attention), *lists
        )
    factor = float(rope["factor"])
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    if kind == "yarn":
        low, high = rope.get("beta_slow") or 1.0, rope.get("beta_fast") or 32.0
        attention = 0.1 * math.log(factor) + 1 if attention is None else attention
    else:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        attention = 1.0
    return theta, RopeScaling(
        kind, factor, float(low), float(high), original, float(attention)
    )


def _rope(
    family: Family, raw: Raw, where: str
) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling, and the sliding layers' base if they have their own.

    Read from ``rope_scaling``, ``rope_parameters`` or neither. Families whose layers
    differ have one dictionary for each kind in ``rope_parameters``.
    """
    given = {n: raw[n] for n in ("rope_scaling", "rope_parameters") if raw[n]}
    near: Raw = {}
    if family.local_rope is not None and "rope_parameters" in given:
        both = given.pop("rope_parameters")
        read_fields(both, ROPE_KINDS, f"rope_parameters of {where}")
        if left := sorted(set(both) - set(ROPE_KINDS)):
            raise UserError(
                f"unsupported keys {left} in rope_parameters of {where}: expected a "
                f"dictionary for each of {', '.join(ROPE_KINDS)}"
            )
        near = both.get(_SLIDING) or {}
        given |= {"rope_parameters": both[_FULL]} if both.get(_FULL) else {}
    found = [_scaling(name, rope, raw, where) for name, rope in given.items()]
    if len(set(found)) > 1:
        raise UserError(
            f"rope_scaling and rope_parameters disagree in {where}: {found[0]} and "
            f"{found[1]}; delete the wrong one"
        )
    theta, scaling = found[0] if found else (float(raw["rope_theta"]), None)
    if family.local_rope is None:
        return theta, scaling, None
    usual = theta if family.local_rope == "rope_theta" else raw[family.local_rope]
    name = f"{_SLIDING} of rope_parameters"
    local, stretched = _scaling(name, near, {**raw, "rope_theta": usual}, where)
    if stretched is not None:
        raise UserError(
            f"unsupported {name} of type {stretched.kind!r} in {where}: sliding layers "
            "are not stretched here; use a checkpoint that stretches the others only"
        )
    return theta, scaling, local


def _rope_layers(family: Family, raw: Raw, where: str) -> tuple[bool, ...]:
    """Flags of the layers that have RoPE."""
    depth, given = raw["num_hidden_layers"], raw["no_rope_layers"]
    if family.turns is None:
        return ()
    if given is None:
        return tuple(family.turns(i, raw) for i in range(depth))
    if len(given) < depth:
        raise UserError(
            f"expected no_rope_layers to have an entry for each of {depth} layers in "
            f"{where}, got {len(given)}"
        )
    return tuple(map(bool, given[:depth]))


def _windows(
    family: Family, raw: Raw, where: str
) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the flags of sliding layers."""
    depth, window = raw["num_hidden_layers"], raw["sliding_window"]
    if not raw["use_sliding_window"]:
        window = None
    usual = tuple(window is not None and family.slides(i, raw) for i in range(depth))
    kinds = raw["layer_types"]
    if kinds is None:
        return window, usual
    sliding = tuple(kind == _SLIDING for kind in kinds)
    decided = family.layer_types and (window is not None or not any(sliding))
    if (
        set(kinds) - {_FULL, _SLIDING}
        or len(kinds) != depth
        or not (decided or sliding == usual)
    ):
        raise UserError(
            f"unsupported layer_types in {where}: got {list(kinds)} for {depth} layers "
            f"and a window of {window}; expected {_FULL!r} or {_SLIDING!r} for each "
            "layer, as the family and its window allow"
        )
    return window, sliding


def from_dict(raw: Raw, where: str = "config.json") -> ModelConfig:
    """Reads the settings of a Hugging Face configuration.

    Args:
      raw: the content of ``config.json``.
      where: its name in messages.

    Raises:
      UserError: for an unknown ``model_type`` or a setting that is not supported.

    >>> config = from_dict({"model_type": "llama", "vocab_size": 32, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1,
    ...     "num_attention_heads": 2, "tie_word_embeddings": True})
    >>> config.tied, config.head_dim
    (True, 4)
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"unknown model_type {kind!r:.60} in {where}: known are "
            f"{', '.join(sorted(FAMILIES))}{hint}"
        )
    family = FAMILIES[kind]
    raw = {**family.defaults, **raw}
    rules = {k: v for k, v in COMMON.items() if k not in family.free}
    _refuse(raw, {**rules, **family.allowed}, where)
    try:
        return _from_fields(kind, read_fields(raw, CONFIG, where), where)
    except UserError as error:
        if where in str(error):
            raise
        # The settings check how sizes go together, but know no file.
        raise UserError(f"{where}: {error}") from error


def _from_fields(kind: str, raw: Raw, where: str) -> ModelConfig:
    """The settings of a family, from fields of checked type and range."""
    family = FAMILIES[kind]
    ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id")}
    _check_ids(ids, raw["vocab_size"], where)
    theta, scaling, local = _rope(family, raw, where)
    context = raw["max_position_embeddings"]
    if scaling is not None and scaling.kind == "longrope":
        context = min(context, scaling.original)
    window, sliding = _windows(family, raw, where)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        mlp_width=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"] or 0,
        head_dim=raw["head_dim"] or 0,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local,
        rope_layers=_rope_layers(family, raw, where),
        norm_eps=float(raw["rms_norm_eps"]),
        tied=raw["tie_word_embeddings"],
        context=context,
        init_scale=float(raw["initializer_range"]),
        bos=raw["bos_token_id"],
        eos=_stops(raw["eos_token_id"]),
        pad=raw["pad_token_id"],
        model_type=kind,
        window=window,
        sliding=sliding,
        **family.traits,
        **{field: raw[name] for field, name in family.numbers.items()},
    )


def _check_ids(ids: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Refuses ids beyond the embedding: a gather would clamp them.

    Padding is exempt: many chat models have such an id, and padding is masked.
    """
    wrong = [
        f"{name}={value}"
        for name, value in ids.items()
        if any(i >= vocab_size for i in _stops(value))
    ]
    if wrong:
        raise UserError(
            f"expected token ids below vocab_size={vocab_size} in {where}, got "
            f"{', '.join(wrong):.200}: it belongs to another model, fetch it again"
        )


def _stops(eos: int | list[int] | None) -> tuple[int, ...]:
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _scaling_dict(scaling: RopeScaling) -> dict[str, Any]:
    """The Hugging Face dictionary of a scaling."""
    values = {
        "factor": scaling.factor,
        _ORIGINAL: scaling.original,
        "attention_factor": scaling.attention,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "beta_slow": scaling.low,
        "beta_fast": scaling.high,
        "short_factor": list(scaling.short),
        "long_factor": list(scaling.long),
        "truncate": True,
    }
    needed, further = _ROPE_KEYS[scaling.kind]
    return {"rope_type": scaling.kind} | {n: values[n] for n in (*needed, *further)}


def _rope_dict(config: ModelConfig, family: Family) -> dict[str, Any]:
    """RoPE in both spellings: transformers before 5 reads only the old one."""
    theta, scaling = config.rope_theta, config.rope_scaling
    found: dict[str, Any] = {"rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        found["rope_scaling"] = rope = _scaling_dict(scaling)
    if scaling is not None and scaling.kind == "longrope":
        found[_ORIGINAL] = scaling.original
    found["rope_parameters"] = full = {"rope_theta": theta, **rope}
    if family.local_rope is not None:
        local = config.local_rope_theta or theta
        near = {"rope_theta": local, "rope_type": "default"}
        found |= {family.local_rope: local, "rope_theta": theta}
        found["rope_parameters"] = {_FULL: full, _SLIDING: near}
    return found


def _attention_dict(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Windows and soft caps, if the family has such settings."""
    found = {name: getattr(config, field) for field, name in family.numbers.items()}
    if "sliding_window" in family.free:
        found["sliding_window"] = config.window
    if family.layer_types:
        sliding = config.sliding or (False,) * config.layers
        found["layer_types"] = [_SLIDING if slides else _FULL for slides in sliding]
    if "use_sliding_window" in family.defaults:
        first = config.sliding.index(True) if config.sliding else config.layers
        found |= {
            "use_sliding_window": config.window is not None,
            "max_window_layers": first,
        }
    if family.turns is not None:
        turns = config.rope_layers or (True,) * config.layers
        found["no_rope_layers"] = list(map(int, turns))
    return found


def _longest(config: ModelConfig) -> int:
    """The context to write in a file: for longrope, that of its long factors."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return config.context
    return round(config.context * scaling.factor)


def generation_dict(config: ModelConfig) -> dict[str, Any]:
    """The content of ``generation_config.json``: tokens that start and end a text.

    >>> generation_dict(ModelConfig(vocab_size=32, width=8, mlp_width=16, layers=1,
    ...     heads=2, eos=(2, 7)))
    {'bos_token_id': None, 'eos_token_id': [2, 7], 'pad_token_id': None}
    """
    eos = list(config.eos)
    return {
        "bos_token_id": config.bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad,
    }


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The Hugging Face configuration of the settings; ``from_dict`` reads it back.

    **Guarantee**: ``from_dict(to_dict(config)) == config``.

    Raises:
      UserError: if no configuration of the family expresses these settings.

    >>> config = ModelConfig(vocab_size=32, width=8, mlp_width=16, layers=1, heads=2)
    >>> from_dict(to_dict(config)) == config
    True
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"expected a model_type of {', '.join(FAMILIES)}, got {config.model_type!r}"
        )
    family = FAMILIES[config.model_type]
    activation = GELU if config.activation == "gelu_tanh" else "silu"
    raw = {
        "architectures": [family.architecture],
        "attention_bias": False,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "hidden_size": config.width,
        "initializer_range": config.init_scale,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": _longest(config),
        "mlp_bias": False,
        "model_type": config.model_type,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # The name of "dtype" before transformers 4.56.
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        **generation_dict(config),
        **_rope_dict(config, family),
        **_attention_dict(config, family),
    }
    if "hidden_activation" in family.allowed:
        raw["hidden_activation"] = activation
    again = from_dict(raw)
    if again != config:
        odd = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(again, field.name) != getattr(config, field.name)
        ]
        raise UserError(
            f"a {config.model_type} configuration cannot express "
            f"{', '.join(f'{n}={getattr(config, n)!r}' for n in odd)}; set model_type "
            "to the family that has it"
        )
    return raw


def read(folder: str | pathlib.Path) -> ModelConfig:
    """Reads a folder's ``config.json`` and the stop tokens of its generation file.

    Chat models often name their end-of-turn token only in
    ``generation_config.json``, so both files' stop tokens are used.

    Raises:
      UserError: if a file is missing, not JSON, or not supported, or names a token
        beyond the vocabulary.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not is_there(path):
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds an adapter, which needs its base model" if adapter else ""
        if folder.suffix == ".gguf":
            hint = "; models.save(FOLDER, models.load(FILE)) makes one of a .gguf file"
        raise UserError(f"expected config.json in {folder}, found none{hint}")
    config = from_dict(read_object(path), str(path))
    extra = folder / "generation_config.json"
    if is_there(extra):
        found = read_fields(read_object(extra), {"eos_token_id": EOS}, str(extra))
        _check_ids(found, config.vocab_size, str(extra))
        more = tuple(i for i in _stops(found["eos_token_id"]) if i not in config.eos)
        config = dataclasses.replace(config, eos=config.eos + more)
    return config
