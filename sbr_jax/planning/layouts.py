"""Ways to lay a job out on a slice, and a choice of those worth compiling.

A layout is ``data × fsdp × tp`` chips. Sizes alone predict its link traffic and memory
well enough to leave out most layouts without compiling.

Symbols: d, f, t chips by axis, W bytes of a layer's weights, D width, L layers.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from sbr_jax.costs import forecast
from sbr_jax.costs.forecast import Load
from sbr_jax.planning.chips import Topology, slices
from sbr_jax.settings import Hardware, Training
from sbr_jax.training import sharding
from sbr_jax.typing import UserError

MOST_TP = 16
"""Most chips that share the heads: with more, each chip's products are too small."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Chips by axis.

    >>> str(Layout(1, 4, 4)), Layout(1, 4, 4).rows
    ('fsdp=4,tp=4', 4)
    """

    data: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def chips(self) -> int:
        """The number of chips in all."""
        return self.data * self.fsdp * self.tp

    @property
    def rows(self) -> int:
        """Parts that the examples of a step are split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self)
        return ",".join(f"{k}={v}" for k, v in sizes.items() if v > 1) or "fsdp=1"


def parse_layout(text: str) -> Layout:
    """Reads ``"data=2,fsdp=4,tp=2"``."""
    return Layout(**sharding.parse_mesh(text))


def check_layout(layout: Layout, topology: Topology, load: Load) -> None:
    """Refuses a layout that does not fit the slice, the batch or the model.

    Raises:
        UserError: for the first misfit, with what would fit.
    """
    if layout.chips != topology.chips:
        raise UserError(
            f"--mesh {layout}: expected sizes whose product is {topology.chips}, the "
            f"chips of {topology}, got {layout.chips}"
        )
    hardware = Hardware(mesh=str(layout), accumulation=load.accumulation)
    sharding.check_mesh(hardware, Training(batch_size=load.batch), load.config)


def layouts(topology: Topology, load: Load) -> list[Layout]:
    """All layouts of a job on a slice, the best by their sizes first.

    Raises:
        UserError: if there is none.

    >>> from sbr_jax.planning.chips import parse_topology
    >>> from sbr_jax.planning.shapes import read_shape
    >>> load = Load(read_shape("llama2-7b"), batch=2)
    >>> [str(x) for x in layouts(parse_topology("v5e:2x2"), load)]
    ['data=2,tp=2', 'tp=4', 'fsdp=2,tp=2']
    """
    found = possible(topology, load)
    if not found:
        raise UserError(
            f"--topology {topology}: found no mesh of {topology.chips} chips for "
            f"{load.batch} examples and {load.config.kv_heads} key/value heads: raise "
            "--batch, or take a smaller slice"
        )

    def cost(layout: Layout) -> tuple[bool, float, int]:
        full = weight_share(load, layout) > topology.chip.memory
        return full, link_bytes(load, layout), layout.data

    return sorted(found, key=cost)


def possible(topology: Topology, load: Load) -> list[Layout]:
    """Layouts that fit slice, batch and model, in no particular order."""
    found = []
    for layout in _all(topology.chips):
        with contextlib.suppress(UserError):
            check_layout(layout, topology, load)
            found += [layout] if layout.tp <= MOST_TP else []
    return found


def _all(chips: int) -> Iterator[Layout]:
    for tp in (n for n in range(1, chips + 1) if chips % n == 0):
        rest = chips // tp
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield Layout(rest // fsdp, fsdp, tp)


def weight_share(load: Load, layout: Layout) -> float:
    """Bytes of the frozen weights on one chip."""
    whole = forecast.weight_bytes(load.config, load.dtype, load.quantize)
    return whole / (layout.fsdp * layout.tp)


def link_bytes(load: Load, layout: Layout) -> float:
    """Approximate bytes that a chip receives in one step of plain training.

    Weights are gathered over ``fsdp`` in the forward pass, the recomputation and the
    backward pass: 3 (f − 1)/f W/t for each layer and microbatch. Each of the three also
    sums the stream over ``tp`` twice a layer: 12 (t − 1)/t bytes of the stream.
    """
    size = forecast.BYTES[load.dtype]
    whole = forecast.weight_bytes(load.config, load.dtype, load.quantize)
    f, t = layout.fsdp, layout.tp
    gathered = 3 * load.accumulation * whole / t * (f - 1) / f
    stream = load.batch / layout.rows * load.length * load.config.width * size
    return gathered + 12 * load.config.layers * stream * (t - 1) / t


def smallest(kind: str, memory: float, load: Load, layout: Layout) -> Topology | None:
    """The smallest slice whose chips would have room, by arithmetic alone.

    Memory other than weights is assumed to be proportional to the examples on a chip.
    """
    rest = memory - weight_share(load, layout)
    for topology in slices(kind):
        own = rest * layout.chips / topology.chips
        for other in possible(topology, load):
            if weight_share(load, other) + own <= topology.chip.memory:
                return topology
    return None
