"""The device of a forecast: this machine's, or the one that `--set device.…` says."""

import dataclasses
import math
import time
from collections.abc import Sequence

from sbr_jax.costs.forecast import A100, Device
from sbr_jax.typing import UserError

KINDS = {
    "A100": (125e12, 1.2e12),
    "H100": (395e12, 2.0e12),
    "H200": (395e12, 2.9e12),
    "4090": (66e12, 0.6e12),
    "A10": (50e12, 0.36e12),
    "L4": (48e12, 0.18e12),
    "TPU v4": (110e12, 0.72e12),
    "TPU v5 lite": (79e12, 0.49e12),
    "TPU v5": (184e12, 1.66e12),
    "TPU v6": (367e12, 0.98e12),
}
"""FLOP/s and bytes/s that devices reach: 40 % and 60 % of what their makers state."""


def read_device(texts: Sequence[str]) -> Device:
    """The device of a forecast: this machine's, changed by `device.KEY=VALUE`.

    Args:
        texts: of `--set`; those that do not begin with `device.` are passed over.

    Raises:
        UserError: for an unknown key, or a value that is no number above 0 (of devices:
            a whole one).
    """
    import jax

    texts = [text for text in texts if text.startswith("device.")]
    found = jax.devices()
    kind, count = found[0].device_kind, 1
    device = dataclasses.replace(A100, name="assumed: A100, 80 GB")
    if found[0].platform != "cpu":
        flops, rate = next((v for k, v in KINDS.items() if k in kind), KINDS["A100"])
        memory = (found[0].memory_stats() or {}).get("bytes_limit")
        device = Device(f"this machine's {kind}", memory, flops, rate, count)
    else:
        device = dataclasses.replace(device, memory=None)
    fields = {
        "memory_gb": ("memory", 1e9),
        "tflops": ("flops", 1e12),
        "gbps": ("bandwidth", 1e9),
        "count": ("count", 1),
    }
    for text in texts:
        key, _, value = text.removeprefix("device.").partition("=")
        if key not in fields:
            raise UserError(
                f"--set device.{key}: expected one of {', '.join(fields)}; these "
                "describe the device of --dry-run"
            )
        name, unit = fields[key]
        if (key, value) == ("tflops", "measured"):
            number = measured_flops() / unit
        else:
            try:
                number = float(value)
            except ValueError:
                number = math.nan
        whole = key == "count"
        if not 0 < number < math.inf or (whole and number != int(number)):
            raise UserError(
                f"--set {text}: expected a {'whole ' if whole else ''}number above 0"
                + (", or 'measured'" if key == "tflops" else "")
            )
        changed = int(number) if key == "count" else number * unit
        device = dataclasses.replace(device, **{name: changed})
    if texts:
        device = dataclasses.replace(device, name=f"{device.name}, as --set says")
    return device


def measured_flops(size: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of products of bfloat16 matrices on the first device."""
    import jax
    import jax.numpy as jnp

    x = jnp.full((size, size), 1e-3, jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        product(x).block_until_ready()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)
