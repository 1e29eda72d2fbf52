"""Names and shapes of the base weights."""

from __future__ import annotations

import re
from typing import Any

from sbr_jax.models.config import BIASED, TARGETS, ModelConfig
from sbr_jax.typing import UserError


def base_shapes(config: ModelConfig) -> dict[str, Any]:
    """The shape of every base weight, in the tree of the weights.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> base_shapes(config)["layers"]["up_proj"]
    (2, 4, 8)
    """
    depth, width = config.layers, config.width
    layers: dict[str, tuple[int, ...]]
    layers = {name: (depth, *config.projection(name)) for name in TARGETS}
    if config.pre_norms:
        layers |= dict.fromkeys(("input_norm", "mlp_norm"), (depth, width))
    if config.post_norms:
        layers |= {"attention_out_norm": (depth, width), "mlp_out_norm": (depth, width)}
    if config.qk_norm:
        whole = config.qk_norm_whole
        for name in "qk":
            size = config.projection(f"{name}_proj")[1] if whole else config.head_dim
            layers[f"{name}_norm"] = (depth, size)
    if config.qkv_bias:
        layers |= {bias_of(n): (depth, config.projection(n)[1]) for n in BIASED}
    shapes = {
        "embed": (config.vocab_size, width),
        "layers": layers,
        "final_norm": (width,),
    }
    return shapes if config.tied else {**shapes, "head": (width, config.vocab_size)}


def bias_of(name: str) -> str:
    """The name of a projection's bias in the tree.

    >>> bias_of("q_proj")
    'q_proj_bias'
    """
    return f"{name}_bias"


def is_shape(node: Any) -> bool:
    """True for a shape in such a tree."""
    return isinstance(node, tuple)


def select_targets(pattern: str) -> tuple[str, ...]:
    """The projections whose whole name matches a regular expression.

    Args:
      pattern: for example ``r"(q|k|v|o)_proj"``.

    Returns:
      Names in the order of ``TARGETS``.

    Raises:
      UserError: if nothing matches or the expression is not valid.

    >>> select_targets("(q|v)_proj")
    ('q_proj', 'v_proj')
    """
    try:
        matcher = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"targets={pattern!r} is no regular expression: {error}") from (
            error
        )
    found = tuple(name for name in TARGETS if matcher.fullmatch(name))
    if not found:
        raise UserError(
            f"targets={pattern!r} matches no projection; the names are "
            f"{', '.join(TARGETS)}"
        )
    return found
