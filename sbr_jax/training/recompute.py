"""Whether a layer's activations are kept for the backward pass or recomputed.

Recomputing saves memory and costs a third of a step's products again.
"""

import dataclasses
import os
from pathlib import Path

import jax

from sbr_jax.data.layout import choose
from sbr_jax.models import ModelConfig, make_apply_fn
from sbr_jax.settings import Hardware, Training
from sbr_jax.training.study import Study
from sbr_jax.typing import ApplyFn

FLOAT32 = 4
SHARE = 0.25
"""Share of a device's memory that stored activations may fill. The rest is for all that
is not counted: weights, a reference's pass, fragments."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def activation_bytes(
    config: ModelConfig, tokens: float, length: int, size: int = FLOAT32
) -> float:
    """Bytes that the backward pass of one layer needs.

    Counted are the normed inputs (twice), queries, keys, values, attention's output,
    the gate before and after its activation, the other factor, their product, and the
    scores (twice, in float32).

    Args:
      config: of the model.
      tokens: number of tokens in all rows.
      length: T, tokens of a row, whose scores are kept; 0 if none are.
      size: bytes of a number.

    >>> tiny = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> activation_bytes(tiny, 10, 5)
    3040
    """
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    token = 2 * config.width + 2 * queries + 2 * keys + 4 * config.mlp_width
    return tokens * (token * size + 2 * config.heads * length * FLOAT32)


def device_memory() -> float:
    """Bytes of the first device; on a CPU, those that this process may use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = (Path(name) for name in _LIMITS)
    limits = [x.read_text().strip() for x in said if x.is_file()]
    return min([whole, *(int(x) for x in limits if x.isdigit())])


def is_recomputed(
    study: Study,
    training: Training,
    hardware: Hardware,
    memory: float | None = None,
) -> bool:
    """Whether this job recomputes its layers in the backward pass.

    With `hardware.remat` at "auto", only a model that was loaded to recompute can do
    so. It does if the float32 activations of all layers, for a training microbatch in
    its layout or a Fisher microbatch, exceed `SHARE` of the device's memory. On a mesh
    it always does: there the share depends on the layout, and all hosts must agree. The
    choice is the same for all methods, so that their steps can be compared.

    Args:
      study: has the model and the lengths of its sets.
      training: has the batch size.
      hardware: of the job.
      memory: bytes of the device; None for this machine's.
    """
    loaded = study.model.hardware.remat
    if hardware.remat != "auto":
        return hardware.remat == "yes"
    if hardware.mesh is not None or not loaded:
        return loaded
    step = training.batch_size // hardware.accumulation
    sizes = []
    for domain in study.domains.values():
        layout = choose(
            domain.train,
            training.batch_size,
            packing=hardware.packing,
            parts=hardware.accumulation,
        )
        # Attention in tiles keeps no scores.
        rows = (step * domain.train.length, domain.train.length)
        sizes.append((layout.width, 0) if layout.packed else rows)
    if study.calibration is not None:
        length = study.calibration.length
        sizes.append((hardware.fisher_microbatch * length, length))
    config = study.model.config
    most = max(activation_bytes(config, *size) for size in sizes)
    room = SHARE * (device_memory() if memory is None else memory)
    return config.layers * most > room


def training_apply_fn(study: Study, training: Training, hardware: Hardware) -> ApplyFn:
    """The model's function as training differentiates it; see :func:`is_recomputed`."""
    model, remat = study.model, is_recomputed(study, training, hardware)
    if remat == model.hardware.remat:
        return model.apply_fn
    own = dataclasses.replace(model.hardware, remat=remat)
    return make_apply_fn(model.config, own)
