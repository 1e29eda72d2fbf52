"""The device of a forecast: this machine's, or one that `--device.…` describes."""

import dataclasses
import re
import time
from typing import Any, Literal

from sbr_jax import checks
from sbr_jax.costs.forecast import A100, Device
from sbr_jax.settings import Count, Positive

KINDS = {
    "A100": (125e12, 1.2e12),
    "H100": (395e12, 2.0e12),
    "H200": (395e12, 2.9e12),
    "4090": (66e12, 0.6e12),
    "A10": (50e12, 0.36e12),
    "L40S": (145e12, 0.52e12),
    "L4": (48e12, 0.18e12),
    "TPU v4": (110e12, 0.72e12),
    "TPU v5 lite": (79e12, 0.49e12),
    "TPU v5": (184e12, 1.66e12),
    "TPU v6": (367e12, 0.98e12),
}
"""FLOP/s and bytes/s that devices reach: 40 % and 60 % of what their makers state."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """The device that a forecast is for; None takes this machine's value.

    Attributes:
        memory_gb: its memory.
        tflops: what it reaches, not its peak; "measured" times a product here.
        gbps: GB a second that its memory reaches.
        count: the number of devices.
    """

    memory_gb: Positive | None = None
    tflops: Positive | Literal["measured"] | None = None
    gbps: Positive | None = None
    count: Count | None = None

    def __post_init__(self):
        """Refuses impossible values."""
        checks.fields(self, "device")
        if isinstance(self.tflops, int | float):
            checks.number("device.tflops", self.tflops, above=0)


def planned_bytes(compiled: Any) -> int:
    """Arguments, outputs and temporaries of a compiled program, in bytes."""
    found = compiled.memory_analysis()
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def make_device(options: DeviceOptions) -> Device:
    """The device of a forecast: this machine's, changed by the options."""
    import jax

    found = jax.local_devices()  # Devices of other hosts give no details.
    kind = found[0].device_kind
    device = dataclasses.replace(A100, name="assumed: A100, 80 GB")
    if found[0].platform != "cpu":
        flops, rate = reached(kind)
        memory = (found[0].memory_stats() or {}).get("bytes_limit")
        device = Device(f"this machine's {kind}", memory, flops, rate, 1)
    else:
        device = dataclasses.replace(device, memory=None)
    tflops = options.tflops
    if tflops == "measured":
        tflops = measured_flops() / 1e12
    said = {
        "memory": options.memory_gb and options.memory_gb * 1e9,
        "flops": tflops and tflops * 1e12,
        "bandwidth": options.gbps and options.gbps * 1e9,
        "count": options.count,
    }
    changes = {name: value for name, value in said.items() if value is not None}
    if changes:
        changes["name"] = f"{device.name}, as --device says"
    return dataclasses.replace(device, **changes)


def reached(kind: str) -> tuple[float, float]:
    """What a kind of device reaches, see `KINDS`; an A100's if it is unknown.

    >>> reached("NVIDIA L4") == KINDS["L4"], reached("NVIDIA L40") == KINDS["L4"]
    (True, False)
    """
    known = (k for k in KINDS if re.search(rf"{k}(?!\d)", kind))
    return KINDS[next(known, "A100")]


def this_machine(dtype: str) -> Device:
    """This machine's device: a CPU is timed, since no table knows it."""
    import jax

    if jax.default_backend() != "cpu":
        return make_device(DeviceOptions())
    flops = measured_flops(1024, 0.3, dtype)
    return Device("this machine's CPU, measured", None, flops, CPU_BANDWIDTH)


CPU_BANDWIDTH = 1e10
"""Bytes a second of a CPU's memory; an assumption."""


def measured_flops(
    size: int = 2048, seconds: float = 0.5, dtype: str = "bfloat16"
) -> float:
    """FLOP/s of matrix products on the first device."""
    import jax
    import jax.numpy as jnp

    x = jnp.full((size, size), 1e-3, dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        product(x).block_until_ready()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)
